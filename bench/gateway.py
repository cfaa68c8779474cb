"""Gateway against nginx, HAProxy, Caddy and LiteLLM: requests per second, and server-sent events open-loop.

Each proxy runs alone, pinned to one core; the load generator and everyone's upstream (nginx with a canned 300-byte
completion on a unix socket) share the other. Rounds are interleaved; a ratio is the median of the rounds' ratios; a
round in which the proxy's core idled over 10 % does not count. ``--quick`` shows the shape in under a minute.

``--full`` turns everything on in Pierhead that an ordinary request can meet: a key with limits per minute, concurrency
and budgets in tokens and money, admission by slots, the usage journal, metrics. It adds ``added_p50_vs_nginx``: open
loop, requests at ``--rate`` a second, the same for both proxies and for the direct path to the upstream, alternated;
the median of (p50 - direct p50), Pierhead's over nginx's. ``cpu_us`` is a proxy's processor time for a request.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from gateway_peers import (
    HERE,
    KEY,
    PEERS,
    PORT,
    PROXIES,
    UPSTREAM_PORT,
    Setup,
    available,
    compiled_gateway,
    listens,
    running,
)
from harness import machine

IDLE_MAX = 0.10
SSE = ("sse_added_p99_vs_nginx", "sse_max_vs_nginx")
FIGURES = ("rps", "p50_us", "p99_us", "idle", "cpu_us")


def core_times(core: int) -> tuple[int, int]:
    """(idle, all) ticks of one core so far."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            ticks = [int(x) for x in line.split()[1:9]]
            return ticks[3] + ticks[4], sum(ticks)
    raise RuntimeError(f"no core {core}")


