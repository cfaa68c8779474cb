#!/usr/bin/env python3
"""24 models under a memory budget of 3 GiB and random load: nothing is killed for memory, and nothing is refused.

A real daemon with real engines behind the real gateway. The models share the weights of SmolLM2 (and of gemma-3-270m
where the tests fetched it) and differ in context and slots, so that they have digests, claims and processes of their
own. Where this user may make control groups, daemon, gateway and all engines are in one whose limit is the budget: the
kernel would end what goes beyond it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT, UnixConnection, arguments, report
from pierhead.daemon.client import Client
from pierhead.paths import Paths, resolve

MODELS = 24
BUDGET = 3 << 30
CLIENTS = 6
CONTEXTS = (512, 1024, 2048, 3072, 4096, 6144)
GROUPS = Path("/sys/fs/cgroup/memory")
WORDS = "tide quay crane rope anchor cargo pilot buoy harbour mast ledger fog lantern keel barge signal".split()  # noqa: SIM905


@contextlib.contextmanager
def limited() -> Generator[list[str]]:
    """A command that runs what follows under the kernel's limit; empty where that cannot be had."""
    group = GROUPS / f"pierhead-crowd-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(BUDGET))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield []
        return
    # In a mount namespace of its own the limited group is the root, so that the engines' groups are below it.
    enter = f'echo $$ > {group}/cgroup.procs && mount --bind {group} {GROUPS} && exec "$@"'
    try:
        yield ["unshare", "-m", "sh", "-c", enter, "sh"]
    finally:
        for folder in sorted((f.parent for f in group.rglob("cgroup.procs")), key=lambda f: -len(f.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()


def kills() -> int:
    """How often the kernel has killed anything on this machine for memory."""
    lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(lines.get("oom_kill", 0))


@dataclass
class Seen:
    """What came of the load, and which replicas there were."""

    answered: Counter[str] = field(default_factory=Counter[str])
    failures: list[str] = field(default_factory=list[str])
    slowest: float = 0.0
    replicas: set[str] = field(default_factory=set[str])
    most: int = 0  # bytes claimed at once, what leaves included
    lock: threading.Lock = field(default_factory=threading.Lock)


def package(pier: list[str], env: dict[str, str]) -> list[str]:
    """Put the models into the store; their names."""

    def run(*words: str) -> None:
        subprocess.run([*pier, *words], env=env, check=True, stdout=-3, stderr=-3)

    bases: list[str] = []
    for base, file in (("smollm2", "*smollm2*/*/*.gguf"), ("gemma3", "*gemma3*/*/*.gguf")):
        found = next(iter((ROOT / ".cache" / "models").glob(file)), None)
        if found is not None:
            run("package", str(found), base)
            bases.append(base)
    names: list[str] = []
    for n in range(MODELS):
        name, context = f"crowd-{n}", CONTEXTS[n % len(CONTEXTS)] + 256 * (n // len(CONTEXTS))
        base = bases[0] if n % 4 else bases[-1]
        run("package", "--from", base, "--context-size", str(context), "--option", f"parallel={1 + n % 2}", name)
        names.append(name)
    return names


def client(paths: Paths, names: list[str], seed: int, until: float, seen: Seen) -> None:
    """Ask one random question after the other."""
    dice = random.Random(seed)
    while time.monotonic() < until:
        # a few models are popular, and everybody gets a turn
        name = names[min(int(dice.expovariate(1 / 5)), len(names) - 1)] if dice.random() < 0.6 else dice.choice(names)
        text = " ".join(dice.choices(WORDS, k=dice.randint(3, 60)))
        body: dict[str, Any] = {"model": name, "max_tokens": dice.randint(1, 12), "seed": seed}
        path = "/v1/completions" if dice.random() < 0.3 else "/v1/chat/completions"
        body |= {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
        began = time.monotonic()
        said = ask(paths, path, body)
        took = time.monotonic() - began
        with seen.lock:
            seen.slowest = max(seen.slowest, took)
            if said:
                seen.failures.append(f"{name} after {took:.1f} s: {said}")
            else:
                seen.answered[name] += 1


def ask(paths: Paths, url: str, body: dict[str, Any]) -> str:
    """One request; what was wrong with its answer, or nothing."""
    connection = UnixConnection(str(paths.gateway_socket), 900)
    try:
        connection.request("POST", url, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        data = reply.read()
        return "" if reply.status == 200 and b"choices" in data else f"{reply.status} {data[:300]!r}"
    except OSError as exc:
        return repr(exc)
    finally:
        connection.close()


def watch(paths: Paths, until: float, seen: Seen) -> None:
    """Look at what runs, often enough to see every replica."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):
            connection = UnixConnection(str(paths.control_socket), 10)
            connection.request("GET", "/api/v1/replicas")
            found: list[dict[str, Any]] = json.loads(connection.getresponse().read())
            connection.close()
            started = [r for r in found if r["state"] != "created"]
            seen.replicas |= {r["id"] for r in started if r["state"] in ("ready", "draining", "stopping")}
            held = [r for r in started if r["state"] in ("ready", "loading", "draining", "stopping")]
            seen.most = max(seen.most, sum(max(r["memory_estimate"], r["memory_peak"]) for r in held))
        time.sleep(0.1)


@contextlib.contextmanager
def installation(wrap: list[str]) -> Generator[tuple[Paths, list[str], Path]]:
    """A daemon of its own with the models; its folders, the models' names, and its log."""
    home = tempfile.mkdtemp(prefix="pier-crowd-")
    log = Path(home) / "daemon.log"
    env = {
        **os.environ,
        "PIERHEAD_HOME": home,
        "PIERHEAD_RUNTIME__DEFAULT": "process",
        "PIERHEAD_FLEET__MEMORY_BUDGET": str(BUDGET),
        "PIERHEAD_FLEET__MEMORY_WAIT": "600",
        "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0",
    }
    pier = [sys.executable, "-m", "pierhead.cli.main"]
    paths = resolve(env)
    names = package(pier, env)
    with log.open("wb") as out:
        daemon = subprocess.Popen([*wrap, *pier, "serve"], env=env, stdout=out, stderr=out)
    try:
        Client(paths).wait_ready(60)
        yield paths, names, log
    finally:
        daemon.terminate()
        daemon.wait(120)
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    """Load it, count, say what came of it."""
    args = arguments(__doc__ or "")
    seconds = 40.0 if args.quick else 600.0
    seen, before = Seen(), kills()
    with limited() as wrap, installation(wrap) as (paths, names, log):
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=client, args=(paths, names, n, until, seen)) for n in range(CLIENTS)]
        threads.append(threading.Thread(target=watch, args=(paths, until, seen)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        running = {r["id"] for r in Client(paths).get("/api/v1/replicas")}
        told = log.read_text("utf-8", "replace")
    for failure in seen.failures[:10]:
        print(f"  {failure}", file=sys.stderr)
    for line in [x for x in told.splitlines() if "more memory" in x or "ERROR" in x][:10]:
        print(f"  daemon: {line}", file=sys.stderr)
    figures = {
        "oom_kills": kills() - before,
        "failed": len(seen.failures),
        "completions": seen.answered.total(),
        "evictions": len(seen.replicas - running),
        "models_answered": len(seen.answered),
        "most_claimed_mib": seen.most / (1 << 20),
        "slowest_s": seen.slowest,
        "kernel_limit": int(bool(wrap)),
    }
    rows = [
        (name, f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}") for name, value in figures.items()
    ]
    report(f"{MODELS} models in {BUDGET >> 30} GiB for {seconds:.0f} s", rows, ("figure", "value"), figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
