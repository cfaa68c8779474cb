"""What the llama.cpp engine plans, refuses and converts; and that odd settings really start."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import xllamacpp
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pierhead.config import RuntimeSettings
from pierhead.engines import llamacpp_params as params
from pierhead.engines.base import LaunchSpec, PlanRequest
from pierhead.engines.llamacpp import LlamaCpp
from pierhead.errors import OutOfMemory, PierError, UsageError
from pierhead.formats.gguf import read_file, summary
from pierhead.runtimes.base import Places, expand
from pierhead.runtimes.process import ProcessRuntime
from pierhead.runtimes.readiness import healthy, wait_ready
from pierhead.store.model import ModelFile

GIB = 1 << 30
PLACES = Places("/python", "/entry.py", "/model", "/s/engine.sock")
ENGINE = LlamaCpp()


@pytest.fixture(scope="session")
def metadata(smollm2: Path) -> dict[str, Any]:
    return summary(read_file(smollm2))


@pytest.fixture(scope="session")
def ask(smollm2: Path, metadata: dict[str, Any]) -> Any:
    def make(settings: dict[str, Any], free: int = 4 * GIB, *more: ModelFile) -> PlanRequest:
        weights = ModelFile(smollm2.name, smollm2.stat().st_size)
        return PlanRequest("r1", "smollm2", smollm2.parent, (weights, *more), metadata, settings, free, 2)

    return make


def inner(spec: LaunchSpec) -> dict[str, Any]:
    """The settings as the engine's program will read them."""
    argv, _ = expand(spec, PLACES)
    return json.loads(argv[argv.index("--settings") + 1])


def test_the_default_context_shrinks_to_the_free_memory(ask: Any) -> None:
    roomy, tight = ENGINE.plan(ask({})), ENGINE.plan(ask({}, 300 << 20))
    assert roomy.context == 8192
    assert 512 <= tight.context < roomy.context
    assert tight.memory <= 300 << 20


@pytest.mark.parametrize(("settings", "free"), [({}, 50 << 20), ({"context": 8192}, 200 << 20)])
def test_what_does_not_fit_is_refused_with_the_numbers(ask: Any, settings: dict[str, Any], free: int) -> None:
    with pytest.raises(OutOfMemory) as caught:
        ENGINE.plan(ask(settings, free))
    data = caught.value.data
    assert data["free"] == free < data["needed"]
    assert data["weights"] + data["kv_cache"] <= data["needed"]
    assert f"{free >> 20} MiB are free" in caught.value.message
    assert caught.value.hint


def test_parallel_slots_multiply_the_context_that_the_engine_gets(ask: Any) -> None:
    plan = ENGINE.plan(ask({"context": 1000, "parallel": 3}))
    assert plan.context == 1000
    assert (inner(plan.spec)["n_ctx"], inner(plan.spec)["n_parallel"]) == (1024 * 3, 3)


@pytest.mark.parametrize(
    ("settings", "size"), [({"parallel": 3}, 510), ({"parallel": 3, "ubatch": 100}, 99), ({}, 512)]
)
def test_slots_part_what_is_worked_through_at_a_time_evenly(ask: Any, settings: dict[str, Any], size: int) -> None:
    assert inner(ENGINE.plan(ask(settings)).spec)["n_ubatch"] == size  # else llama.cpp aborts where it takes means


def test_a_context_beyond_what_the_model_knows_is_capped_unless_its_positions_are_scaled(ask: Any) -> None:
    capped, known = ENGINE.plan(ask({"context": 100_000})), ENGINE.plan(ask({"context": 8192}))
    assert (capped.context, capped.memory) == (8192, known.memory)
    assert ENGINE.plan(ask({"context": 16_384, "rope_freq_scale": 0.5})).context == 16_384


def test_a_context_that_is_too_large_to_be_one_is_refused_with_both_bounds() -> None:
    with pytest.raises(UsageError) as refused:
        ENGINE.validate({"context": 99_999_999})
    assert refused.value.hint == "It must be a whole number from 0 to 16777216."


def test_an_unknown_parameter_names_its_closest_match() -> None:
    with pytest.raises(UsageError, match="n_btach") as caught:
        ENGINE.validate({"n_btach": 5})
    assert caught.value.data["closest"] == "n_batch"
    assert "n_batch" in (caught.value.hint or "")


@pytest.mark.parametrize("name", sorted(params.REFUSED))
def test_refused_parameters_say_why(name: str) -> None:
    if name in params.ALIASES.values():
        pytest.skip("an alias gives it a meaning of its own")
    with pytest.raises(UsageError, match="cannot be set"):
        ENGINE.validate({name: "x"})


