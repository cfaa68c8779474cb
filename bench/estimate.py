"""Memory estimates against what llama.cpp really allocates, and the time to read a header.

    python bench/estimate.py [--quick] [--json] [MODEL.gguf …]

Each case starts the real engine in a child process, reads its "buffer size" log lines and compares. Without a model
the one that the tests cached is used (``make test`` fetches it).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pierhead.formats import gguf
from pierhead.formats.estimate import Estimate, estimate

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
PROBE = """
import json, os, sys
import xllamacpp as x
case = json.loads(sys.argv[1])
p = x.CommonParams()
p.model.path, p.hostnames, p.verbosity, p.fit_params = case["model"], [case["socket"]], 5, False
p.n_ctx, p.n_parallel, p.n_ubatch = case["context"] * case["parallel"], case["parallel"], case["ubatch"]
p.flash_attn_type = -1 if case.get("flash_attention", True) else 0
p.cache_type_k = getattr(x.ggml_type, "GGML_TYPE_" + case["cache_type_k"].upper())
p.cache_type_v = getattr(x.ggml_type, "GGML_TYPE_" + case["cache_type_v"].upper())
p.warmup = False
server = x.Server(p)
with open("/proc/self/status") as status:
    print("\\n" + "".join(line for line in status if line.startswith("RssAnon")), file=sys.stderr, flush=True)
sys.stdin.read()
os._exit(0)
"""


def case(context: int = 2048, parallel: int = 1, ubatch: int = 512, k: str = "f16", v: str = "f16") -> dict[str, Any]:
    return {"context": context, "parallel": parallel, "ubatch": ubatch, "cache_type_k": k, "cache_type_v": v}


QUICK = [case(512), case(2048, 2), case(4096, 1, 128, "q8_0", "q8_0")]
CASES = [
    *QUICK,
    *(case(context, parallel) for context, parallel in ((2048, 1), (8192, 1), (2048, 4), (16384, 2))),
    *(case(8192, 1, ubatch) for ubatch in (64, 1024, 2048)),
    *(case(4096, 1, 512, kind, kind) for kind in ("f32", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")),
    case(4096, 1, 512, "q8_0", "f16"),
]


def said(command: list[str]) -> str:
    """The log of a probe up to the last line of its start: a thread of the engine writes it, and would be cut short."""
    lines: list[str] = []
    missing = {"slots are idle", "RssAnon"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=-1, stderr=-2, text=True) as engine:
        late = threading.Timer(120, engine.kill)
        late.start()
        assert engine.stdout is not None
        for line in engine.stdout:
            lines.append(line)
            missing -= {word for word in missing if word in line}
            if not missing:
                break
        late.cancel()
        engine.kill()
    return "".join(lines)


def measure(model: Path, options: dict[str, Any]) -> dict[str, float]:
    """Bytes that the engine says it allocates: ``kv_cache``, ``compute``, ``repacked``, and ``anonymous`` memory."""
    with tempfile.TemporaryDirectory(prefix="pier-estimate-") as folder:
        told = json.dumps({**options, "model": str(model), "socket": f"{folder}/e.sock"})
        log = said([sys.executable, "-c", PROBE, told])
    if "compute buffer size" not in log:
        raise SystemExit(f"the engine did not load {model}:\n{log[-2000:]}")

    def total(pattern: str) -> float:
        return sum(float(found) for found in re.findall(pattern + r" buffer size = +([\d.]+) MiB", log)) * MIB

    anonymous = re.findall(r"RssAnon:\s+(\d+) kB", log)
    return {
        "kv_cache": total(r"(?:KV|RS)"),
        "compute": total(r"(?:compute|output)"),
        "repacked": total(r"REPACK model"),
        "anonymous": int(anonymous[0]) * 1024 if anonymous else 0,
    }


def compare(model: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = gguf.summary(gguf.read_file(model))
    rows: list[dict[str, Any]] = []
    for options in cases:
        guess: Estimate = estimate(found, **options)
        real = measure(model, options)
        rows.append({"model": model.name, **options, "estimate": guess, "real": real})
    return rows


def read_ms(model: Path) -> float:
    times: list[float] = []
    for _ in range(9):
        start = time.perf_counter()
        gguf.read_file(model)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def error_percent(guess: float, real: float) -> float:
    return abs(guess - real) / max(real, 1) * 100


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("model", "context × slots", "ubatch", "cache K/V", "KV", "real", "compute", "real", "other anonymous")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        guess, real = row["estimate"], row["real"]
        other = real["anonymous"] - real["kv_cache"] - real["compute"] - real["repacked"]
        numbers = (guess.kv_cache, real["kv_cache"], guess.compute, real["compute"], other)
        cells = " | ".join(f"{number / MIB:.2f}" for number in numbers)
        kinds = f"{row['cache_type_k']}/{row['cache_type_v']}"
        print(f"| {row['model'][:24]} | {row['context']} × {row['parallel']} | {row['ubatch']} | {kinds} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory estimates against the real engine (sizes in MiB).")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--quick", action="store_true", help="three cases instead of all")
    parser.add_argument("--json", action="store_true", help="one JSON object of names and numbers")
    options = parser.parse_args()
    models: list[Path] = options.models or sorted((ROOT / ".cache" / "models").glob("*/*/*.gguf"))
    if not models:
        parser.error("no model: name one, or run `make test` once to fetch SmolLM2")
    rows = [row for model in models for row in compare(model, QUICK if options.quick else CASES)]
    figures = {
        "kv_max_error_percent": max(error_percent(r["estimate"].kv_cache, r["real"]["kv_cache"]) for r in rows),
        "compute_max_error_percent": max(error_percent(r["estimate"].compute, r["real"]["compute"]) for r in rows),
        "read_file_ms": max(read_ms(model) for model in models),
        "cases": len(rows),
    }
    figures = {name: round(number, 3) for name, number in figures.items()}
    if options.json:
        print(json.dumps(figures))
        return
    show(rows)
    print()
    for name, number in figures.items():
        print(f"{name}: {number}")


if __name__ == "__main__":
    main()
