#!/usr/bin/env python3
"""Memory estimates against the truth: the peak of anonymous plus mapped weight memory after a prefill of all context.

The truth is measured on a real llama.cpp that is started as Pierhead would start it, for every model that is here, on
ONNX Runtime with batches of growing size, and read from logs for well-known models that are not
(``recorded_models.json``, with the address of each log).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx_memory
from harness import ROOT, UnixConnection, parser, report, until
from pierhead.engines.base import Plan, PlanRequest
from pierhead.engines.llamacpp import LlamaCpp
from pierhead.fleet.memory import processor_features
from pierhead.formats import gguf
from pierhead.formats.estimate import estimate
from pierhead.runtimes.base import Places, expand
from pierhead.store.model import ModelFile

MIB = 1 << 20
RECORDED = Path(__file__).with_name("recorded_models.json")
QUICK: tuple[dict[str, Any], ...] = ({"context": 512}, {"context": 1024, "parallel": 2})
CASES: tuple[dict[str, Any], ...] = (
    *QUICK,
    {"context": 4096},
    {"context": 8192},
    {"context": 2048, "parallel": 4},
    {"context": 2048, "ubatch": 128},
    {"context": 2048, "ubatch": 2048},
    {"context": 4096, "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    {"context": 2048, "cache_type_k": "f32", "cache_type_v": "f32"},
    {"context": 1024, "n_ctx_checkpoints": 0},
)


def planned(model: Path, settings: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """The plan that the fleet would make, and the model's summary."""
    summary = gguf.summary(gguf.read_file(model))
    request = PlanRequest(
        replica="estimates",
        model=model.stem,
        model_dir=model.parent,
        files=(ModelFile(model.name, model.stat().st_size, format="gguf"),),
        metadata=summary,
        settings=settings,
        cpus=len(os.sched_getaffinity(0)),
        processor=processor_features(),
    )
    return LlamaCpp().plan(request), summary


class Watch(threading.Thread):
    """Keeps the peak of a process's anonymous memory, looked at every five milliseconds."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._statm = Path(f"/proc/{pid}/statm")
        self._over = threading.Event()

    def run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._over.wait(0.005):
            with suppress(OSError, ValueError, IndexError):
                _, resident, of_files, *_ = self._statm.read_text().split()
                self.peak = max(self.peak, (int(resident) - int(of_files)) * page)

    def end(self) -> int:
        self._over.set()
        self.join()
        return self.peak


def mapped(pid: int, model: Path) -> int:
    """Bytes of the weights' file that the process has in memory."""
    found, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(model.name)
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def healthy(sock: str, engine: subprocess.Popen[bytes]) -> bool:
    if engine.poll() is not None:
        raise SystemExit(f"the engine ended with {engine.returncode}")
    with suppress(OSError):
        connection = UnixConnection(sock, 5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def prefill(sock: str, tokens: list[int]) -> None:
    """Fill one slot to its last token."""
    connection = UnixConnection(sock, 1200)
    body = {"prompt": tokens, "n_predict": 1}
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    said = reply.read(300)
    if reply.status != 200:
        raise SystemExit(f"the prefill was answered {reply.status}: {said!r}")


def truth(model: Path, plan: Plan, parallel: int) -> int:
    """Bytes at the peak, with every slot full."""
    with tempfile.TemporaryDirectory(prefix="pier-estimates-") as folder:
        sock = f"{folder}/engine.sock"
        argv, env = expand(plan.spec, Places(sys.executable, plan.spec.entry, str(model.parent), sock))
        engine = subprocess.Popen(argv, env={**os.environ, **env}, stdout=-3, stderr=-3)
        watch = Watch(engine.pid)
        watch.start()
        try:
            until(lambda: healthy(sock, engine), 120)
            prompts = [[100 + (slot * 7 + n * 13) % 1000 for n in range(plan.context - 2)] for slot in range(parallel)]
            with ThreadPoolExecutor(parallel) as pool:
                list(pool.map(prefill, [sock] * parallel, prompts))
            time.sleep(0.02)
            return watch.end() + mapped(engine.pid, model)
        finally:
            watch.end()
            engine.kill()
            engine.wait(10)


def measured(models: list[Path], quick: bool) -> list[tuple[str, str, int, int]]:
    rows: list[tuple[str, str, int, int]] = []
    for model in models:
        for case in QUICK if quick else CASES:
            plan, _ = planned(model, case)
            words = " ".join(f"{name}={value}" for name, value in case.items())
            rows.append((model.stem[:28], words, plan.memory, truth(model, plan, int(case.get("parallel", 1)))))
            print(f"  {rows[-1][0]} {words}: {off(*rows[-1][2:]):+.1%}", file=sys.stderr)
    return rows


def recorded() -> list[tuple[str, str, int, int]]:
    """Only the parts that a log prints are compared; without those there is no model to weigh them against."""
    rows: list[tuple[str, str, int, int]] = []
    for one in json.loads(RECORDED.read_text("utf-8")):
        options = dict(one["options"])
        options["processor"] = frozenset(options.get("processor", ()))
        parts = estimate(one["summary"], **options).to_dict()
        printed: dict[str, float] = one["printed_mib"]
        guess = sum(parts[name] for name in printed)
        rows.append((one["model"], ", ".join(printed), guess, round(sum(printed.values()) * MIB)))
    return rows


def off(guess: int, real: int) -> float:
    """How far a guess is off, as a share of the truth; negative when it is below."""
    return guess / real - 1


def here() -> list[Path]:
    """The GGUF files that the tests and benchmarks keep."""
    found = sorted((ROOT / ".cache" / "models").glob("*/*/*.gguf"))
    return [file for file in found if file.stat().st_size > 10 * MIB]


def main() -> int:
    """Measure, read, compare."""
    options = parser(__doc__ or "")
    options.add_argument("models", nargs="*", type=Path, help="GGUF files (default: those that the tests fetched)")
    args = options.parse_args()
    rows = measured([m.resolve() for m in args.models] or here(), args.quick)
    if not args.models:
        rows += onnx_memory.measured(args.quick, Watch)
    logs = recorded()
    errors = [off(guess, real) for *_, guess, real in (*rows, *logs)]
    figures = {
        "median_error": statistics.median(map(abs, errors)),
        "worst_underestimate": max(0.0, -min(errors)),
        "worst_overestimate": max(0.0, max(errors)),
        "measured": len(rows),
        "recorded": len(logs),
    }
    table = [
        (name, what, f"{guess / MIB:,.1f}", f"{real / MIB:,.1f}", f"{off(guess, real):+.1%}")
        for name, what, guess, real in (*rows, *logs)
    ]
    report(
        "Memory: estimated and true (MiB)",
        table,
        ("model", "case or part", "estimate", "truth", "off"),
        figures,
        args.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
