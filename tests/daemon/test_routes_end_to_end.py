"""Edge and cloud: one Pierhead asks another as its provider, in both dialects, with official clients and SmolLM2."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import ollama as ollama_lib
import openai
import pytest

from pierhead.paths import resolve

ROUTES = """
[providers.cloud]
base_url = "http://{cloud}/v1"
secret = "cloud"
models = ["smollm2"]

[providers.claude]
base_url = "http://{cloud}"
dialect = "anthropic"
secret = "cloud"
models = ["smollm2"]

[providers.down]
base_url = "http://127.0.0.1:1/v1"

[routes.assistant]
to = [{{ provider = "down", model = "x" }}]
[[routes.assistant.fallback]]
model = "cloud/smollm2"
"""
QUESTION: Any = [{"role": "user", "content": "Count from one to ten."}]


class Pair:
    """The edge's address, and both installations."""

    def __init__(self, edge: Any, cloud: Any, key: str) -> None:
        self.edge = edge
        self.cloud = cloud
        self.key = key
        self.address = ""
        self.stack = contextlib.ExitStack()  # closes the clients

    def pier(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        run = [sys.executable, "-m", "pierhead.cli.main", *args]
        return subprocess.run(
            run, env=self.edge.env, input=stdin, capture_output=True, text=True, timeout=60, check=False
        )

    def cloud_requests(self) -> str:
        port = self.cloud_port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/metrics", headers={"authorization": f"Bearer {self.key}"})
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    cloud_port = 0


@pytest.fixture
def pair(house: Any) -> Iterator[Pair]:
    """A cloud with SmolLM2 that wants a key, and an edge without any model that has one."""
    said = house.start(PIERHEAD_GATEWAY__REQUIRE_KEY="true")
    cloud = said["listeners"][0]
    key = house.client.request("POST", "/keys", {"name": "edge"})["key"]
    home = Path(tempfile.mkdtemp(prefix="pier-"))
    env = house.env | {"PIERHEAD_HOME": str(home)}
    edge = type(house)(resolve(env), env)
    made = Pair(edge, house, key)
    made.cloud_port = int(cloud.rpartition(":")[2])
    try:
        edge.paths.state.mkdir(parents=True)
        edge.paths.config.mkdir(parents=True)
        (edge.paths.config / "routes.toml").write_text(ROUTES.format(cloud=cloud))
        told = made.pier("secret", "set", "cloud", stdin=key + "\n")
        assert told.returncode == 0, told.stderr
        made.address = edge.start()["listeners"][0]
        yield made
    finally:
        made.stack.close()
        edge.clear()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.model
def test_official_clients_reach_the_clouds_model_through_the_edge(pair: Pair) -> None:
    client = openai.OpenAI(base_url=f"http://{pair.address}/v1", api_key="a-key-of-nobody", max_retries=0, timeout=60)
    pair.stack.enter_context(client)
    listed = {model.id: model.owned_by for model in client.models.list()}
    assert listed["cloud/smollm2"] == "cloud"
    assert {"assistant", "claude/smollm2"} <= listed.keys()

    # chat → chat, whole and streamed; and over a fallback, since nobody listens at the first destination
    for model in ("cloud/smollm2", "assistant"):
        raw = client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, max_tokens=8)
        assert raw.headers["x-pierhead-model"] == "cloud/smollm2" if model == "assistant" else True
        answer = raw.parse()
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        with client.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, stream=True) as stream:
            assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    # chat → messages: the provider speaks Anthropic's dialect only
    whole = client.chat.completions.create(model="claude/smollm2", messages=QUESTION, max_tokens=8, temperature=0)
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.prompt_tokens > 0
    usage: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model="claude/smollm2",
        messages=QUESTION,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options=usage,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0

    # messages → messages, and messages → chat
    address = f"http://{pair.address}"
    claude = anthropic.Anthropic(base_url=address, api_key="a-key-of-nobody", max_retries=0, timeout=60)
    pair.stack.enter_context(claude)
    for model in ("claude/smollm2", "cloud/smollm2"):
        message = claude.messages.create(model=model, messages=QUESTION, max_tokens=8)
        assert message.content[0].type == "text"
        assert message.usage.output_tokens > 0
        with claude.messages.stream(model=model, messages=QUESTION, max_tokens=8) as events:
            assert events.get_final_text()
    counted = claude.messages.count_tokens(model="claude/smollm2", messages=QUESTION)
    assert counted.input_tokens > 0

    # other dialects on Anthropic's, by way of chat
    said = client.responses.create(model="claude/smollm2", input="Count from one to ten.", max_output_tokens=8)
    assert said.output_text
    with client.responses.stream(model="claude/smollm2", input="Count.", max_output_tokens=8) as typed:
        kinds = [event.type for event in typed]
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")
    for model in ("claude/smollm2", "cloud/smollm2"):
        ollama = pair.stack.enter_context(ollama_lib.Client(address, timeout=60))
        told = list(ollama.chat(model, QUESTION, stream=True, options={"num_predict": 8}))
        assert "".join(part.message.content or "" for part in told)
        assert told[-1].done
        assert told[-1].eval_count

    metrics = http_get(pair.address, "/metrics")
    line = next(x for x in metrics.splitlines() if x.startswith('pierhead_prompt_tokens_total{model="claude/smollm2"}'))
    assert int(line.rpartition(" ")[2]) > 0

    # the key is nowhere but in its file
    shown = "".join(pair.pier(*verb, "--json").stdout for verb in (("route", "list"), ("secret", "list"), ("status",)))
    assert '"cloud"' in shown
    logs = "".join(p.read_text(errors="replace") for p in pair.edge.paths.state.rglob("*.log"))
    logs += (pair.edge.paths.runtime.parent / "serve.log").read_text(errors="replace")
    argv = "".join(pair.edge.left)
    assert pair.key not in shown + logs + argv + metrics

    # a key that the cloud does not know is told as the gateway's trouble, not as the client's
    assert pair.pier("secret", "set", "cloud", stdin="pier_wrong").returncode == 0
    refused = refusal(client)
    assert (refused.status_code, refused.code) == (502, "provider_denied")
    assert "pier_wrong" not in str(refused)


