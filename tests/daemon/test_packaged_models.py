"""What a model was packaged with takes effect when it runs: template, context, system prompt, sampling, LoRAs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.formats.foreign import llama_folder
from tests.package.conftest import write_lora

from pierhead.errors import UsageError
from pierhead.events import Ready
from pierhead.package import inputs
from pierhead.package.build import package
from pierhead.package.recipe import Recipe
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord, Packaged

from .conftest import House, UnixConnection

pytestmark = [pytest.mark.timeout(120), pytest.mark.model]
SHOUT = "SHOUT{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}{% endfor %}"


def made(house: House, name: str, *extras: inputs.Input, **settings: Any) -> ModelRecord:
    store = Store.open(house.paths.store)
    base = store.get("smollm2")
    recipe = Recipe(name=name, base=base, created="2026-01-01T00:00:00Z", extras=extras, packaged=Packaged(**settings))
    return package(store, recipe)


def started(house: House, model: str, **settings: Any) -> dict[str, Any]:
    body = {"model": model, **({"settings": settings} if settings else {})}
    ready = [event for event in house.client.events("POST", "/replicas", body) if isinstance(event, Ready)]
    return next(replica for replica in house.client.get("/replicas") if replica["id"] == ready[0].replica)


def engine(replica: dict[str, Any], method: str, path: str, body: Any = None) -> Any:
    """Ask the engine itself."""
    connection = UnixConnection(Path(replica["socket"]))
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body))
        return json.loads(connection.getresponse().read())


def prompt(replica: dict[str, Any], *messages: tuple[str, str]) -> str:
    """What the engine makes of a conversation."""
    said = [{"role": role, "content": content} for role, content in messages or (("user", "hello"),)]
    return engine(replica, "POST", "/apply-template", {"messages": said})["prompt"]


def test_a_packaged_template_makes_the_prompt(running: House, tmp_path: Path) -> None:
    (tmp_path / "shout.jinja").write_text(SHOUT)
    made(running, "shout", inputs.single(tmp_path / "shout.jinja", "template", name="template.jinja"))

    found = prompt(started(running, "shout"))

    assert found.startswith("SHOUT<user>HELLO")
    assert "SHOUT" not in prompt(started(running, "smollm2"))
    assert running.chat("shout")[0] == 200


def test_a_long_packaged_template_is_read_from_its_file(running: House, tmp_path: Path) -> None:
    (tmp_path / "long.jinja").write_text("{# " + "x" * 200_000 + " #}" + SHOUT)
    made(running, "long", inputs.single(tmp_path / "long.jinja", "template", name="template.jinja"))

    assert prompt(started(running, "long")).startswith("SHOUT")


def test_a_packaged_context_counts_before_the_configuration_s_and_after_what_is_asked(running: House) -> None:
    made(running, "small", context=512)

    assert started(running, "smollm2")["context"] == 1024
    assert started(running, "small")["context"] == 512
    assert started(running, "small", context=768)["context"] == 768


def test_packaged_sampling_is_what_a_request_that_says_nothing_gets(running: House) -> None:
    made(running, "cool", options={"sampling.temp": 0.25, "sampling.top_k": 7, "parallel": 2})

    replica = started(running, "cool")

    told = engine(replica, "GET", "/props")["default_generation_settings"]["params"]
    assert round(told["temperature"], 2) == 0.25
    assert told["top_k"] == 7
    assert replica["parallel"] == 2


def test_a_packaged_system_prompt_begins_a_chat_that_has_none(running: House) -> None:
    text = 'Speak like a "pirate". {{ this }} {% is %} text.\nAlways. Ünïcode too.'
    made(running, "pirate", system=text, messages=({"role": "user", "content": "Ahoy"},))

    replica = started(running, "pirate")

    first = prompt(replica)
    assert text in first
    assert first.index(text) < first.index("Ahoy") < first.index("hello")
    own = prompt(replica, ("system", "Be brief."), ("user", "hello"))
    assert "pirate" not in own
    assert "Be brief." in own


def test_a_lora_is_loaded_with_its_scale_and_changes_the_answer(running: House, tmp_path: Path, smollm2: Path) -> None:
    lora = write_lora(tmp_path / "noise.gguf", base=smollm2)
    made(running, "styled", inputs.single(lora, "lora", format="gguf", scale=0.75))

    replica = started(running, "styled")

    loaded = engine(replica, "GET", "/lora-adapters")
    assert [(Path(one["path"]).name, one["scale"]) for one in loaded] == [("noise.gguf", 0.75)]
    status, with_lora = running.chat("styled", tokens=12)
    assert status == 200
    assert with_lora["choices"][0]["message"] != running.chat("smollm2", tokens=12)[1]["choices"][0]["message"]


def test_an_engine_that_does_not_read_a_models_format_says_what_it_reads(running: House, tmp_path: Path) -> None:
    store = Store.open(running.paths.store)
    base = inputs.detect(llama_folder(tmp_path / "m"))
    package(store, Recipe(name="tensors", base=base, created="2026-01-01T00:00:00Z"))

    with pytest.raises(UsageError, match="engine llamacpp cannot serve 'tensors': it reads gguf") as refused:
        started(running, "tensors", engine="llamacpp")
    assert "weights are in safetensors" in (refused.value.hint or "")
