"""Gateway against nginx, HAProxy, Caddy and LiteLLM: requests per second, and server-sent events open-loop.

Each proxy runs alone, pinned to one core; the load generator and everyone's upstream (nginx with a canned 300-byte
completion on a unix socket) share the other. Rounds are interleaved; a ratio is the median of the rounds' ratios; a
round in which the proxy's core idled over 10 % does not count. ``--quick`` shows the shape in under a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from hmac import digest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "bench" / "gateway"
CACHE = ROOT / ".cache" / "bench"
KEY = "sk-bench-" + secrets.token_hex(24)
UPSTREAM_PORT = 12901
PORT = 12902
PEERS = ("nginx", "haproxy", "caddy", "litellm")
IDLE_MAX = 0.10


@dataclass
class Setup:
    """Where this run keeps its files and which cores it uses."""

    folder: Path
    proxy_core: int
    load_core: int
    notes: list[str] = field(default_factory=list)

    def render(self, name: str, **values: str) -> Path:
        """A peer's committed configuration with this run's paths filled in."""
        text = (HERE / name).read_text()
        body = json.dumps(
            {
                "id": "chatcmpl-0yF8KqqOisUoGw9rLPTJQdKqvAy5Ki6k",
                "object": "chat.completion",
                "created": 1795489283,
                "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "%s"}}],
                "usage": {"prompt_tokens": 31, "completion_tokens": 4, "total_tokens": 35},
            },
            separators=(",", ":"),
        )
        body = body.replace("%s", "x" * (300 - len(body) + 2))
        fixed = {"DIR": str(self.folder), "PORT": str(PORT), "UPSTREAM_PORT": str(UPSTREAM_PORT), "BODY": body}
        for key, value in (fixed | {"KEY": KEY, "SOCKET": str(self.folder / "upstream.sock")} | values).items():
            text = text.replace(f"@{key}@", value)
        target = self.folder / name
        target.write_text(text)
        return target


@contextlib.contextmanager
def running(argv: list[str], core: int, ready: Callable[[], bool], **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A pinned process (and its children), up and answering inside the block and gone after it."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed below
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *argv], stdout=log, stderr=log, start_new_session=True, **popen
    )
    try:
        limit = time.monotonic() + 120
        while not ready():
            if process.poll() is not None or time.monotonic() > limit:
                log.seek(0)
                raise RuntimeError(f"{argv[0]} did not start: {log.read()[-2000:].decode(errors='replace')}")
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def listens(port: int) -> Callable[[], bool]:
    """A probe for a TCP port."""

    def probe() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    return probe


def pierhead(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """The gateway as the daemon starts it, with one route and (with ``auth``) one key."""
    pepper = secrets.token_bytes(32)
    snapshot: dict[str, Any] = {
        "type": "snapshot",
        "version": 1,
        "pepper": pepper.hex(),
        "keys": [{"id": "bench", "mac": digest(pepper, KEY.encode(), sha256).hex()}],
        "routes": [{"name": "m", "endpoints": [{"replica": "r1", "socket": upstream}]}],
    }
    config = {
        "settings": {"listen": [f"127.0.0.1:{PORT}"], "require_key": auth, "access_log": False},
        "snapshot": snapshot,
    }
    given = setup.folder / "pierhead.json"
    given.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "pierhead.gateway", "--admin", str(setup.folder / "admin.sock")]
    return running(argv, setup.proxy_core, listens(PORT), stdin=given.open("rb"))


def nginx(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """nginx, one worker."""
    rule = "if ($authorized = 0) { return 401; }" if auth else ""
    conf = setup.render("nginx.conf", AUTH=rule, SOCKET=upstream, BUFFERING="off" if streaming else "on")
    return running(["nginx", "-c", str(conf), "-p", str(setup.folder)], setup.proxy_core, listens(PORT))


def haproxy(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """HAProxy, one thread."""
    rule = f'http-request deny deny_status 401 unless {{ req.hdr(authorization) -m str "Bearer {KEY}" }}'
    conf = setup.render("haproxy.cfg", AUTH=rule if auth else "", SOCKET=upstream)
    return running(["haproxy", "-db", "-f", str(conf)], setup.proxy_core, listens(PORT))


def caddy(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """Caddy with one processor."""
    rule = f'@strange not header Authorization "Bearer {KEY}"\n\trespond @strange 401' if auth else ""
    conf = setup.render("Caddyfile", AUTH=rule, SOCKET=upstream)
    env = os.environ | {"GOMAXPROCS": "1", "HOME": str(setup.folder), "XDG_DATA_HOME": str(setup.folder)}
    argv = ["caddy", "run", "--adapter", "caddyfile", "--config", str(conf)]
    return running(argv, setup.proxy_core, listens(PORT), env=env)


def litellm(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """LiteLLM's proxy, one worker."""
    rule = f"general_settings:\n  master_key: {KEY}" if auth else ""
    conf = setup.render("litellm.yaml", AUTH=rule)
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "HOME": str(setup.folder)}
    argv = [str(CACHE / "litellm/bin/litellm"), "--config", str(conf), "--port", str(PORT), "--host", "127.0.0.1"]
    return running([*argv, "--num_workers", "1"], setup.proxy_core, listens(PORT), env=env, cwd=setup.folder)


