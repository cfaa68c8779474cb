"""Reads how many tokens an engine says it used, from the end of its answer; never changes the answer."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from pierhead.gateway.reported import Counts, counts, timings


class Usage(NamedTuple):
    """Tokens of one answer as the engine counts them; ``cached`` ones are part of ``prompt``. ``known``: it said so."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    known: bool = False


def plus(one: Usage, other: Usage) -> Usage:
    """What both together used."""
    known = one.known or other.known
    return Usage(one.prompt + other.prompt, one.completion + other.completion, one.cached + other.cached, known)


NOTHING: Final = Usage()
_MOST: Final = 1 << 31  # tokens of one answer
_ENOUGH: Final = 4096  # bytes at either end of an answer in which its usage is looked for


def _object(text: bytes, member: bytes) -> bytes:
    """The object that follows ``"member":``, by brace depth; text inside strings cannot spell an unescaped quote."""
    start = text.rfind(member)
    if start < 0:
        return b""
    start += len(member)
    end = text.find(b"}", start) + 1
    if start < end <= start + 1024 and text.find(b"{", start, end) == start and text.rfind(b"{", start, end) == start:
        return text[start:end]  # the usual one has no other inside
    end = start
    while 0 <= (end := text.find(b"}", end)) < start + 1024:
        end += 1
        if text.count(b"{", start, end) == text.count(b"}", start, end):
            return text[start:end]
    return b""


def _of(usage: Counts) -> Usage:
    cached = usage.cache_read_input_tokens or 0
    for details in (usage.prompt_tokens_details, usage.input_tokens_details):
        if details is not None:
            cached = details.cached_tokens or cached
    prompt = usage.prompt_tokens or usage.input_tokens
    if usage.cache_read_input_tokens or usage.cache_creation_input_tokens:  # Anthropic counts these apart
        prompt += (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    completion = usage.completion_tokens or usage.output_tokens
    return _told(prompt, completion, cached)


def _told(prompt: int, completion: int, cached: int) -> Usage:
    """What an engine says, within reason: it is not trusted."""
    if 0 <= cached <= prompt <= _MOST and 0 <= completion <= _MOST:
        return Usage(prompt, completion, cached, True)
    prompt, completion = min(max(prompt, 0), _MOST), min(max(completion, 0), _MOST)
    return Usage(prompt, completion, min(max(cached, 0), prompt), True)


def tokens(tail: bytes) -> Usage:
    """The usage in the last kilobytes of an answer; ``known`` is false when it does not say."""
    try:
        found = _object(tail, b'"usage":')
        if found:
            return _of(counts(found))
        found = _object(tail, b'"timings":')
        if found:
            seen = timings(found)
            return _told(seen.prompt_n + seen.cache_n, seen.predicted_n, seen.cache_n)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    return NOTHING


def of_whole(body: bytes) -> Usage:
    """The usage in a whole answer, which may tell it before a long list of vectors or ranks."""
    found = tokens(body[-_ENOUGH:])
    return found if found.known or len(body) <= _ENOUGH else tokens(body[:_ENOUGH])


def merged(began: Usage, ended: Usage) -> Usage:
    """The usage of a stream whose beginning tells the prompt, and its end the answer, or both once more."""
    if not ended.known:
        return began
    return ended if ended.prompt else Usage(began.prompt, ended.completion, began.cached, True)


def finish(tail: bytes) -> str:
    """Why an answer ended, as its engine says, out of its last kilobytes; "" when it does not."""
    for member in (b'"finish_reason":', b'"stop_reason":', b'"done_reason":'):
        end = len(tail)
        while (start := tail.rfind(member, 0, end)) >= 0:
            before, quote, word = tail[start + len(member) : start + len(member) + 42].partition(b'"')
            if quote and not before.strip():
                return word.partition(b'"')[0].decode("latin-1")
            end = start
    return ""
