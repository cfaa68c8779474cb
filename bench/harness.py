"""What the benchmarks share: the command line, the machine's description, the table, requests over a unix socket."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def parser(about: str) -> argparse.ArgumentParser:
    """``--quick`` (under a minute) and ``--json`` (flat: name → number), as every script here has them."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; under a minute")
    parser.add_argument("--json", action="store_true", help="print only a flat JSON object of figures")
    return parser


def arguments(about: str) -> argparse.Namespace:
    """What ``parser`` makes of the command line."""
    return parser(about).parse_args()


def machine() -> str:
    """One line that describes this machine."""
    model = next(
        (x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x),
        platform.processor(),
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{model}, {cores} cores, {pages / 2**30:.0f} GiB, {system}"


def report(
    title: str, rows: Sequence[tuple[str, ...]], head: Sequence[str], figures: dict[str, float], as_json: bool
) -> None:
    """Print the table and the figures, or only the figures as JSON."""
    if as_json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
        return
    console = Console(width=110)
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("  ".join(f"{k}={v:.4g}" for k, v in figures.items()), highlight=False)
    console.print(f"[dim]{machine()}; {time.strftime('%Y-%m-%d')}[/dim]", highlight=False)


class UnixConnection(http.client.HTTPConnection):
    """HTTP to a unix socket."""

    def __init__(self, path: str, timeout: float = 120.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def post(path: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, read JSON."""
    connection = UnixConnection(path)
    connection.request("POST", url, json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    if reply.status != 200:
        raise SystemExit(f"{url} answered {reply.status}: {data[:300]!r}")
    return json.loads(data)


def deltas(path: str, body: dict[str, Any]) -> Iterator[str]:
    """The non-empty content deltas of a streamed chat completion."""
    connection = UnixConnection(path)
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(f"chat answered {reply.status}: {reply.read(300)!r}")
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(f"chat failed: {event['error']}")
                text = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if text:
                    yield text
    finally:
        connection.close()


def until(ready: Callable[[], bool], timeout: float, every: float = 0.002) -> None:
    """Probe ``ready`` every two milliseconds until it holds; SystemExit after ``timeout`` seconds."""
    deadline = time.perf_counter() + timeout
    while not ready():
        if time.perf_counter() > deadline:
            raise SystemExit("a deadline passed while waiting")
        time.sleep(every)


def interval(values: Sequence[float], rounds: int = 2000) -> tuple[float, float, float]:
    """The median with its 95% bootstrap interval."""
    dice = random.Random(1)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(rounds))
    return statistics.median(values), medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]
