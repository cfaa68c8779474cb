"""The Grafana dashboard that ships: every query of it, against a real Prometheus that scrapes a real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pierhead.gateway import link

SHIPPED = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((SHIPPED / "pierhead.json").read_text())
PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="the program prometheus is not installed")
WORDS = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}


def queries() -> list[tuple[str, str]]:
    """(panel, query) with the dashboard's variables filled in."""
    found: list[tuple[str, str]] = []
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "10s").replace("$model", ".*").replace("$key", ".*")
            found.append((f"{panel['title']} {target['refId']}", text))
    return found


async def answer(call) -> None:
    if b"GET /metrics" in call.head:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n")
    elif b"boom" in call.body:
        await call.json({"error": {"message": "it broke"}}, 500)
    elif b'"stream": true' in call.body:
        await call.sse()
        for _ in range(3):
            await call.event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
        await call.event({"usage": WORDS, "choices": []})
        await call.event(b"[DONE]")
        await call.end()
    else:
        await call.json({"choices": [], "usage": WORDS})


def test_the_dashboard_is_one_that_grafana_can_load():
    assert DASHBOARD["uid"] == "pierhead"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"__rate_interval", "model", "key"}
    assert len(queries()) > 25


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """A real one, scraping ``target`` each second; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "prometheus.yml"
    config.write_text(
        f"scrape_configs: [{{job_name: p, scrape_interval: 1s, static_configs: [{{targets: ['{target}']}}]}}]"
    )
    assert PROMETHEUS is not None
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def ask(url: str, query: str) -> list[float]:
    """The values of an instant query; [] while there are none, or while the server starts."""
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=10
        ) as got:
            answered = json.load(got)
    except OSError as exc:
        if isinstance(exc, urllib.error.HTTPError) and exc.code == 400:
            raise AssertionError(f"{query}: {exc.read().decode()}") from exc
        return []
    return [float(item["value"][1]) for item in answered["data"]["result"]]


@needs_prometheus
async def test_no_panel_is_empty_after_traffic(gate, new_engine, tmp_path, chat):
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    missing = dict(queries())
    with prometheus(tmp_path, f"127.0.0.1:{gate.port}") as url:
        async with asyncio.timeout(60):
            while missing:
                await gate.ask("POST", "/v1/chat/completions", chat)
                await gate.ask("POST", "/v1/chat/completions", chat | {"stream": True})
                await gate.ask("POST", "/v1/chat/completions", chat | {"user": "boom"})
                await gate.ask("GET", "/v1/models")
                name, query = next(iter(missing.items()))
                values = await asyncio.to_thread(ask, url, query)
                if values and not any(map(math.isnan, values)):
                    del missing[name]
    assert not missing


@pytest.mark.skipif(PROMTOOL is None, reason="the program promtool is not installed")
async def test_promtool_finds_nothing_wrong_with_the_metrics(gate, new_engine, chat):
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    for extra in ({}, {"stream": True}, {"user": "boom"}):
        await gate.ask("POST", "/v1/chat/completions", chat | extra)
    text = (await gate.ask("GET", "/metrics")).body
    assert PROMTOOL is not None
    command = [PROMTOOL, "check", "metrics"]
    done = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
