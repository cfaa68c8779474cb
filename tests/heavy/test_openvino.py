"""The real OpenVINO GenAI behind the gateway: what only it does, and what it says of models that it cannot serve."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.heavy.conftest import Installation, as_onnx

from pierhead.errors import EngineFailed

pytestmark = pytest.mark.timeout(1500)
HI: list[Any] = [{"role": "user", "content": "Tell me a city in Europe."}]


@pytest.fixture(scope="module")
def served(installation: Installation, smollm2_openvino: Path) -> Installation:
    installation.pier("package", str(smollm2_openvino), "small")
    installation.start("small", context=512, parallel=2)
    return installation


def ask(served: Installation, **more: Any) -> Any:
    given: Any = {"model": "small", "messages": HI, "max_tokens": 16, **more}
    return served.openai.chat.completions.create(**given)


def test_an_answer_fits_a_schema(served: Installation) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    wish = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema | {"additionalProperties": False}}}
    text = ask(served, response_format=wish, max_tokens=60, temperature=0).choices[0].message.content
    assert set(json.loads(text)) == {"city"}


def test_anthropics_client_is_answered_through_translation(served: Installation) -> None:
    message = served.anthropic.messages.create(model="small", max_tokens=8, messages=HI)
    assert message.content[0].type == "text"
    assert 0 < message.usage.output_tokens <= 8


@pytest.mark.parametrize(
    "wish", [{"n": 2}, {"logprobs": True}, {"logit_bias": {"5": 1}}, {"top_p": 7}, {"stop": ["x"] * 17}], ids=str
)
def test_what_it_cannot_do_is_refused_by_name_and_not_ignored(served: Installation, wish: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=next(iter(wish))):
        ask(served, **wish)


def test_text_is_completed_and_tokens_go_both_ways(served: Installation) -> None:
    done = served.openai.completions.create(model="small", prompt="one two three", max_tokens=4, temperature=0)
    assert done.choices[0].text
    assert done.usage is not None
    tokens: Any = served.openai.post("/tokenize", body={"model": "small", "prompt": "one two"}, cast_to=object)
    back: Any = served.openai.post("/detokenize", body={"model": "small", "tokens": tokens["tokens"]}, cast_to=object)
    assert back["prompt"] == "one two"


@pytest.mark.docker
@pytest.mark.skipif("PIERHEAD_TEST_DOCKER" not in os.environ, reason="no Docker Engine for tests is here")
def test_it_answers_from_a_container_without_a_network(installation: Installation, smollm2_openvino: Path) -> None:
    installation.pier("package", str(smollm2_openvino), "boxed")
    assert installation.start("boxed", runtime="docker", context=512).runtime == "docker"
    answer = installation.openai.chat.completions.create(model="boxed", messages=HI, max_tokens=4)
    assert answer.choices[0].message.content
    installation.stop("boxed")


TEXTS = ["hello world", "A cat sits on the mat.", "word " * 100, "Interest rates were raised.", "é ñ 漢字"]


@pytest.fixture(scope="module")
def reading(installation: Installation, minilm: Path, minilm_openvino: Path, tmp_path_factory: Any) -> Installation:
    """The same model twice: by OpenVINO GenAI and by ONNX Runtime."""
    installation.pier("package", str(minilm_openvino), "vectors")
    installation.start("vectors", engine="openvino")
    installation.pier("package", str(as_onnx(minilm, tmp_path_factory.mktemp("onnx"))), "onnx-vectors")
    installation.start("onnx-vectors", engine="onnx")
    return installation


def vectors(reading: Installation, model: str, texts: list[str], **more: Any) -> list[list[float]]:
    return [one.embedding for one in reading.openai.embeddings.create(model=model, input=texts, **more).data]


def test_its_vectors_are_those_of_the_onnx_engine(reading: Installation) -> None:
    ours, theirs = (reading.openai.embeddings.create(model=m, input=TEXTS) for m in ("vectors", "onnx-vectors"))
    for one, other in zip(ours.data, theirs.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=2e-5)
    assert ours.usage == theirs.usage
    alone = [vectors(reading, "vectors", [text])[0] for text in TEXTS]
    for one, other in zip(ours.data, alone, strict=True):
        assert one.embedding == pytest.approx(other, abs=2e-5), "company changes nothing"
    short = vectors(reading, "vectors", TEXTS[:1], dimensions=4)[0]
    assert sum(x * x for x in short) == pytest.approx(1, abs=1e-5)
    card = next(m for m in reading.openai.models.list().data if m.id == "vectors").to_dict()
    assert card["capabilities"] == ["embeddings"]


def test_many_clients_share_its_batches(reading: Installation) -> None:
    client = reading.openai

    def one(number: int) -> list[float]:
        text = f"text {number} " * (number % 7 + 1)
        return client.embeddings.create(model="vectors", input=text).data[0].embedding

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(40)))
    assert found[11] == pytest.approx(vectors(reading, "vectors", ["text 11 " * 5])[0], abs=2e-5)
    assert len({tuple(one[:3]) for one in found}) == 40


def test_a_text_that_is_too_long_is_refused_with_the_numbers_or_cut_when_asked(reading: Installation) -> None:
    long = "word " * 600
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 512 tokens, and text 1 has 602"):
        vectors(reading, "vectors", ["a", long])
    cut = vectors(reading, "vectors", [long], extra_body={"truncate": True})[0]
    assert len(cut) == 384
    for wrong in ({"input": []}, {"input": [[1, 2]]}, {"input": "a", "dimensions": 1000}, {"input": 5}):
        with pytest.raises(openai.BadRequestError):
            reading.openai.post("/embeddings", body={"model": "vectors", **wrong}, cast_to=object)
    with pytest.raises(openai.APIStatusError, match="chat"):
        reading.openai.chat.completions.create(model="vectors", messages=HI)


def test_near_texts_score_higher_and_ollamas_clients_get_the_same_vectors(reading: Installation) -> None:
    body = {"model": "vectors", "text_1": "hello world", "text_2": ["hi world", "a tax form"]}
    near, far = (one["score"] for one in ask_for(reading, "/score", body)["data"])
    assert near > 0.7 > 0.3 > far
    told = httpx.post(f"http://{reading.address}/api/embed", json={"model": "vectors", "input": TEXTS[:1]}, timeout=60)
    assert told.json()["embeddings"][0] == pytest.approx(vectors(reading, "vectors", TEXTS[:1])[0], abs=1e-5)


def ask_for(reading: Installation, path: str, body: dict[str, Any]) -> Any:
    return reading.openai.post(path, body=body, cast_to=object)


def test_it_ranks_as_the_onnx_engine_does(
    installation: Installation, minilm: Path, ranker_openvino: Path, tmp_path: Path
) -> None:
    installation.pier("package", str(ranker_openvino), "ranker")
    installation.start("ranker", engine="openvino")
    installation.pier("package", str(as_onnx(minilm, tmp_path / "onnx", "relevant")), "onnx-ranker")
    installation.start("onnx-ranker", engine="onnx")
    documents = ["Paris is in France.", {"text": "A tax form."}, "word " * 80, "Rome."]
    body = {"query": "Where is Paris?", "documents": documents, "return_documents": True}
    ours, theirs = (ask_for(installation, "/rerank", {"model": m, **body}) for m in ("ranker", "onnx-ranker"))
    assert [r["index"] for r in ours["results"]] == [r["index"] for r in theirs["results"]]
    for one, other in zip(ours["results"], theirs["results"], strict=True):
        assert one["relevance_score"] == pytest.approx(other["relevance_score"], abs=1e-4)
        assert one["document"] == other["document"]
    assert ours["usage"] == theirs["usage"]
    assert len(ask_for(installation, "/rerank", {"model": "ranker", **body, "top_n": 2})["results"]) == 2
    many = ["one", "two"] * 40
    assert len(ask_for(installation, "/rerank", {"model": "ranker", "query": "q", "documents": many})["results"]) == 80
    pairs = {"model": "ranker", "text_1": ["a", "b"], "text_2": ["c", "d"]}
    assert len(ask_for(installation, "/score", pairs)["data"]) == 2
    card = next(m for m in installation.openai.models.list().data if m.id == "ranker").to_dict()
    assert card["capabilities"] == ["rerank"]
    installation.stop("ranker")
    installation.stop("onnx-ranker")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("openvino_tokenizer.*"):
        file.unlink()


def of_a_broken_graph(folder: Path) -> None:
    graph = folder / "openvino_model.xml"
    graph.write_bytes(graph.read_bytes()[:200_000])


def of_too_few_numbers(folder: Path) -> None:
    numbers = folder / "openvino_model.bin"
    numbers.write_bytes(numbers.read_bytes()[:1000])


BAD: list[tuple[Callable[[Path], None], str]] = [
    (without_tokenizer, "has no openvino_tokenizer.xml"),
    (of_a_broken_graph, r"\w{3}"),
    (of_too_few_numbers, r"\w{3}"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_a_model_that_cannot_be_served_gives_the_engines_own_reason(
    installation: Installation, smollm2_openvino: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(smollm2_openvino, folder)
    spoil(folder)
    name = spoil.__name__.replace("_", "-")
    installation.pier("package", str(folder), name)
    with pytest.raises(EngineFailed, match=f"(?i)engine: .*{words}") as failed:
        installation.start(name, context=512)
    print(failed.value.message)
