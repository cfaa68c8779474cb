"""Settings of a model through a real daemon: they persist, are shown with their origin, and hold at the next start."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pierhead.daemon.watch import watched
from pierhead.errors import UsageError
from pierhead.events import Ready

from .conftest import House

pytestmark = [pytest.mark.timeout(120), pytest.mark.model]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"set": {"contxt": 1}}, "contxt", "context"),
    ({"set": {"cache-type-k": "q3"}}, "cache-type-k", "q8_0"),
    ({"set": {"port": 1}}, "port", "Leave it out"),
    ({"set": {"engine": "lamacpp"}}, "no engine", "llamacpp"),
    ({"set": {"replicas": 100}}, "bad value 100 for 'replicas'", "a whole number from 1 to 64"),
    ({"set": {"runtime": "podman"}}, "bad value 'podman' for 'runtime'", "auto, process or docker"),
    ({"set": {"pin": "maybe"}}, "bad value 'maybe' for 'pin'", "true or false"),
    ({"set": {"keep_alive": "soon"}}, "not a time", "5m"),
    ({"unset": ["threads"]}, "sets no 'threads'", "pier settings"),
]


def pier(house: House, *args: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "pierhead.cli.main", *args]
    return subprocess.run(run, env=house.env, capture_output=True, text=True, timeout=60, check=False)


def shown(house: House, model: str = "smollm2", **query: Any) -> dict[str, tuple[Any, str]]:
    found = house.client.request("GET", f"/settings/{model}", query=query)
    return {s["name"]: (s["value"], s["origin"]) for s in found["settings"]}


def started(house: House, **settings: Any) -> dict[str, Any]:
    body = {"model": "smollm2", **({"settings": settings} if settings else {})}
    ready = [event for event in house.client.events("POST", "/replicas", body) if isinstance(event, Ready)]
    return next(r for r in house.client.get("/replicas") if r["id"] == ready[0].replica)


def test_settings_persist_are_shown_with_their_origin_and_hold_at_the_next_start(running: House) -> None:
    file = running.paths.config / "models.toml"
    before = started(running)
    file.write_text('# mine\n[models."*"]\nthreads = 2 # all\n')
    changed = pier(running, "settings", "set", "smollm2", "context=768", "keep-alive=1h", "cache-type-k=q8_0", "--json")
    assert changed.returncode == 0, changed.stderr
    assert json.loads(changed.stdout)["running"]
    text = file.read_text()
    assert "# mine" in text
    assert "threads = 2 # all" in text
    found = shown(running)
    assert found["context"] == (768, "models.toml")
    assert found["keep_alive"] == (3600.0, "models.toml")
    assert found["cpuparams.n_threads"] == (2, "models.toml")
    assert found["cache_type_k"] == ("q8_0", "models.toml")
    assert before["context"] == 1024
    (now,) = running.client.get("/replicas")
    assert now["id"] == before["id"]
    assert datetime.fromisoformat(now["expires_at"]) - datetime.now(UTC) > timedelta(minutes=50), "it holds at once"

    running.client.request("DELETE", "/replicas/smollm2")
    after = started(running)
    assert after["context"] == 768
    assert not before["expires_at"] or after["expires_at"] > before["expires_at"]
    assert shown(running)["context"] == (768, "models.toml")

    asked = started(running, context=512)
    assert asked["context"] == 512
    assert shown(running)["context"] == (512, "asked")

    printed = pier(running, "settings", "smollm2")
    assert "models.toml" in printed.stdout
    assert "768 (models.toml)" in " ".join(printed.stdout.split())
    gone = pier(running, "settings", "unset", "smollm2", "context", "cache_type_k")
    assert gone.returncode == 0, gone.stderr
    assert "models.toml" in gone.stderr
    assert "pier stop smollm2" in " ".join(gone.stderr.split())
    assert "context" not in file.read_text()


def test_a_change_that_cannot_hold_is_refused_and_nothing_is_written(running: House) -> None:
    for change, message, hint in WRONG:
        with pytest.raises(UsageError, match=message) as refused:
            running.client.request("PATCH", "/settings/smollm2", change)
        assert hint in (refused.value.hint or "")
    assert not (running.paths.config / "models.toml").exists()


def test_a_file_that_is_broken_is_told_and_the_last_good_one_holds(running: House) -> None:
    file = running.paths.config / "models.toml"
    running.client.request("PATCH", "/settings/*", {"set": {"context": "640"}})
    assert shown(running, "*") == {"context": (640, "models.toml")}

    def noticed() -> bool:
        file.write_text("[models.smollm2]\ncontxt = 1\n")
        return running.client.get("/settings/smollm2")["error"] is not None

    with watched(running.paths.config) as watch:
        assert watch.wait(noticed, 10)
    found = running.client.get("/settings/smollm2")
    assert "contxt" in found["error"]["message"]
    assert "context" in found["error"]["hint"]
    assert shown(running)["context"] == (640, "models.toml")


def test_everything_that_an_engine_does_by_itself_is_shown_when_asked_for(running: House) -> None:
    found = shown(running, all="true")
    assert found["flash_attn_type"][1] == "default"
    assert found["cpuparams.n_threads"] == (1, "config")
    assert len(found) > 100


def test_what_an_engine_does_by_itself_is_told_in_words(running: House) -> None:
    found = shown(running, all="true")
    assert found["cache_type_k"] == ("f16", "default")
    assert not [name for name in found if "cpumask" in name]
    printed = pier(running, "settings", "smollm2", "--all").stdout
    assert max(map(len, printed.splitlines())) < 400


def test_a_setting_is_taken_out_by_the_name_under_which_it_is_listed(running: House) -> None:
    for model in ("smollm2", "*"):
        running.client.request("PATCH", f"/settings/{model}", {"set": {"flash_attn": "on", "threads": 2}})
        assert shown(running)["flash_attn_type"] == ("enabled", "models.toml")
        change = {"unset": ["flash-attn-type", "cpuparams.n_threads"]}
        running.client.request("PATCH", f"/settings/{model}", change)
        assert "flash_attn_type" not in shown(running)
