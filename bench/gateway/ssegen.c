/* Open-loop server-sent events: engine and clients in one thread of one process, so that one clock stamps and reads.
 *
 *   ssegen ENGINE_SOCKET HOST:PORT|SOCKET STREAMS EVENTS_PER_SECOND_PER_STREAM SECONDS [KEY]
 *
 * Event k is due at start + k / (streams * rate), on stream k % streams, and carries that time; so a late generator or
 * proxy counts as late, and nothing is omitted. Prints one JSON line: events due and seen, latency in microseconds. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAXFD 16384
#define BUCKETS 2000000 /* of 1 us: two seconds */
enum { NONE, LISTEN, ENGINE_HEAD, ENGINE, CLIENT };
struct conn { int kind, got, len, carry; char buf[1024]; };
static struct conn *conns[MAXFD];
static int engines[MAXFD], n_engines, heads, ep, streams;
static unsigned long hist[BUCKETS + 1], seen, dropped;
static long long worst, warm_until;

static long long now_ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000LL + t.tv_nsec; }
static void die(const char *what) { perror(what); exit(1); }
static void watch(int fd, int kind) {
  if (fd >= MAXFD) { fprintf(stderr, "too many descriptors\n"); exit(1); }
  struct epoll_event ev = { .events = EPOLLIN, .data.fd = fd };
  conns[fd] = calloc(1, sizeof(struct conn));
  conns[fd]->kind = kind;
  if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev)) die("epoll_ctl");
}
static int dial(const char *to) {
  int fd;
  if (strchr(to, '/')) {
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    strncpy(a.sun_path, to, sizeof a.sun_path - 1);
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(fd, (void *)&a, sizeof a)) die("connect");
  } else {
    char host[64]; snprintf(host, sizeof host, "%s", to); char *colon = strrchr(host, ':'); *colon = 0;
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(atoi(colon + 1)) };
    inet_pton(AF_INET, host, &a.sin_addr);
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&a, sizeof a)) die("connect");
    int one = 1; setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  }
  return fd;
}
static void engine_request(int fd, struct conn *c) {
  char b[8192]; int n = read(fd, b, sizeof b - 1);
  if (n <= 0) { close(fd); free(c); conns[fd] = 0; return; }
  b[n] = 0;
  /* Requests are small and come in one or two reads; the body ends in "}". */
  if (b[n - 1] != '}') return;
  static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
  if (write(fd, head, sizeof head - 1) < 0) die("engine write");
  c->kind = ENGINE; engines[n_engines++] = fd;
}
static void client_data(int fd, struct conn *c) {
  static char b[262144 + 1024];
  memcpy(b, c->buf, c->carry);
  int n = read(fd, b + c->carry, 262144);
  if (n <= 0) { epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0); dropped++; return; }
  n += c->carry; b[n] = 0;
  if (!c->got) { c->got = 1; heads++; if (strncmp(b, "HTTP/1.1 200", 12)) { fprintf(stderr, "answer: %.300s\n", b); exit(1); } }
  long long t = now_ns(); char *p = b, *end = b + n;
  while ((p = memmem(p, end - p, "{\"t\":\"", 6)) && p + 26 <= end) {
    long long due = atoll(p + 6), late = t - due; p += 26;
    if (due < warm_until) continue;
    seen++; if (late > worst) worst = late;
    long long i = late / 1000; hist[i < 0 ? 0 : i > BUCKETS ? BUCKETS : i]++;
  }
  char *rest = p ? p : (end - b > 5 ? end - 5 : b);
  c->carry = end - rest; memcpy(c->buf, rest, c->carry);
}
static void poll_once(int wait) {
  struct epoll_event ev[512]; int n = epoll_wait(ep, ev, 512, wait);
  for (int i = 0; i < n; i++) {
    int fd = ev[i].data.fd; struct conn *c = conns[fd];
    if (!c) continue;
    if (c->kind == LISTEN) { int s; while ((s = accept4(fd, 0, 0, SOCK_NONBLOCK)) >= 0) watch(s, ENGINE_HEAD); }
    else if (c->kind == ENGINE_HEAD) engine_request(fd, c);
    else if (c->kind == ENGINE) { char b[512]; if (read(fd, b, sizeof b) == 0) epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0); }
    else client_data(fd, c);
  }
}
static double pct(double q) {
  unsigned long want = seen * q, sum = 0;
  for (int i = 0; i <= BUCKETS; i++) if ((sum += hist[i]) > want) return i;
  return BUCKETS;
}
int main(int argc, char **argv) {
  if (argc < 6) { fprintf(stderr, "see the head of ssegen.c\n"); return 2; }
  signal(SIGPIPE, SIG_IGN);
  streams = atoi(argv[3]); double rate = atof(argv[4]) * streams, seconds = atof(argv[5]);
  ep = epoll_create1(0);
  int l = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
  struct sockaddr_un a = { .sun_family = AF_UNIX };
  strncpy(a.sun_path, argv[1], sizeof a.sun_path - 1); unlink(argv[1]);
  if (bind(l, (void *)&a, sizeof a) || listen(l, 4096)) die("listen");
  chmod(argv[1], 0666); /* nginx workers run as another user */
  watch(l, LISTEN);
  const char *body = "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"stream\":true,\"model\":\"m\"}";
  char req[1024], auth[256] = "";
  if (argc > 6) snprintf(auth, sizeof auth, "Authorization: Bearer %s\r\n", argv[6]);
  int rn = snprintf(req, sizeof req, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%sContent-Length: %zu\r\n\r\n%s", auth, strlen(body), body);
  for (int i = 0; i < streams; i++) {
    int fd = dial(argv[2]); watch(fd, CLIENT);
    if (write(fd, req, rn) != rn) die("request");
    for (int k = 0; k < 4; k++) poll_once(0);
  }
  long long limit = now_ns() + 30000000000LL;
  while ((heads < streams || n_engines < streams) && now_ns() < limit) poll_once(10);
  if (n_engines < streams) { fprintf(stderr, "only %d of %d streams opened\n", n_engines, streams); return 1; }
  char chunk[512]; long long start = now_ns() + 10000000; warm_until = start + 500000000;
  unsigned long due = 0, total = rate * (seconds + 0.5), blocked = 0, k = 0, counted = 0;
  while (k < total) {
    long long t = now_ns();
    for (int burst = 0; k < total && burst < 64; burst++) {
      long long at = start + (long long)(k * 1e9 / rate);
      if (at > t) break;
      int n = snprintf(chunk, sizeof chunk, "f0\r\ndata: {\"t\":\"%019lld\",\"id\":\"chatcmpl-0yF8KqqOisUoGw9rLPTJQdKqvAy5Ki6k\",\"object\":\"chat.completion.chunk\",\"created\":1795489283,\"model\":\"m\",\"choices\":[{\"index\":0,\"finish_reason\":null,\"delta\":{\"content\":\" world", at);
      memset(chunk + n, ' ', 4 + 0xf0 - 7 - n); /* pad to the size that the chunk states */
      memcpy(chunk + 4 + 0xf0 - 7, "\"}}]}\n\n\r\n", 9);
      n = 4 + 0xf0 + 2;
      if (send(engines[k % streams], chunk, n, MSG_DONTWAIT) != n) blocked++;
      if (at >= warm_until) counted++;
      k++; due++;
    }
    long long next = start + (long long)(k * 1e9 / rate), gap = next - now_ns();
    poll_once(gap > 2000000 ? 1 : 0);
  }
  limit = now_ns() + 1000000000LL;
  while (seen < counted && now_ns() < limit) poll_once(5);
  printf("{\"due\":%lu,\"seen\":%lu,\"blocked\":%lu,\"dropped\":%lu,\"p50_us\":%.0f,\"p99_us\":%.0f,\"max_us\":%.0f}\n", counted, seen, blocked, dropped, pct(0.5), pct(0.99), worst / 1e3);
  return 0;
}