PROXIES = {"pierhead": pierhead, "nginx": nginx, "haproxy": haproxy, "caddy": caddy, "litellm": litellm}


def install_litellm() -> str:
    """Make LiteLLM's environment once; returns why it could not."""
    home = CACHE / "litellm"
    if (home / "bin/litellm").exists():
        return ""
    CACHE.mkdir(parents=True, exist_ok=True)
    for argv in (
        ["uv", "venv", "--quiet", str(home)],
        ["uv", "pip", "install", "--quiet", "--python", str(home), "litellm[proxy]", "prometheus-client"],
    ):
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(home, ignore_errors=True)
            return done.stderr.strip()[-300:] or "uv failed"
    return ""


def available(names: list[str], notes: list[str]) -> list[str]:
    """Those of ``names`` that this machine can run; a note for each of the others."""
    found: list[str] = []
    for name in names:
        why = "" if name in ("pierhead", "litellm") or shutil.which(name) else "it is not installed"
        if name == "litellm" and not why:
            why = install_litellm()
        if why:
            notes.append(f"{name} is left out: {why}")
        else:
            found.append(name)
    return found


def core_times(core: int) -> tuple[int, int]:
    """(idle, all) ticks of one core so far."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            ticks = [int(x) for x in line.split()[1:9]]
            return ticks[3] + ticks[4], sum(ticks)
    raise RuntimeError(f"no core {core}")


def wrk(setup: Setup, seconds: float, connections: int, auth: bool) -> dict[str, float]:
    """One load run; adds how much of the time the proxy's core idled."""
    env = os.environ | ({"BENCH_KEY": KEY} if auth else {})
    argv = ["taskset", "-c", str(setup.load_core), "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
    argv += ["--timeout", "30s", "-s", str(HERE / "request.lua"), f"http://127.0.0.1:{PORT}"]
    idle, total = core_times(setup.proxy_core)
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=True)
    idle2, total2 = core_times(setup.proxy_core)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    result["rps"] = result["requests"] / (result["us"] / 1e6)
    result["idle"] = (idle2 - idle) / max(total2 - total, 1)
    return result