@pytest.mark.parametrize(
    ("given", "value", "name", "result"),
    [
        ("--ctx-size", "4096", "context", 4096),
        ("-ngl", 0, "n_gpu_layers", 0),
        ("n_batch", 64.0, "n_batch", 64),
        ("warmup", "off", "warmup", False),
        ("cache-type-k", "q8_0", "cache_type_k", "GGML_TYPE_Q8_0"),
        ("flash_attn", "on", "flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_ENABLED"),
        ("temp", "0.5", "sampling.temp", 0.5),
        ("threads", 3, "cpuparams.n_threads", 3),
        ("default_template_kwargs", '{"a": "b"}', "default_template_kwargs", {"a": "b"}),
        ("lora", "a.gguf=0.5,b.gguf", "lora", [{"file": "a.gguf", "scale": 0.5}, {"file": "b.gguf", "scale": 1.0}]),
    ],
)
def test_names_and_values_become_those_of_the_engine(given: str, value: Any, name: str, result: Any) -> None:
    assert ENGINE.validate({given: value}) == {name: result}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_batch", "many"),
        ("n_batch", 1.5),
        ("n_batch", True),
        ("n_batch", float("inf")),
        ("n_batch", 10**400),
        ("warmup", "maybe"),
        ("cache_type_k", "q9_9"),
        ("cache_type_k", 10**9),
        ("context", -1),
        ("parallel", 0),
        ("chat_template", "a\0b"),
        ("lora", [{"scale": 1}]),
        ("tensor_split", {"a": 1}),
        ("tensor_split", [object()]),
        ("tensor_split", "[" * 100_000),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        ENGINE.validate({name: value})


@pytest.mark.parametrize("settings", [{"lora": "x.gguf"}, {"lora": "../../etc/passwd"}, {"mmproj": "/etc/passwd"}])
def test_only_files_of_the_model_can_be_named(ask: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="has no file"):
        ENGINE.plan(ask(settings))


def test_adapters_and_projectors_of_the_model_are_used_by_themselves(ask: Any) -> None:
    more = (ModelFile("a.gguf", 10, role="lora"), ModelFile("p.gguf", 10, role="mmproj"))
    got = inner(ENGINE.plan(ask({}, 4 * GIB, *more)).spec)
    assert got["lora"] == [{"file": "a.gguf", "scale": 1.0}]
    assert got["mmproj"] == "p.gguf"


@given(st.text())
def test_any_text_survives_the_expansion_of_places(text: str) -> None:
    text = text.replace("\0", "") + "$(SOCKET) $$(MODEL_DIR) $("
    spec = ENGINE._spec(PlanRequest("r", "m", Path("/m"), (), {}), {"chat_template": text}, 1)
    assert inner(spec) == {"chat_template": text}


def test_embeddings_are_on_by_default_and_can_be_turned_off(ask: Any) -> None:
    assert inner(ENGINE.plan(ask({})).spec)["embedding"] is True
    assert inner(ENGINE.plan(ask({"embeddings": False})).spec)["embedding"] is False


def test_embeddings_of_a_model_that_writes_are_counted_where_they_are_asked_for(ask: Any) -> None:
    """All logits of a text are worked out for one; where nobody says, the limit leaves room for that."""
    plain, asked = ENGINE.plan(ask({})), ENGINE.plan(ask({"embeddings": True}))
    vocabulary = ask({}).metadata["vocab_size"]
    assert asked.memory - plain.memory > 7 * 512 * vocabulary
    assert asked.spec.limits == plain.spec.limits
    assert plain.spec.limits.memory > asked.memory


def test_rerank_is_a_mode(ask: Any) -> None:
    got = inner(ENGINE.plan(ask({"rerank": True})).spec)
    assert (got["embedding"], got["pooling_type"]) == (True, "LLAMA_POOLING_TYPE_RANK")
    assert "rerank" not in got


def test_every_parameter_of_the_wheel_is_settable_or_refused_or_a_group() -> None:
    groups = {*params.GROUPS, "mmproj", "diffusion"}
    names = {name for name in dir(xllamacpp.CommonParams()) if not name.startswith("_")}
    assert names - params.table().keys() - params.REFUSED.keys() - groups == set()
    assert params.REFUSED.keys() <= names, "refused, but the engine has it no more"
    for alias, name in params.ALIASES.items():
        assert name in params.SPECIAL or name in params.table(), alias


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(sorted({*params.ALIASES, *params.table(), *params.REFUSED})) | st.text(max_size=20)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(NAMES, ANY, max_size=4))
def test_any_settings_give_a_plan_or_a_refusal(ask: Any, settings: dict[str, Any]) -> None:
    try:
        plan = ENGINE.plan(ask(settings))
    except PierError:
        return
    assert plan.memory > 0
    inner(plan.spec)


