"""Streams on their way through: only the usage that nobody asked for goes, and it is read wherever it is told."""

from __future__ import annotations

import json

import pytest

from pierhead.gateway.metrics import ModelStats
from pierhead.gateway.stream import Stream
from pierhead.gateway.usage import Usage, of_whole

WORD = b'data: {"choices":[{"delta":{"content":"Ahoy"}}]}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}'
DONE = b"data: [DONE]"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_the_usage_goes_and_all_else_stays_however_it_is_cut_and_its_lines_end(end: bytes, size: int) -> None:
    stream = Stream(ModelStats(), 0.0, sse=True, strip=True, translation=None)
    whole = end.join((WORD, WORD, USAGE, DONE, b""))
    got = b"".join(stream.feed(whole[at : at + size]) for at in range(0, len(whole), size))
    rest = stream.finish(True)
    assert rest is not None
    assert got + rest == end.join((WORD, WORD, DONE, b""))
    assert stream.usage == Usage(5, 2, 0, True)


@pytest.mark.parametrize("size", [100, 100_000])
def test_the_usage_of_vectors_is_found_before_them(size: int) -> None:
    vectors = [{"embedding": [0.123456789] * 2000, "index": 0}]
    body = json.dumps({"model": "m", "usage": {"prompt_tokens": 7, "total_tokens": 7}, "data": vectors}).encode()
    assert of_whole(body) == Usage(7, 0, 0, True)
    stream = Stream(ModelStats(), 0.0, sse=False, strip=False, translation=None)
    for at in range(0, len(body), size):
        stream.feed(body[at : at + size])
    assert stream.usage == Usage(7, 0, 0, True)
