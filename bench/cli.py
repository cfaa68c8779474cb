#!/usr/bin/env python3
"""How long the command itself takes: ``pier --help`` and ``pier ps``, warm, whole processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import arguments, report
from pierhead.daemon.client import Client
from pierhead.paths import resolve


def measure(command: list[str], env: dict[str, str], rounds: int) -> list[float]:
    """Milliseconds of ``rounds`` runs after three to warm up."""
    times: list[float] = []
    for turn in range(rounds + 3):
        began = time.perf_counter()
        subprocess.run(command, env=env, check=True, capture_output=True)
        if turn >= 3:
            times.append((time.perf_counter() - began) * 1000)
    return times


def main() -> int:
    """Medians of 20 runs (5 with --quick), with a daemon running."""
    args = arguments(__doc__ or "")
    rounds = 5 if args.quick else 20
    pier = str(Path(sys.executable).parent / "pier")
    with tempfile.TemporaryDirectory(prefix="pier-") as home:
        env = {**os.environ, "PIERHEAD_HOME": home, "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0"}
        os.environ.update(env)
        client = Client(resolve(env))
        client.ensure_daemon()
        try:
            found = {
                "python": measure([sys.executable, "-c", "pass"], env, rounds),
                "help": measure([pier, "--help"], env, rounds),
                "ps": measure([pier, "ps"], env, rounds),
            }
        finally:
            client.shutdown("stop")
    rows = [(n, f"{min(v):.0f}", f"{statistics.median(v):.0f}", f"{max(v):.0f}") for n, v in found.items()]
    figures = {f"{name}_ms": statistics.median(v) for name, v in found.items()}
    report(f"The command, {rounds} runs", rows, ("command", "min ms", "median ms", "max ms"), figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
