"""Reads how many tokens an engine says it used, from the end of its answer; never changes the answer."""

from __future__ import annotations

import msgspec


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Timings(msgspec.Struct):
    prompt_n: int = 0
    cache_n: int = 0
    predicted_n: int = 0


_usage = msgspec.json.Decoder(_Usage).decode
_timings = msgspec.json.Decoder(_Timings).decode


def _object(text: bytes, member: bytes) -> bytes:
    """The object that follows ``"member":``, by brace depth; text inside strings cannot spell an unescaped quote."""
    start = text.rfind(member)
    if start < 0:
        return b""
    start += len(member)
    end = start
    while 0 <= (end := text.find(b"}", end)) < start + 1024:
        end += 1
        if text.count(b"{", start, end) == text.count(b"}", start, end):
            return text[start:end]
    return b""


def tokens(tail: bytes) -> tuple[int, int]:
    """(prompt, completion) tokens out of the last kilobytes of an answer; (0, 0) when it does not say."""
    try:
        found = _object(tail, b'"usage":{'[:-1])
        if found:
            usage = _usage(found)
            return max(usage.prompt_tokens, 0), max(usage.completion_tokens, 0)
        found = _object(tail, b'"timings":')
        if found:
            timings = _timings(found)
            return max(timings.prompt_n + timings.cache_n, 0), max(timings.predicted_n, 0)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    return 0, 0