def used(pid: int) -> float:
    """Processor seconds of a proxy and its workers so far."""
    proxy = psutil.Process(pid)
    times = [one.cpu_times() for one in (proxy, *proxy.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def wrk(setup: Setup, seconds: float, connections: int, auth: bool, pid: int) -> dict[str, float]:
    """One load run; adds how much of the time the proxy's core idled, and the proxy's processor time for a request."""
    env = os.environ | ({"BENCH_KEY": KEY} if auth else {})
    argv = ["taskset", "-c", str(setup.load_core), "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
    argv += ["--timeout", "30s", "-s", str(HERE / "request.lua"), f"http://127.0.0.1:{PORT}"]
    idle, total = core_times(setup.proxy_core)
    before = used(pid)
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=True)
    idle2, total2 = core_times(setup.proxy_core)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    result["cpu_us"] = (used(pid) - before) / max(result["requests"], 1) * 1e6
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
            with PROXIES[name](setup, auth=auth, upstream=upstream, streaming=False) as proxy:
                slow = name == "litellm"
                wrk(setup, min(4, args.seconds) if slow else 1, 8 if slow else args.connections, auth, proxy.pid)
                result = wrk(setup, args.seconds, args.connections, auth, proxy.pid)
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


def paced(setup: Setup, name: str, binary: Path, auth: bool, args: argparse.Namespace) -> dict[str, float]:
    """One open-loop run of whole requests through ``name`` (``direct``: without a proxy)."""
    upstream = str(setup.folder / "upstream.sock")
    argv = ["taskset", "-c", str(setup.load_core), str(binary)]
    tail = [str(args.paced_connections), f"{args.rate:g}", f"{args.seconds:g}", *([KEY] if auth else [])]
    if name == "direct":
        done = subprocess.run([*argv, upstream, *tail], capture_output=True, text=True)
    else:
        with PROXIES[name](setup, auth=auth, upstream=upstream, streaming=False):
            done = subprocess.run([*argv, f"127.0.0.1:{PORT}", *tail], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout)


def added_report(setup: Setup, args: argparse.Namespace, auth: bool, suffix: str, out: dict[str, Any]) -> None:
    """The latency that each proxy adds to the direct path at a moderate rate."""
    binary = compiled(setup, "reqgen")
    if binary is None:
        return
    added: dict[str, list[float]] = {"pierhead": [], "nginx": []}
    order = ("direct", "nginx", "pierhead")
    for number in range(args.rounds):
        got = {name: paced(setup, name, binary, auth, args) for name in (order if number % 2 == 0 else order[::-1])}
        if args.verbose:
            print(got, file=sys.stderr)
        if any(g["failed"] or g["seen"] < 0.99 * g["due"] for g in got.values()):
            setup.notes.append(f"added latency{suffix}: a round dropped, its rate was not reached")
            continue
        for name, values in added.items():
            values.append(max(got[name]["p50_us"] - got["direct"]["p50_us"], 1.0))
    for name, values in added.items():
        out[f"added_p50_us_{name}{suffix}"] = median(values)
    if median(added["nginx"]):
        out[f"added_p50_vs_nginx{suffix}"] = round(median(added["pierhead"]) / median(added["nginx"]), 3)


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
    order = ("direct", "nginx", "pierhead")
    for number in range(args.sse_rounds):
        got = {
            name: sse_once(setup, name, binary, auth, 20, args.streams, args.sse_seconds)
            for name in (order if number % 2 == 0 else order[::-1])
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
        setup = Setup(Path(name), cores[0], cores[1], full=args.full)
        if not args.interpreted:
            setup.compiled = compiled_gateway(setup.notes)
        out["compiled"] = int(bool(setup.compiled))
        names = available(["pierhead", *[p for p in PEERS if p in args.peers]], setup.notes)
        conf = setup.render("upstream.nginx.conf")
        binary = compiled(setup, "ssegen") if not args.no_sse else None
        argv = ["nginx", "-c", str(conf), "-p", str(setup.folder)]
        with running(argv, setup.load_core, listens(UPSTREAM_PORT)):
            for auth, suffix in ((True, ""), (False, "_noauth"))[: 1 if args.auth_only else 2]:
                rps_report(setup, names, args, auth, suffix, out)
                if args.full and "nginx" in names:
                    added_report(setup, args, auth, suffix, out)
                if binary and "nginx" in names:
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
        table[peer] = {k: round(median([r[k] for r in pair[peer]]), 2) for k in FIGURES}
    out[f"rps{suffix}"] = table


def sse_report(setup: Setup, binary: Path, args: argparse.Namespace, auth: bool, suffix: str, out: Any) -> None:
    figures = sse_figures(setup, binary, args, auth)
    added, most = figures["added_p99_us"], figures["max_events"]
    # A stall of the machine strikes one run or another: the rounds are not pairs, so the medians are compared.
    out[f"sse_added_p99_vs_nginx{suffix}"] = round(median(added["pierhead"]) / median(added["nginx"]), 3)
    out[f"sse_max_vs_nginx{suffix}"] = round(ratios(most["pierhead"], most["nginx"]), 3)
    out[f"sse{suffix}"] = {
        name: {"added_p99_us": round(median(added[name])), "max_events": round(median(most[name]))} for name in added
    }


def compiled(setup: Setup, name: str) -> Path | None:
    """Compile a load generator; a note when there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        setup.notes.append(f"what {name} measures is left out: no C compiler (cc)")
        return None
    binary = setup.folder / name
    subprocess.run([compiler, "-O2", "-o", str(binary), str(HERE / f"{name}.c")], check=True)
    return binary


def flat(out: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Name → number: nested names are joined with an underscore, words are left out."""
    found: dict[str, float] = {}
    for name, value in out.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def show(out: dict[str, Any]) -> None:
    """The table."""
    print(f"{out['machine']}; Pierhead is {'compiled' if out['compiled'] else 'interpreted'}")
    for suffix, title in (("", "authentication on"), ("_noauth", "no authentication")):
        if f"rps{suffix}" not in out:
            continue
        head = f"{'proxy':<10}{'req/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'idle':>7}{'cpu us':>8}{'pierhead is':>13}"
        print(f"\n{title}\n{head}")
        for name, row in out[f"rps{suffix}"].items():
            ratio = out.get(f"rps_vs_{name}{suffix}")
            line = f"{name:<10}{row['rps']:>10.0f}{row['p50_us'] / 1e3:>9.2f}{row['p99_us'] / 1e3:>9.2f}"
            print(f"{line}{row['idle']:>7.0%}{row['cpu_us']:>8.1f}" + (f"{ratio:>12.2f}x" if ratio else ""))
        for name, row in out.get(f"sse{suffix}", {}).items():
            print(f"{name:<10} events: added p99 {row['added_p99_us']} us, greatest rate {row['max_events']}/s")
        for key in ("added_p50_us_pierhead", "added_p50_us_nginx", "added_p50_vs_nginx", *SSE):
            if key + suffix in out:
                print(f"{key}{suffix} {out[key + suffix]}")
    for note in out["notes"]:
        print("note:", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round of each, under a minute")
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
    parser.add_argument("--interpreted", action="store_true", help="Pierhead as its sources are, not compiled")
    parser.add_argument("--full", action="store_true", help="keys with limits and budgets, slots and the journal on")
    parser.add_argument("--rate", type=float, default=4000, help="requests/s of the added latency")
    parser.add_argument("--paced-connections", type=int, default=32)
    parser.add_argument("--no-sse", action="store_true")
    parser.add_argument("--auth-only", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.sse_rounds, args.sse_seconds, args.max_rounds = 1, 1, 1, 1.5, 1
        args.sse_step, args.auth_only = 4.0, True
    out = run(args)
    if args.json:
        print(json.dumps(flat(out)))
    else:
        show(out)


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    main()