def refusal(client: openai.OpenAI) -> openai.APIStatusError:
    """The error that the client gets once the change is noticed."""
    while True:
        try:
            client.chat.completions.create(model="cloud/smollm2", messages=QUESTION, max_tokens=1)
        except openai.APIStatusError as exc:
            return exc


def http_get(address: str, path: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_routes_are_made_checked_and_removed_by_the_command(house: Any) -> None:
    house.start()

    def pier(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        run = [sys.executable, "-m", "pierhead.cli.main", *args]
        return subprocess.run(run, env=house.env, input=stdin, capture_output=True, text=True, timeout=60, check=False)

    def listed() -> set[str]:
        found: dict[str, Any] = json.loads(pier("route", "list", "--json").stdout)
        return {route["name"] for route in found["routes"] if route["active"]}

    assert "There are no configured routes." in pier("route", "check").stderr
    made = pier("route", "set", "fast", "--to", "smollm2=9", "--sticky", "user")
    assert made.returncode == 0, made.stderr
    assert listed() == {"fast", "smollm2"}
    status, answer = house.chat("fast")
    assert status == 200, answer
    assert "Sticky" in pier("route", "show", "fast").stdout

    file = house.paths.config / "routes.toml"
    assert "weight = 9\n" in file.read_text()
    file.write_text(file.read_text() + "[routes.broken\n")
    told = pier("route", "check")
    while told.returncode == 0:  # until the change is noticed
        told = pier("route", "check")
    assert told.returncode == 2
    assert "no TOML" in told.stderr
    assert "no TOML" in pier("status").stdout
    assert house.chat("fast")[0] == 200, "the last good routes stay in force"
    refused = pier("route", "set", "other", "--to", "smollm2")
    assert refused.returncode == 2

    file.write_text('[routes.fast]\nto = [{ model = "smollm2" }]\n[routes.lost]\nto = [{ model = "gone" }]\n')
    while "no TOML" in (told := pier("route", "check")).stderr:
        pass
    assert told.returncode == 2
    assert "pier pull gone" in told.stderr
    assert pier("route", "rm", "fast").returncode == 0
    assert listed() == {"smollm2"}
    assert pier("route", "rm", "fast").returncode == 3
    assert house.chat("fast")[0] == 404
