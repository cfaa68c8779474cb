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
from tests.heavy.conftest import Installation, as_classifier, as_onnx

from pierhead.errors import EngineFailed

pytestmark = pytest.mark.timeout(1500)
HI: list[Any] = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def poet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that says something else than the model."""
    return adapter(tmp_path_factory.mktemp("poet") / "poet", 1.0)


@pytest.fixture(scope="module")
def served(installation: Installation, smollm2_safetensors: Path, poet: Path) -> Installation:
    """One server for most tests: it calls tools and uses adapters."""
    installation.pier("package", "--safetensors-dir", str(smollm2_safetensors), "small")
    installation.pier("lora", "add", "small", str(poet))
    installation.start("small", context=1024, parallel=2, tool_parser="hermes")
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


def test_a_classifier_with_one_label_ranks_as_the_onnx_engine_does(
    installation: Installation, minilm: Path, tmp_path: Path
) -> None:
    installation.pier("package", "--safetensors-dir", str(as_classifier(minilm, tmp_path / "safe", "fits")), "ranker")
    installation.pier("package", str(as_onnx(minilm, tmp_path / "onnx", "fits")), "onnx-ranker")
    installation.start("ranker", engine="vllm", context=128, parallel=2, dtype="float32")
    installation.start("onnx-ranker", engine="onnx")
    body = {"query": "Where is Paris?", "documents": ["Paris is in France.", "A tax form.", "Rome."]}

    def ranked(model: str) -> list[tuple[int, float]]:
        found: Any = installation.openai.post("/rerank", body={"model": model, **body}, cast_to=object)
        return sorted((r["index"], r["relevance_score"]) for r in found["results"])

    told = [ranked(model) for model in ("ranker", "onnx-ranker")]
    for (_, one), (_, other) in zip(*told, strict=True):
        assert one == pytest.approx(other, abs=2e-4)
    pair = {"model": "ranker", "text_1": body["query"], "text_2": body["documents"][0]}
    scored: Any = installation.openai.post("/score", body=pair, cast_to=object)
    assert scored["data"][0]["score"] == pytest.approx(told[0][0][1], abs=2e-4)
    card = next(m for m in installation.openai.models.list().data if m.id == "ranker")
    assert card.to_dict()["capabilities"] == ["rerank"]
    installation.stop("ranker")
    installation.stop("onnx-ranker")


def test_a_classifier_names_the_label_of_each_text(installation: Installation, minilm: Path, tmp_path: Path) -> None:
    folder = as_classifier(minilm, tmp_path / "safe", "bad", "good")
    installation.pier("package", "--safetensors-dir", str(folder), "judge")
    installation.start("judge", engine="vllm", context=128, parallel=2, dtype="float32")
    asked = {"model": "judge", "input": ["A fine day.", "A tax form."]}
    data: Any = installation.openai.post("/classify", body=asked, cast_to=object)
    assert {one["label"] for one in data["data"]} <= {"bad", "good"}
    assert [sum(one["probs"]) for one in data["data"]] == pytest.approx([1, 1], abs=1e-3)
    installation.stop("judge")


def adapter(folder: Path, strength: float, rank: int = 4) -> Path:
    """A LoRA on every layer's queries, as PEFT saves one."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "lora_dropout": 0.0}))
    random = numpy.random.default_rng(1)
    tensors: dict[str, Any] = {}
    for layer in range(30):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.1 * strength, (rank, 576)).astype(numpy.float32)
        tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.1 * strength, (576, rank)).astype(numpy.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def said(served: Installation, model: str) -> str:
    asked: Any = {"messages": HI, "max_tokens": 12, "temperature": 0}
    return served.openai.chat.completions.create(model=model, **asked).choices[0].message.content or ""


def adapters(served: Installation) -> dict[str, str]:
    """Name to state."""
    listed = json.loads(served.pier("lora", "list", "small", "--json"))
    return {a["name"]: a["error"] or ("loaded" if a["loaded"] else "not loaded") for a in listed}


def test_adapters_of_the_store_come_change_and_go_while_it_runs(served: Installation, poet: Path) -> None:
    replica = served.house.client.get("/replicas")[0]["id"]
    plain, changed = said(served, "small"), said(served, "small+poet")
    assert adapters(served) == {"poet": "loaded"}
    assert changed != plain
    assert said(served, "small") == plain, "requests for the model itself must not see the adapter"

    served.pier("lora", "add", "small", "poet=0")
    assert said(served, "small+poet") == plain, "a scale of 0 must change nothing, at once"
    served.pier("lora", "add", "small", "poet=1")
    assert said(served, "small+poet") == changed

    served.pier("lora", "add", "small", str(poet), "--name", "second")
    assert adapters(served) == {"poet": "loaded", "second": "loaded"}
    assert said(served, "small+second") == changed
    models = {m.id: m.to_dict() for m in served.openai.models.list().data}
    assert models["small+second"]["parent"] == "small"
    served.pier("lora", "rm", "small", "second")
    with pytest.raises(openai.NotFoundError):
        said(served, "small+second")
    assert served.house.client.get("/replicas")[0]["id"] == replica


def test_an_adapter_that_it_cannot_load_is_told_in_its_words_and_the_rest_goes_on(
    served: Installation, tmp_path: Path
) -> None:
    wide = adapter(tmp_path / "wide", 1.0, rank=64)
    served.pier("lora", "add", "small", f"{wide}")
    assert "rank" in adapters(served)["wide"]
    assert said(served, "small")
    with pytest.raises(openai.APIStatusError, match="wide"):
        said(served, "small+wide")
    served.pier("lora", "rm", "small", "wide")


def test_no_client_reaches_what_loads_adapters(served: Installation) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        body = {"model": "small", "lora_name": "x", "lora_path": "/etc"}
        assert httpx.post(f"http://{served.address}{path}", json=body, timeout=60).status_code == 404


@pytest.mark.parametrize("wish", [{"draft": "small", "draft_tokens": 2}, {"ngram": True, "draft_tokens": 3}], ids=str)
def test_drafts_of_a_model_of_the_store_or_of_the_text_itself_are_accepted(
    served: Installation, smollm2_safetensors: Path, wish: dict[str, Any]
) -> None:
    """SmolLM2 drafts for itself, which is right; a text that repeats itself goes on as it did."""
    served.pier("package", "--safetensors-dir", str(smollm2_safetensors), "large")
    ready = served.start("large", context=256, parallel=1, **wish)
    text = "one two three four five six seven eight nine ten " * 3
    served.openai.completions.create(model="large", prompt=text, max_tokens=32, temperature=0)
    with httpx.Client(transport=httpx.HTTPTransport(uds=ready.socket), base_url="http://engine") as engine:
        lines = engine.get("/metrics").text.splitlines()
    name = "vllm:spec_decode_num_accepted_tokens_total"
    assert sum(float(line.split()[-1]) for line in lines if line.startswith(name)) > 0
    served.stop("large")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def of_an_unknown_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


BAD: list[tuple[Callable[[Path], None], str]] = [
    (without_tokenizer, "tokenizer"),
    (of_an_unknown_kind, "strange"),
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
