"""An engine's answers to chat requests, whole and streamed, as the translations of other dialects read them; pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import msgspec

from pierhead.gateway.faults import Fault, from_engine

_LONGEST = 64 << 20  # bytes of one event


class Function(msgspec.Struct):
    """The function of a call; in a stream its arguments come in pieces."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """A call, or a piece of the call with this index."""

    index: int = 0
    id: str | None = None
    function: Function | None = None


class Message(msgspec.Struct):
    """An answer, or the next piece of one. Engines spell the reasoning in two ways."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def thought(self) -> str:
        """What the model thought before it answered."""
        return self.reasoning_content or self.reasoning or ""


class LogProbs(msgspec.Struct):
    """OpenAI's log probabilities of the answer's tokens."""

    content: list[dict[str, Any]] | None = None


class Choice(msgspec.Struct):
    """One answer of several; ``stop_reason`` is vLLM's: the stop string that was met."""

    index: int = 0
    message: Message | None = None
    delta: Message | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: LogProbs | None = None


class Progress(msgspec.Struct):
    """How far llama.cpp is with the prompt, in tokens; ``cache`` of ``total`` were in its cache."""

    total: int = 0
    cache: int = 0
    processed: int = 0


class Verbose(msgspec.Struct):
    """What llama.cpp adds when it is asked to be verbose: the stop string that was met."""

    stopping_word: str = ""


class Chunk(msgspec.Struct):
    """A whole answer, or one event of a stream."""

    choices: list[Choice] = []
    prompt_progress: Progress | None = None
    verbose: Verbose | None = msgspec.field(name="__verbose", default=None)
    error: Any = None

    @property
    def first(self) -> Choice | None:
        """The first answer, the only one that these translations ask for."""
        return next((choice for choice in self.choices if not choice.index), None)

    @property
    def stopped_by(self) -> str:
        """The stop string that ended the answer, where the engine says it."""
        if self.verbose is not None and self.verbose.stopping_word:
            return self.verbose.stopping_word
        choice = self.first
        return choice.stop_reason if choice is not None and isinstance(choice.stop_reason, str) else ""


_decode = msgspec.json.Decoder(Chunk).decode


def whole(body: bytes) -> tuple[Chunk, Choice, Message]:
    """A whole answer; Fault 502 when it is not one."""
    chunk = _read(body)
    choice = chunk.first
    if choice is None or choice.message is None:
        raise _odd("it holds no answer")
    return chunk, choice, choice.message


def _read(data: bytes) -> Chunk:
    try:
        return _decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise _odd(str(exc)) from exc


def _odd(why: str) -> Fault:
    return Fault(502, "engine_error", f"the engine's answer cannot be understood: {why}.", source="engine")


class Chunks:
    """Makes chunks of server-sent events, wherever they are cut; Fault for an event that tells of a failure."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that are whole by now."""
        if self._held:
            data = self._held + data
        if b"\r" in data:
            data = _line_ends(data)
        cut = data.rfind(b"\n\n") + 2
        if cut < 2:
            cut = 0
        self._held = data[cut:]
        if len(self._held) > _LONGEST:
            raise _odd("one of its events is too long")
        for event in data[:cut].split(b"\n\n"):
            if event:
                yield from _of_event(event)

    def rest(self) -> Iterator[Chunk]:
        """What a last event without its blank line holds."""
        held, self._held = self._held, b""
        if held.strip():
            yield from _of_event(held.rstrip(b"\r\n"))


def _line_ends(data: bytes) -> bytes:
    """Plain newlines; a CR at the end stays, as its LF may come yet."""
    tail = b"\r" if data.endswith(b"\r") else b""
    return data[: len(data) - len(tail)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + tail


def _of_event(event: bytes) -> Iterator[Chunk]:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    text = b"\n".join(lines)
    if not text or text == b"[DONE]":
        return
    chunk = _read(text)
    if chunk.error is not None:
        raise from_engine(_status(chunk.error), text)
    yield chunk


def _status(error: Any) -> int:
    code = cast("dict[str, Any]", error).get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 502


def prefill(messages: list[dict[str, Any]]) -> str:
    """What an answer is made to begin with: llama.cpp goes on from an assistant's last message, and says it again."""
    if not messages:
        return ""
    last = messages[-1]
    text = last["content"] if last["role"] == "assistant" and "tool_calls" not in last else ""
    return text if isinstance(text, str) else ""


def calls(message: Message) -> list[tuple[str, str, str]]:
    """(id, name, arguments as JSON text) of the calls of a whole answer."""
    return [
        (call.id or "", call.function.name or "", call.function.arguments or "{}")
        for call in message.tool_calls or ()
        if call.function is not None
    ]


def event(name: str, value: dict[str, Any]) -> bytes:
    """A named server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(value))
