"""The real vLLM on the CPU behind the gateway: what only it does, and what it says of models that it cannot serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy
import openai
import pytest
from safetensors.numpy import save_file
from tests.heavy.conftest import Installation

from pierhead.errors import EngineFailed, PierError

pytestmark = pytest.mark.timeout(1500)
HI: list[Any] = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def served(installation: Installation, smollm2_safetensors: Path) -> Installation:
    installation.pier("package", "--safetensors-dir", str(smollm2_safetensors), "small")
    installation.start("small", context=1024, parallel=2, **{"tool-call-parser": "hermes"})
    return installation


def test_it_says_what_it_can_do(served: Installation) -> None:
    card = next(m for m in served.openai.models.list().data if m.id == "small")
    assert card.to_dict()["capabilities"] == ["chat", "completions"]


def test_it_answers_anthropics_client_through_translation(served: Installation) -> None:
    message = served.anthropic.messages.create(model="small", max_tokens=8, messages=HI)
    assert message.content[0].type == "text"
    assert message.usage.output_tokens == 8
    assert message.stop_reason == "max_tokens"
    counted = served.anthropic.messages.count_tokens(model="small", messages=HI)
    assert counted.input_tokens == message.usage.input_tokens


def test_a_required_tool_is_called_with_arguments_of_its_schema(served: Installation) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    }
    schema["additionalProperties"] = False
    tool: Any = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": schema}}
    answer = served.openai.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=64,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].type == "function"
    assert calls[0].function.name == "weather"
    assert isinstance(json.loads(calls[0].function.arguments)["city"], str)


def test_embeddings_of_a_model_that_only_writes_are_refused_in_words(served: Installation) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        served.openai.embeddings.create(model="small", input="a")
    assert refused.value.status_code in (400, 404, 501)
    assert "embeddings" in str(refused.value)


def test_tokens_are_vllms_own_and_go_both_ways(served: Installation) -> None:
    tokens: Any = served.openai.post("/tokenize", body={"model": "small", "prompt": "one two"}, cast_to=object)
    body = {"model": "small", "tokens": tokens["tokens"]}
    text: Any = served.openai.post("/detokenize", body=body, cast_to=object)
    assert "one two" in text["prompt"]


def test_a_model_that_embeds_is_served_as_one(installation: Installation, minilm: Path) -> None:
    """all-MiniLM-L6-v2: vLLM pools as its files say, and near texts have near vectors."""
    installation.pier("package", "--safetensors-dir", str(minilm), "vectors")
    installation.start("vectors", engine="vllm", context=256)
    texts = ["A cat sits on the mat.", "A kitten is on the rug.", "Interest rates were raised."]
    vectors = [one.embedding for one in installation.openai.embeddings.create(model="vectors", input=texts).data]
    assert [len(v) for v in vectors] == [384] * 3
    near, far = (sum(a * b for a, b in zip(vectors[0], v, strict=True)) for v in vectors[1:])
    assert near > far + 0.3
    with pytest.raises(openai.APIStatusError, match="chat"):
        installation.openai.chat.completions.create(model="vectors", messages=HI)
    installation.stop("vectors")


def adapter(folder: Path) -> None:
    """A LoRA of rank 4 on every layer's queries, as PEFT saves one; it changes little."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "lora_dropout": 0.0}))
    random = numpy.random.default_rng(1)
    tensors: dict[str, Any] = {}
    for layer in range(30):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.02, (4, 576)).astype(numpy.float32)
        tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.02, (576, 4)).astype(numpy.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_adapters_in_the_models_folder_are_served_and_more_come_while_it_runs(
    installation: Installation, smollm2_safetensors: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "with"
    shutil.copytree(smollm2_safetensors, folder)
    adapter(folder / "adapters" / "poet")
    installation.pier("package", str(folder), "with-poet")
    ready = installation.start("with-poet", context=512, parallel=2)
    asked = {"model": "poet", "messages": HI, "max_tokens": 4, "temperature": 0}
    with httpx.Client(transport=httpx.HTTPTransport(uds=ready.socket), base_url="http://engine", timeout=120) as engine:
        assert {m["id"] for m in engine.get("/v1/models").json()["data"]} == {"with-poet", "poet"}
        assert engine.post("/v1/chat/completions", json=asked).json()["model"] == "poet"
        named = {"lora_name": "second", "lora_path": "adapters/poet"}
        assert engine.post("/v1/load_lora_adapter", json=named).status_code == 200
        assert "second" in engine.get("/v1/models").text
        assert engine.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 200
    installation.stop("with-poet")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def of_an_unknown_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def of_an_unknown_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "odd"}}
    (folder / "config.json").write_text(json.dumps(config))


BAD: list[tuple[Callable[[Path], None], str]] = [
    (without_tokenizer, "tokenizer"),
    (of_an_unknown_kind, "strange"),
    (of_an_unknown_quantization, "odd"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_a_model_that_cannot_be_served_gives_the_engines_own_reason(
    installation: Installation, smollm2_safetensors: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(smollm2_safetensors, folder)
    spoil(folder)
    name = spoil.__name__.replace("_", "-")
    installation.pier("package", "--safetensors-dir", str(folder), name)
    with pytest.raises(EngineFailed, match=f"(?i)engine: .*({words})"):
        installation.start(name, context=512)


def test_a_context_that_the_model_does_not_have_is_refused(
    installation: Installation, smollm2_safetensors: Path
) -> None:
    installation.pier("package", "--safetensors-dir", str(smollm2_safetensors), "long")
    with pytest.raises(PierError, match="16384"):
        installation.start("long", context=16384)
