"""The real OpenVINO GenAI behind the gateway: what only it does, and what it says of models that it cannot serve."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.heavy.conftest import Installation

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