def rps_rounds(setup: Setup, names: list[str], args: argparse.Namespace, auth: bool) -> dict[str, list[dict[str, Any]]]:
    """Interleaved rounds; every list has one entry a round."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    upstream = str(setup.folder / "upstream.sock")
    for number in range(args.rounds):
        order = names if number % 2 == 0 else names[::-1]
        for name in order:
            with PROXIES[name](setup, auth=auth, upstream=upstream, streaming=False):
                wrk(setup, 4 if name == "litellm" else 1, 8 if name == "litellm" else args.connections, auth)
                result = wrk(setup, args.seconds, args.connections, auth)
            rounds[name].append(result)
            if args.verbose:
                print(name, {k: round(v, 3) for k, v in result.items()}, file=sys.stderr)
    return rounds


def kept(rounds: dict[str, list[dict[str, Any]]], notes: list[str], label: str) -> dict[str, list[dict[str, Any]]]:
    """Rounds in which every proxy's core was busy; LiteLLM, which waits on itself, is judged alike."""
    count = len(next(iter(rounds.values())))
    good = [i for i in range(count) if all(r[i]["idle"] <= IDLE_MAX and not r[i]["errors"] for r in rounds.values())]
    if len(good) < count:
        notes.append(f"{label}: {count - len(good)} of {count} rounds dropped (idle core or errors)")
    if not good:
        notes.append(f"{label}: no round was clean; the figures are of all rounds")
        good = list(range(count))
    return {name: [r[i] for i in good] for name, r in rounds.items()}


def sse_once(setup: Setup, name: str, binary: Path, auth: bool, rate: float, streams: int, secs: float) -> Any:
    """One open-loop run through ``name`` (``direct``: without a proxy)."""
    engine = str(setup.folder / "sse.sock")
    argv = ["taskset", "-c", str(setup.load_core), str(binary), engine]
    tail = [str(streams), f"{rate:g}", f"{secs:g}", *([KEY] if auth else [])]
    if name == "direct":
        done = subprocess.run([*argv, engine, *tail], capture_output=True, text=True)
    else:
        with PROXIES[name](setup, auth=auth, upstream=engine, streaming=True):
            done = subprocess.run([*argv, f"127.0.0.1:{PORT}", *tail], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout)


def sse_max(setup: Setup, name: str, binary: Path, auth: bool, args: argparse.Namespace) -> float:
    """The greatest rate (events/s, all streams) at which 99 % arrive and half of them within 100 ms."""
    best, rate = 0.0, 20.0
    while rate < 400:
        got = sse_once(setup, name, binary, auth, rate, args.streams, args.sse_seconds / 2)
        if args.verbose:
            print(name, rate * args.streams, got, file=sys.stderr)
        if got["seen"] < 0.99 * got["due"] or got["p50_us"] > 100_000 or got["blocked"]:
            break
        best = rate * args.streams
        rate *= args.sse_step
    return best


def sse_figures(setup: Setup, binary: Path, args: argparse.Namespace, auth: bool) -> dict[str, Any]:
    """Added p99 (the direct path's subtracted) and the greatest event rate, gateway and nginx."""
    added: dict[str, list[float]] = {"pierhead": [], "nginx": []}
    for _ in range(args.sse_rounds):
        got = {
            name: sse_once(setup, name, binary, auth, 20, args.streams, args.sse_seconds)
            for name in ("direct", "nginx", "pierhead")
        }
        if args.verbose:
            print(got, file=sys.stderr)
        for name, values in added.items():
            values.append(max(got[name]["p99_us"] - got["direct"]["p99_us"], 1.0))
    most = {name: [sse_max(setup, name, binary, auth, args) for _ in range(args.max_rounds)] for name in added}
    return {"added_p99_us": added, "max_events": most}


