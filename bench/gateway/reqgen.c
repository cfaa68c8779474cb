/* Open-loop requests: request k is due at start + k / rate, whatever became of those before, on a connection that is idle.
 *
 *   reqgen HOST:PORT|SOCKET CONNECTIONS REQUESTS_PER_SECOND SECONDS [KEY]
 *
 * Latency counts from when a request was due to the last byte of its answer. The first half second is not counted.
 * The request is the one of request.lua: 2 KB, `model` last. Prints one JSON line, microseconds. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAXFD 4096
#define BUCKETS 2000000
struct conn { long long due; int got; char buf[8192]; };
static struct conn conns[MAXFD];
static int idle[MAXFD], n_idle;
static unsigned long hist[BUCKETS + 1], seen, failed;

static long long now_ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000LL + t.tv_nsec; }
static void die(const char *what) { perror(what); exit(1); }
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
  if (fd >= MAXFD) { fprintf(stderr, "too many descriptors\n"); exit(1); }
  return fd;
}
/* Whether the answer in the buffer is whole. */
static int whole(struct conn *c) {
  char *end = memmem(c->buf, c->got, "\r\n\r\n", 4);
  if (!end) return 0;
  c->buf[c->got] = 0;
  char *length = strcasestr(c->buf, "\r\ncontent-length:");
  if (!length || length > end) { fprintf(stderr, "no length: %.200s\n", c->buf); exit(1); }
  return c->got >= end + 4 - c->buf + atoi(length + 17);
}
int main(int argc, char **argv) {
  if (argc < 5) { fprintf(stderr, "see the head of reqgen.c\n"); return 2; }
  signal(SIGPIPE, SIG_IGN);
  int connections = atoi(argv[2]); double rate = atof(argv[3]), seconds = atof(argv[4]);
  static char body[4096] = "{\"messages\":[{\"role\":\"user\",\"content\":\"", req[8192];
  for (int i = 0; i < 43; i++) strcat(body, "The quick brown fox jumps over the lazy dog. ");
  strcat(body, "\"}],\"max_tokens\":64,\"model\":\"m\"}");
  char auth[256] = "";
  if (argc > 5) snprintf(auth, sizeof auth, "Authorization: Bearer %s\r\n", argv[5]);
  int rn = snprintf(req, sizeof req, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%sContent-Length: %zu\r\n\r\n%s", auth, strlen(body), body);
  int ep = epoll_create1(0);
  for (int i = 0; i < connections; i++) {
    int fd = dial(argv[1]); idle[n_idle++] = fd;
    struct epoll_event ev = { .events = EPOLLIN, .data.fd = fd };
    if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev)) die("epoll_ctl");
  }
  long long start = now_ns() + 1000000, warm = start + 500000000;
  unsigned long k = 0, total = rate * (seconds + 0.5), open = 0;
  while (k < total || open) {
    long long t = now_ns(), at;
    while (k < total && n_idle && (at = start + (long long)(k * 1e9 / rate)) <= t) {
      int fd = idle[--n_idle]; conns[fd].due = at; conns[fd].got = 0;
      if (send(fd, req, rn, MSG_DONTWAIT) != rn) { failed++; k++; continue; }
      k++; open++;
    }
    if (t > start + (long long)((seconds + 5) * 1e9)) break;
    struct epoll_event ev[256];
    int n = epoll_wait(ep, ev, 256, 0);
    for (int i = 0; i < n; i++) {
      int fd = ev[i].data.fd; struct conn *c = &conns[fd];
      int got = recv(fd, c->buf + c->got, sizeof c->buf - 1 - c->got, MSG_DONTWAIT);
      if (got <= 0) { fprintf(stderr, "a connection ended\n"); return 1; }
      c->got += got;
      if (!whole(c)) continue;
      if (strncmp(c->buf, "HTTP/1.1 200", 12)) failed++;
      open--; idle[n_idle++] = fd;
      if (c->due < warm) continue;
      long long late = (now_ns() - c->due) / 1000; seen++; hist[late > BUCKETS ? BUCKETS : late]++;
    }
  }
  unsigned long sum = 0, p50 = 0, p99 = 0;
  for (long i = 0; i <= BUCKETS; i++) { sum += hist[i]; if (!p50 && sum > seen / 2) p50 = i; if (!p99 && sum > seen * 0.99) { p99 = i; break; } }
  printf("{\"seen\":%lu,\"failed\":%lu,\"due\":%lu,\"p50_us\":%lu,\"p99_us\":%lu}\n", seen, failed, (unsigned long)(rate * seconds), p50, p99);
  return 0;
}
