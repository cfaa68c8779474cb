"""OpenVINO GenAI: its plans, what its program takes of a request, and text that ends where it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.conformance.test_engine import Sample

from pierhead.engines.base import Plan, PlanRequest
from pierhead.engines.openvino import OpenVino
from pierhead.engines.programs.openvino.asks import Refused, read
from pierhead.engines.programs.openvino.text import Words
from pierhead.errors import CorruptData, OutOfMemory, UsageError
from pierhead.formats.reading import File
from pierhead.formats.summarize import summarize
from pierhead.store.classify import classify

HERE = Path(__file__).parent
GIB = 1 << 30
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def plan(free: int = 8 * GIB, trained: int | None = None, **settings: Any) -> Plan:
    text = (HERE.parent / "conformance" / "engines" / "openvino.json").read_bytes()
    given = msgspec.json.decode(text, type=Sample)
    metadata = given.metadata | {"context_length": trained}
    return OpenVino().plan(PlanRequest("r1", "m", Path("/m"), given.files, metadata, settings, free, 2))


def told(made: Plan) -> dict[str, Any]:
    return json.loads(made.spec.argv[-1])


def test_the_cache_holds_all_requests_and_is_counted() -> None:
    made, twice = plan(context=1024, parallel=2), plan(context=1024, parallel=4)
    assert told(made)["scheduler"]["num_kv_blocks"] == 2 * 33
    per_token = 30 * 3 * 128 * 1.19
    assert 0.9 < (twice.memory - made.memory) / (2 * 33 * 32 * per_token) < 1.1
    assert plan(context=1024, kv_cache_precision="f16").memory > plan(context=1024).memory


def test_where_nobody_names_a_context_the_largest_that_fits_is_taken() -> None:
    assert plan().context == 8192
    assert 512 <= plan(550 << 20).context < 8192
    with pytest.raises(OutOfMemory):
        plan(300 << 20)


def test_a_context_beyond_what_the_model_knows_is_capped() -> None:
    made, known = plan(context=200_000, trained=4096), plan(context=4096)
    assert (made.context, made.memory) == (4096, known.memory)


def test_a_gpu_is_asked_for_by_its_cdi_name_and_a_wrong_device_is_refused() -> None:
    assert plan(device="gpu").spec.devices == ("intel.com/gpu=all",)
    assert "INFERENCE_NUM_THREADS" not in told(plan(device="gpu"))["properties"]
    with pytest.raises(UsageError, match="device") as refused:
        plan(device="tpu")
    assert "cpu or gpu" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("openvino_model.xml", ("weights", "openvino")),
        ("a/openvino_tokenizer.xml", ("weights", "openvino")),
        ("openvino_model.bin", ("weights", "data")),
        ("pytorch_model.bin", ("weights", "pytorch")),
        ("notes.xml", ("other", "")),
    ],
)
def test_its_files_are_known_by_their_names(name: str, found: tuple[str, str]) -> None:
    assert classify(name) == found


def test_a_graph_tells_what_it_caches_and_how_it_chats(tmp_path: Path) -> None:
    kept = "".join(
        f'<data variable_id="past_key_values.{n}.{what}" variable_type="f32" variable_shape="?,3,?,64" />'
        for n in range(4)
        for what in ("key", "value")
    )
    files = {
        "openvino_model.xml": f"<?xml version='1.0'?><net>{' ' * (1 << 20)}{kept}</net>",
        "openvino_model.bin": "x" * 100,
        "openvino_tokenizer.xml": '<net><rt_info><chat_template value="{{ &apos;a&apos; }}&#10;" /></rt_info></net>',
        "openvino_tokenizer.bin": "x",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    listed = [File(name, len(text), *classify(name)) for name, text in files.items()]
    summary = summarize(listed, {name: tmp_path / name for name in files})
    assert (summary["format"], summary["layers"], summary["heads_kv"], summary["head_dim_k"]) == ("openvino", 4, 3, 64)
    assert summary["chat_template"] == "{{ 'a' }}\n"
    assert summary["weights_bytes"] == 101
    with pytest.raises(CorruptData, match="without its"):
        summarize([f for f in listed if f.name != "openvino_model.bin"], {n: tmp_path / n for n in files})


def test_sampling_is_greedy_at_zero_and_random_without_a_seed() -> None:
    assert read({**ASK, "temperature": 0, "top_p": 0.5}, True).sampling == {"do_sample": False}
    seeds = {read(ASK, True).sampling["rng_seed"] for _ in range(3)}
    assert len(seeds) == 3
    given = read({**ASK, "seed": 7, "temperature": 0.5, "top_k": 4, "min_p": 0.1}, True).sampling
    assert given == {"rng_seed": 7, "temperature": 0.5, "top_k": 4, "min_p": 0.1, "do_sample": True}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_p": "much"}, "top_p"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": []}}, "response_format"),
        ({"stream_options": []}, None),
        ({"chat_template_kwargs": 3}, "stream_options"),
    ],
)
def test_what_cannot_be_expressed_is_refused(body: dict[str, Any], param: str | None) -> None:
    if param is None:
        assert read({**ASK, **body}, True).usage is False
        return
    with pytest.raises(Refused) as refused:
        read({**ASK, **body}, True)
    assert refused.value.param == param


def letters(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def said(text: str, *stops: str) -> tuple[str, bool]:
    words = Words(letters, stops)
    parts: list[str] = []
    for token in text.encode():
        parts.append(words.add([token]))
        if words.stopped:
            return "".join(parts), True
    return "".join(parts) + words.end(), words.stopped


def test_characters_come_whole() -> None:
    words = Words(letters, ())
    assert [words.add([b]) for b in "é!".encode()] == ["", "é", "!"]


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [
        ("one two three", ("two",), ("one ", True)),
        ("one two three", ("twx",), ("one two three", False)),
        ("aaab", ("aab",), ("a", True)),
        ("a STO", ("STOP",), ("a STO", False)),
        ("x é y", ("é",), ("x ", True)),
        ("x", (), ("x", False)),
    ],
)
def test_nothing_of_a_stop_string_is_ever_told(text: str, stops: tuple[str, ...], found: tuple[str, bool]) -> None:
    assert said(text, *stops) == found