def median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def ratios(mine: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios."""
    return median([a / b for a, b in zip(mine, theirs, strict=True) if b])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of this run."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the proxy, one for the load")
    out: dict[str, Any] = {"machine": machine(), "quick": args.quick}
    with tempfile.TemporaryDirectory(prefix="gateway-bench-", dir="/tmp") as name:
        os.chmod(name, 0o755)  # nginx workers run as another user
        setup = Setup(Path(name), cores[0], cores[1])
        names = available(["pierhead", *[p for p in PEERS if p in args.peers]], setup.notes)
        conf = setup.render("upstream.nginx.conf")
        binary = build_generator(setup)
        argv = ["nginx", "-c", str(conf), "-p", str(setup.folder)]
        with running(argv, setup.load_core, listens(UPSTREAM_PORT)):
            for auth, suffix in ((True, ""), (False, "_noauth"))[: 1 if args.auth_only else 2]:
                rps_report(setup, names, args, auth, suffix, out)
                if binary and "nginx" in names and not args.no_sse:
                    sse_report(setup, binary, args, auth, suffix, out)
        out["notes"] = setup.notes
    return out


def rps_report(setup: Setup, names: list[str], args: argparse.Namespace, auth: bool, suffix: str, out: Any) -> None:
    rounds = rps_rounds(setup, names, args, auth)
    table: dict[str, Any] = {}
    for peer in names:
        pair = kept({n: rounds[n] for n in ("pierhead", peer)}, setup.notes, f"pierhead and {peer}{suffix}")
        if peer != "pierhead":
            mine, theirs = ([r["rps"] for r in pair[n]] for n in ("pierhead", peer))
            out[f"rps_vs_{peer}{suffix}"] = round(ratios(mine, theirs), 3)
        table[peer] = {k: round(median([r[k] for r in pair[peer]]), 2) for k in ("rps", "p50_us", "p99_us", "idle")}
    out[f"rps{suffix}"] = table


def sse_report(setup: Setup, binary: Path, args: argparse.Namespace, auth: bool, suffix: str, out: Any) -> None:
    figures = sse_figures(setup, binary, args, auth)
    added, most = figures["added_p99_us"], figures["max_events"]
    out[f"sse_added_p99_vs_nginx{suffix}"] = round(ratios(added["pierhead"], added["nginx"]), 3)
    out[f"sse_max_vs_nginx{suffix}"] = round(ratios(most["pierhead"], most["nginx"]), 3)
    out[f"sse{suffix}"] = {
        name: {"added_p99_us": round(median(added[name])), "max_events": round(median(most[name]))} for name in added
    }


def build_generator(setup: Setup) -> Path | None:
    """Compile ssegen.c; a note when there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        setup.notes.append("server-sent events are left out: no C compiler (cc)")
        return None
    binary = setup.folder / "ssegen"
    subprocess.run([compiler, "-O2", "-o", str(binary), str(HERE / "ssegen.c")], check=True)
    return binary


def machine() -> str:
    """One line about this machine."""
    model = next(
        (x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


def show(out: dict[str, Any]) -> None:
    """The table."""
    print(out["machine"])
    for suffix, title in (("", "authentication on"), ("_noauth", "no authentication")):
        if f"rps{suffix}" not in out:
            continue
        print(f"\n{title}\n{'proxy':<10}{'req/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'idle':>7}{'pierhead is':>13}")
        for name, row in out[f"rps{suffix}"].items():
            ratio = out.get(f"rps_vs_{name}{suffix}")
            line = f"{name:<10}{row['rps']:>10.0f}{row['p50_us'] / 1e3:>9.2f}{row['p99_us'] / 1e3:>9.2f}"
            print(f"{line}{row['idle']:>7.0%}" + (f"{ratio:>12.2f}x" if ratio else ""))
        for name, row in out.get(f"sse{suffix}", {}).items():
            print(f"{name:<10} events: added p99 {row['added_p99_us']} us, greatest rate {row['max_events']}/s")
        for key in ("sse_added_p99_vs_nginx", "sse_max_vs_nginx"):
            if key + suffix in out:
                print(f"{key}{suffix} {out[key + suffix]}")
    for note in out["notes"]:
        print("note:", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round without LiteLLM, under a minute")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--peers", default=",".join(PEERS), type=lambda s: s.split(","))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--sse-rounds", type=int, default=7)
    parser.add_argument("--sse-seconds", type=float, default=6)
    parser.add_argument("--sse-step", type=float, default=1.15)
    parser.add_argument("--max-rounds", type=int, default=3)
    parser.add_argument("--no-sse", action="store_true")
    parser.add_argument("--auth-only", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.sse_rounds, args.sse_seconds, args.max_rounds = 1, 1.5, 1, 1.5, 1
        args.sse_step, args.auth_only = 1.6, True
        args.peers = [p for p in args.peers if p != "litellm"]
    out = run(args)
    if args.json:
        print(json.dumps(out, indent=2))
    else:
        show(out)


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    main()