@contextlib.asynccontextmanager
async def running(asked: PlanRequest) -> AsyncIterator[str]:
    """The socket of a real engine started as planned."""
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        instance = await ProcessRuntime(Path(folder), RuntimeSettings()).start(ENGINE.plan(asked).spec)
        try:
            await wait_ready(instance, timeout=60)
            yield instance.socket
        finally:
            await instance.stop()


async def post(socket: str, path: str, body: dict[str, Any]) -> Any:
    """The engine's answer as JSON."""
    text = json.dumps(body).encode()
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_unix_connection(socket)
        writer.write(b"POST %b HTTP/1.0\r\nHost: e\r\n" % path.encode())
        writer.write(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        head = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"(?i)content-length: (\d+)", head)
        reply = await reader.readexactly(int(size[1])) if size else await reader.read()
        writer.close()
        await writer.wait_closed()
    assert b" 200 " in head.partition(b"\r\n")[0], reply
    return json.loads(reply)


async def test_odd_settings_start_for_real(ask: Any) -> None:
    odd = {"context": 300, "n_batch": 64, "cache_type_k": "q8_0", "flash_attn": "on", "parallel": 2, "seed": 7}
    async with running(ask(odd)) as socket:
        assert await healthy(socket)


STRICT = (  # as some families have it: turns must alternate, no system turn, text or parts, an answer is trimmed
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}{{ '</turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
TIDE: dict[str, Any] = {"type": "object", "properties": {"hour": {"type": "integer"}}, "required": ["hour"]}


@pytest.fixture(params=["own", "strict"])
def taught(request: pytest.FixtureRequest, metadata: dict[str, Any], ask: Any) -> Any:
    template = metadata["chat_template"] if request.param == "own" else STRICT
    asked: PlanRequest = ask({"context": 1024})
    return template, dataclasses.replace(asked, metadata={**metadata, "chat_template": template})


async def test_the_prelude_leaves_prompts_alone_and_teaches_calls(taught: Any) -> None:
    template, asked = taught
    plain = dataclasses.replace(asked, replica="r2", settings={**asked.settings, "chat_template": template})
    talk = [
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "{%"},
        {"role": "user", "content": "é"},
    ]
    tools = [{"type": "function", "function": {"name": "tide", "parameters": TIDE}}]
    call = {"id": "c", "type": "function", "function": {"name": "tide", "arguments": '{"hour": 3}'}}
    results = [{"role": "tool", "tool_call_id": "c", "content": f"{n} m"} for n in (1, 2)]
    async with running(plain) as before, running(asked) as after:
        shown = [await post(s, "/apply-template", {"messages": talk}) for s in (before, after)]
        assert shown[0] == shown[1]
        both = {"messages": [talk[0], {"role": "assistant", "content": None, "tool_calls": [call, call]}, *results]}
        prompt = (await post(after, "/apply-template", {**both, "tools": tools}))["prompt"]
        assert prompt.count("<tool_call>[") == 2  # how to call, and the call
        assert "<tool_response>1 m</tool_response>\n<tool_response>2 m</tool_response>" in prompt
        forced = [talk[0], {"role": "assistant", "content": ENGINE.plan(asked).spec.call_prefix}]
        body = {"messages": forced, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        answer = await post(after, "/v1/chat/completions", {**body, "max_tokens": 100, "temperature": 0})
        (made,) = answer["choices"][0]["message"]["tool_calls"]
        assert isinstance(json.loads(made["function"]["arguments"])["hour"], int)


def test_a_template_that_knows_tools_or_that_the_user_gave_is_left_alone(ask: Any, metadata: dict[str, Any]) -> None:
    knows = dataclasses.replace(ask({}), metadata={**metadata, "chat_template": "{% if tools %}{% endif %}"})
    for asked in (knows, ask({"chat_template": "{{ messages }}"})):
        plan = ENGINE.plan(asked)
        assert plan.spec.call_prefix == ""
        assert inner(plan.spec).get("chat_template") == asked.settings.get("chat_template")


def test_a_plan_says_what_the_model_is_for(ask: Any) -> None:
    def work(**settings: Any) -> set[str]:
        return {name for name in ENGINE.plan(ask(settings)).spec.serves if not name.startswith("llamacpp-")}

    assert work() == {"chat", "completions", "embeddings"}
    assert work(embedding=False) == {"chat", "completions"}
    assert work(rerank=True) == set()
    assert "llamacpp-rerank" in ENGINE.plan(ask({"rerank": True})).spec.serves


def test_threads_that_wait_leave_the_processor_to_other_engines(ask: Any) -> None:
    # libgomp's own number for "there are more threads than processors", which it cannot know of other programs
    assert ENGINE.plan(ask({})).spec.env["GOMP_SPINCOUNT"] == "1000"
