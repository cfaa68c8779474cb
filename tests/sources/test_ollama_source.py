"""Models from Ollama's registry: what its layers become, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from pierhead import events
from pierhead.errors import AccessDenied, CorruptData, NotFound, UsageError

from .golden_ollama import TYPE, OllamaModel, OllamaRegistry, digest, ollama_registry
from .servers import Puller, make_gguf

pytestmark = pytest.mark.timeout(60)
WEIGHTS = make_gguf(seed=11)
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
PARAMS = {
    "num_ctx": 4096,
    "temperature": 0.6,
    "top_k": 20,
    "stop": ["<|im_end|>"],
    "num_gpu": 99,
    "repeat_penalty": 1,
    "later": {"x": 1},
}


@pytest.fixture
async def registry() -> AsyncGenerator[OllamaRegistry]:
    async with ollama_registry() as found:
        yield found


def full(**metadata: Any) -> OllamaModel:
    """A model with every kind of layer."""
    return OllamaModel(
        [
            ("model", make_gguf(seed=11, **metadata)),
            ("projector", make_gguf(size=2000, seed=12, **{"general.architecture": "clip"})),
            ("adapter", make_gguf(size=2000, seed=13)),
            ("adapter", make_gguf(size=2000, seed=14)),
            ("template", CHATML.encode()),
            ("system", b"Be brief."),
            ("params", json.dumps(PARAMS).encode()),
            ("messages", b'[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]'),
            ("license", b"Apache License"),
            ("license", b"Terms of use"),
        ]
    )


def notes(puller: Puller) -> str:
    return "\n".join(e.message for e in puller.events if isinstance(e, events.Note))


async def test_every_layer_finds_its_place_and_keeps_its_digest(registry: OllamaRegistry, puller: Puller) -> None:
    model = registry.models["library/tiny:1m"] = full()
    record = await puller(f"ollama://{registry.base}/library/tiny:1m")
    assert record.name == f"{registry.base}/library/tiny:1m"
    assert {f.name: f.role for f in record.files} == {
        "model.gguf": "weights",
        "mmproj.gguf": "mmproj",
        "adapter.gguf": "lora",
        "adapter-2.gguf": "lora",
        "LICENSE": "license",
        "LICENSE-2": "license",
        "template.gotmpl": "other",
        "template.jinja": "template",
    }
    kept = {f.digest for f in record.files}
    assert {digest(data) for kind, data in model.layers if kind not in ("system", "params", "messages")} <= kept
    assert puller.store.verify(record.name) == []
    assert record.annotations["org.opencontainers.image.revision"] == digest(model.manifest)
    assert record.source == f"ollama://{registry.base}/library/tiny:1m"
    assert json.loads(record.annotations["ai.pierhead.settings"]) == {
        "context": 4096,
        "options": {
            "sampling.temp": 0.6,
            "sampling.top_k": 20,
            "antiprompt": ["<|im_end|>"],
            "sampling.penalty_repeat": 1.0,
        },
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    }
    assert record.packaged.context == 4096
    assert record.packaged.system == "Be brief."
    assert "later, num_gpu" in notes(puller)
    again = await puller(f"ollama://{registry.base}/library/tiny:1m")
    assert again.digest == record.digest, "the same model is not committed twice"


async def test_the_weights_own_chat_template_comes_before_ollamas(registry: OllamaRegistry, puller: Puller) -> None:
    registry.models["library/tiny:latest"] = full(**{"tokenizer.chat_template": "{{ messages }}"})
    record = await puller(f"ollama://{registry.base}/library/tiny")
    assert "template.jinja" not in {f.name for f in record.files}
    assert "template.gotmpl" in {f.name for f in record.files}
    assert record.metadata["chat_template"] == "{{ messages }}"
    assert "template" not in notes(puller)


async def test_a_template_that_cannot_be_carried_over_is_kept_and_said(
    registry: OllamaRegistry, puller: Puller
) -> None:
    registry.models["library/tiny:latest"] = OllamaModel(
        [("model", WEIGHTS), ("template", b"{{ .Tools }}{{ .Prompt }}")]
    )
    record = await puller(f"ollama://{registry.base}/library/tiny")
    assert {f.name for f in record.files} == {"model.gguf", "template.gotmpl"}
    assert "no Jinja chat template" in notes(puller)


async def test_blobs_come_by_ranges_from_storage_that_sees_no_token(registry: OllamaRegistry, puller: Puller) -> None:
    registry.token = "t0ken"
    registry.models["library/tiny:latest"] = full()
    await puller(f"ollama://{registry.base}/library/tiny")
    assert all("Authorization" not in r.headers for r in registry.stored)
    assert any(r.headers.get("Range", "").startswith("bytes=0-") for r in registry.stored)


async def test_a_look_fetches_only_the_header(registry: OllamaRegistry, puller: Puller) -> None:
    registry.models["library/tiny:latest"] = OllamaModel([("model", make_gguf(size=5_000_000))])
    seen = await puller.inspect(f"ollama://{registry.base}/library/tiny")
    assert seen["metadata"]["architecture"] == "llama"
    assert seen["files"][0]["name"] == "model.gguf"
    assert sum(int(r.headers["Range"].split("-")[1]) for r in registry.stored if "Range" in r.headers) < 2_000_000


async def test_a_model_that_is_not_there_is_said_in_one_sentence(registry: OllamaRegistry, puller: Puller) -> None:
    with pytest.raises(NotFound, match=r"has no model '.*library/none:latest'"):
        await puller(f"ollama://{registry.base}/library/none")


async def test_a_private_model_says_how_to_come_by_it(registry: OllamaRegistry, puller: Puller) -> None:
    registry.models["me/own:latest"] = full()
    registry.token, registry.closed = "t0ken", True
    with pytest.raises(AccessDenied) as caught:
        await puller(f"ollama://{registry.base}/me/own")
    assert "ollama pull" in (caught.value.hint or "")


# --- what cannot be used ----------------------------------------------------------------------------------------------


def _tensors(document: dict[str, Any]) -> None:
    for number, layer in enumerate(document["layers"]):
        layer |= {"mediaType": TYPE + "tensor", "name": f"model.layers.{number}.weight"}


def _type(kind: str) -> Any:
    return lambda document: document["layers"][0].update(mediaType=kind)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (OllamaModel([("model", WEIGHTS)], spoil=_tensors), "tensor by tensor"),
        (OllamaModel([("model", WEIGHTS)], {"model_format": "safetensors"}), "stored as safetensors"),
        (OllamaModel([("license", b"x")], {"remote_host": "https://ollama.com:443"}), "cloud"),
        (OllamaModel([("model", WEIGHTS)], spoil=_type(TYPE + "hologram")), "vnd.ollama.image.hologram"),
        (OllamaModel([("model", WEIGHTS)], spoil=_type("application/vnd.evil")), "vnd.evil"),
        (OllamaModel([("license", b"x")]), "holds no model's weights"),
        (OllamaModel([("model", WEIGHTS), ("model", make_gguf(seed=9))]), "several models' weights"),
    ],
)
async def test_what_has_no_usable_weights_is_refused_by_name(
    registry: OllamaRegistry, puller: Puller, model: OllamaModel, words: str
) -> None:
    registry.models["library/tiny:latest"] = model
    with pytest.raises(UsageError, match=words) as caught:
        await puller(f"ollama://{registry.base}/library/tiny")
    assert caught.value.hint
    assert not list(puller.store.blobs.folder.iterdir())


def _set(**values: Any) -> Any:
    return lambda document: document["layers"][0].update(values)


def _many(document: dict[str, Any]) -> None:
    document["layers"] *= 2000


BOMB = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (OllamaModel([("model", WEIGHTS)], spoil=_set(size=len(WEIGHTS) + 5)), "manifest says|another part"),
        (OllamaModel([("model", WEIGHTS)], spoil=_set(size=len(WEIGHTS) - 5)), "ends at byte"),
        (OllamaModel([("model", WEIGHTS)], spoil=_set(size=-1)), "a size"),
        (OllamaModel([("model", WEIGHTS)], spoil=_set(digest="sha256:../../etc/passwd")), "not named by a sha256"),
        (OllamaModel([("model", WEIGHTS)], spoil=_set(digest="sha512:" + "a" * 128)), "not named by a sha256"),
        (OllamaModel([("model", WEIGHTS)], spoil=_many), "more than 1024 layers"),
        (OllamaModel([("model", WEIGHTS)], spoil=lambda d: d.update(layers="x")), "cannot be read"),
        (OllamaModel([("model", WEIGHTS)], spoil=lambda d: d.update(pad="x" * 5_000_000)), "more than"),
        (OllamaModel([("model", b"GGML" * 1000)]), "GGUF"),
        (OllamaModel([("model", b"<html>login</html>" * 1000)]), "GGUF"),
        (OllamaModel([("model", WEIGHTS), ("params", b"[1]")]), "parameters of .* cannot be read"),
        (OllamaModel([("model", WEIGHTS), ("params", BOMB)]), "larger than it may be|cannot be read"),
        (OllamaModel([("model", WEIGHTS), ("params", b"[" * 200_000)]), "cannot be read"),
        (OllamaModel([("model", WEIGHTS), ("messages", b'[{"content": 3}]')]), "messages of .* cannot be read"),
        (OllamaModel([("model", WEIGHTS), ("system", b"\xff\xfe")]), "not text"),
        (OllamaModel([("model", WEIGHTS), ("system", b"x" * 300_000)]), "larger than it may be"),
    ],
)
async def test_a_hostile_model_is_refused_and_leaves_nothing(
    registry: OllamaRegistry, puller: Puller, model: OllamaModel, words: str
) -> None:
    registry.models["library/tiny:latest"] = model
    with pytest.raises(CorruptData, match=words):
        await puller(f"ollama://{registry.base}/library/tiny")
    assert puller.store.models() == []
    assert not list(puller.store.blobs.folder.iterdir())


@pytest.mark.parametrize("kind", ["model", "system", "license"])
async def test_another_content_than_the_digest_names_is_refused(
    registry: OllamaRegistry, puller: Puller, kind: str
) -> None:
    model = registry.models["library/tiny:latest"] = full()
    data = next(data for name, data in model.layers if name == kind)
    registry.wrong[digest(data)] = data[:-1] + b"!"
    with pytest.raises(CorruptData, match="digest"):
        await puller(f"ollama://{registry.base}/library/tiny")
    assert puller.store.models() == []


async def test_parameters_never_become_options_of_another_kind(registry: OllamaRegistry, puller: Puller) -> None:
    odd = {"temperature": "hot", "top_k": 1.5, "num_ctx": True, "stop": [1], "seed": None, "model": "/etc/passwd"}
    registry.models["library/tiny:latest"] = OllamaModel([("model", WEIGHTS), ("params", json.dumps(odd).encode())])
    record = await puller(f"ollama://{registry.base}/library/tiny")
    assert "ai.pierhead.settings" not in record.annotations


def test_the_options_are_ones_that_the_engine_knows() -> None:
    from pierhead.engines.llamacpp_params import canonical
    from pierhead.package.modelfile import PARAMETERS
    from pierhead.sources.ollama_model import settings_of

    every = {key: 1 for key in ("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty")}
    every |= {key: 1 for key in ("repeat_last_n", "presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau")}
    every |= {key: 1 for key in ("mirostat_eta", "seed", "num_predict", "num_keep")}
    settings = settings_of({"params": json.dumps({**every, "stop": "x"}).encode()}, "it")
    assert not settings.left_out
    assert len(canonical(settings.options)) == len(every) + 1
    assert set(settings.options) <= set(PARAMETERS.values()), "a Modelfile's parameters have the same names"
