"""Models beside the one that is served, through real daemons: one that drafts, and LoRAs that requests name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file
from tests.package.conftest import write_lora

from pierhead.errors import NotFound
from pierhead.store.layout import Store

from .conftest import House, UnixConnection
from .test_model_settings import pier, started

pytestmark = [pytest.mark.timeout(180), pytest.mark.model]


def said(house: House, model: str = "smollm2", tokens: int = 12) -> str:
    status, answer = house.chat(model, tokens)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def figure(replica: dict[str, Any], name: str) -> float:
    """One of the engine's own figures."""
    connection = UnixConnection(Path(replica["socket"]))
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def owners(house: House) -> set[str]:
    return {owner for owners in Store.open(house.paths.store).pinned().values() for owner in owners}


def test_a_drafting_model_changes_no_word_and_its_tokens_are_accepted(running: House) -> None:
    plain = started(running, **{"kv-cache-type": "f16"})
    expected = said(running)
    replica = started(running, draft="smollm2", draft_tokens=4)
    assert said(running) == expected
    assert figure(replica, "llamacpp:spec_decode_num_accepted_tokens_total") > 0
    assert replica["memory_estimate"] > plain["memory_estimate"] + 80_000_000
    assert owners(running) == {replica["id"], f"{replica['id']}-0"}

    running.kill()
    assert "error" not in running.start()
    assert running.client.get("/replicas")[0]["id"] == replica["id"]
    assert owners(running) == {replica["id"], f"{replica['id']}-0"}
    running.client.request("DELETE", "/replicas/smollm2")
    assert owners(running) == set()

    with pytest.raises(NotFound, match="'nothere' beside it"):
        started(running, draft="nothere")


def test_a_request_chooses_an_adapter_by_the_models_name(running: House, smollm2: Path, tmp_path: Path) -> None:
    plain = said(running)
    write_lora(tmp_path / "noise.gguf", base=smollm2)
    added = pier(running, "lora", "add", "smollm2", str(tmp_path / "noise.gguf"), "--json")
    assert added.returncode == 0, added.stderr + added.stdout
    assert json.loads(added.stdout) == [
        {"name": "noise", "scale": 1.0, "model": "smollm2+noise", "loaded": False, "error": ""},
    ]
    status, refused = running.chat("smollm2+noise")
    assert status == 409, refused
    assert "pier stop smollm2" in refused["error"]["hint"]

    running.client.request("DELETE", "/replicas/smollm2")
    changed = said(running, "smollm2+noise")
    assert changed != plain
    assert said(running) == plain, "requests for the model itself must not see the adapter"
    assert said(running, "smollm2:latest+noise") == changed
    models = {m["id"]: m for m in get(running, "/v1/models")["data"]}
    assert models["smollm2+noise"]["parent"] == "smollm2"

    assert "noise" not in models, "an adapter alone answers nothing"
    own = pier(running, "run", "smollm2+noise", "Count from one to one hundred.", "--temperature", "0", "--json")
    assert json.loads(own.stdout)["content"].startswith(changed[:12]), own.stderr
    few = ("--requests", "1", "--concurrency", "1", "--rounds", "1", "--prompt-tokens", "8", "--output-tokens", "2")
    measured = pier(running, "bench", "smollm2+noise", *few, "--json")
    assert json.loads(measured.stdout)["results"][0]["failed"] == 0, measured.stderr
    for name, words in (("smollm2+none", "'smollm2' has no adapter 'none'"), ("noise", "`pier run MODEL+noise`")):
        refused_run = pier(running, "run", name, "Hi")
        assert words in refused_run.stderr
        assert refused_run.returncode in (2, 3)

    replica = running.client.get("/replicas")[0]["id"]
    assert pier(running, "lora", "add", "smollm2", "noise=0").returncode == 0
    assert said(running, "smollm2+noise") == plain, "a scale of 0 must change nothing, at once"
    assert "loaded" in pier(running, "lora", "list", "smollm2").stdout
    assert pier(running, "lora", "rm", "smollm2", "noise").returncode == 0
    assert running.chat("smollm2+noise")[0] == 404
    assert running.client.get("/replicas")[0]["id"] == replica

    held = pier(running, "rm", "noise")
    assert "`pier stop smollm2` first" in held.stderr, held.stderr
    assert pier(running, "rm", "--force", "noise").returncode == 0
    assert running.client.get("/replicas") == []


def test_a_client_that_asks_for_the_cache_gets_no_answer_of_another_adapter(
    running: House, smollm2: Path, tmp_path: Path
) -> None:
    """llama.cpp does not note which LoRAs a prompt in its cache was worked out with."""
    write_lora(tmp_path / "noise.gguf", base=smollm2)
    assert pier(running, "lora", "add", "smollm2", str(tmp_path / "noise.gguf")).returncode == 0
    status, plain = running.chat("smollm2", 12)
    assert status == 200, plain
    words = [{"role": "user", "content": "Tell me about the sea, and about the ships that sail on it."}]
    cached: dict[str, Any] = {"cache_prompt": True, "messages": words, "max_tokens": 12, "temperature": 0}

    def answer(model: str, **more: Any) -> str:
        connection = UnixConnection(running.paths.gateway_socket)
        with contextlib.closing(connection):
            body = json.dumps({"model": model, **cached, **more})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]

    alone = answer("smollm2", cache_prompt=False)
    adapted = answer("smollm2+noise", cache_prompt=False)
    assert alone != adapted
    for _ in range(2):
        assert answer("smollm2") == alone
        assert answer("smollm2+noise") == adapted
    assert answer("smollm2+noise", lora=[]) == adapted, "which adapter counts is the name's matter"


def test_what_is_no_adapter_or_of_another_family_is_refused(running: House, tmp_path: Path) -> None:
    write_lora(tmp_path / "other.gguf", "gemma3")
    refused = pier(running, "lora", "add", "smollm2", str(tmp_path / "other.gguf"))
    assert refused.returncode == 2
    assert "is a LoRA for gemma3" in refused.stderr
    assert "no LoRA adapter" in pier(running, "lora", "add", "smollm2", "smollm2").stderr
    folder = tmp_path / "peft"
    folder.mkdir()
    assert "adapter_config.json" in pier(running, "lora", "add", "smollm2", f"{folder}/").stderr
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    save_file({"x": numpy.zeros((4, 4), numpy.float32)}, folder / "adapter_model.safetensors")
    assert "cannot use 'peft': it is in safetensors" in pier(running, "lora", "add", "smollm2", f"{folder}/").stderr
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "r": 4}')
    assert "not that of a LoRA" in pier(running, "lora", "add", "smollm2", f"{folder}/").stderr
    (tmp_path / "text.gguf").write_text("no weights")
    assert pier(running, "lora", "add", "smollm2", str(tmp_path / "text.gguf")).returncode == 5
    assert not (running.paths.config / "models.toml").exists()


def get(house: House, path: str) -> Any:
    connection = UnixConnection(house.paths.gateway_socket)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())


def test_a_smaller_cache_needs_less_memory(running: House) -> None:
    running.client.request("PATCH", "/settings/smollm2", {"set": {"kv_cache_type": "q8_0", "context": 4096}})
    small = started(running)
    assert said(running)
    running.client.request("DELETE", "/replicas/smollm2")
    running.client.request("PATCH", "/settings/smollm2", {"set": {"kv_cache_type": "f16"}})
    assert small["memory_estimate"] < started(running)["memory_estimate"] - 30_000_000
