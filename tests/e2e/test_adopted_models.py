"""Models that Ollama and Docker Model Runner have on this machine are taken over and answer, as they were set up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest
from tests.sources.golden_docker import DockerModel, write_docker
from tests.sources.golden_ollama import OllamaModel

if TYPE_CHECKING:
    from conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

SYSTEM = "You are the harbour master."
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


@pytest.fixture
def client(process_home: Installation) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{process_home.address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def weights(smollm2: Path) -> bytes:
    return smollm2.read_bytes()


def ask(client: openai.OpenAI, model: str, *, system: bool) -> tuple[str | None, int]:
    """The answer that is always the same, and the tokens of the prompt that led to it."""
    messages = [{"role": "system", "content": SYSTEM}] if system else []
    messages.append({"role": "user", "content": "Who are you?"})
    fresh = {"cache_prompt": False}  # what is read in one piece and what in two differ in the last bits
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=16,
        temperature=0,
        extra_body=fresh,  # type: ignore[arg-type]
    )
    assert answer.usage is not None
    return answer.choices[0].message.content, answer.usage.prompt_tokens


def test_ollamas_models_answer_from_its_own_files(
    process_home: Installation, client: openai.OpenAI, weights: bytes, tmp_path: Path
) -> None:
    bare = weights.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX", 1)
    set_up = [("params", b'{"num_ctx":1024,"temperature":0.1}'), ("system", SYSTEM.encode())]
    OllamaModel([("model", weights), ("license", b"Apache License"), *set_up]).write(tmp_path)
    OllamaModel([("model", bare), ("template", CHATML.encode())]).write(
        tmp_path, "registry.ollama.ai/library/bare/latest"
    )
    taken = process_home.pier("adopt", "ollama", "--path", str(tmp_path), "--all")
    assert taken.returncode == 0, taken.stderr
    expected = ask(client, "smollm2", system=True)
    assert ask(client, "tiny", system=False) == expected, "the system prompt comes with the model"
    assert ask(client, "bare", system=True) == expected, "Ollama's template, as Jinja, makes the same prompt"


def test_docker_model_runners_models_answer_from_its_own_files(
    process_home: Installation, client: openai.OpenAI, weights: bytes, tmp_path: Path
) -> None:
    model = DockerModel([("gguf.v3", "SmolLM2.gguf", weights), ("license", "LICENSE", b"Apache License")])
    write_docker(tmp_path, [(model, ["docker.io/ai/smollm2:latest"])])
    taken = process_home.pier("adopt", "docker", "--path", str(tmp_path), "ai/smollm2")
    assert taken.returncode == 0, taken.stderr
    assert ask(client, "ai/smollm2", system=True) == ask(client, "smollm2", system=True)
