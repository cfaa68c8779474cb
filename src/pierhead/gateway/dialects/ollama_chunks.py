"""What an engine's answer to Ollama's clients is made of: its chunks, tool calls and times; pure but for the clock."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from pierhead.gateway.dialects.base import Facts
from pierhead.gateway.faults import from_engine
from pierhead.gateway.usage import Usage


class _Named(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Named = msgspec.field(default_factory=_Named)


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # newer engines' word for the same
    tool_calls: list[_Call] | None = None


class _Probabilities(msgspec.Struct):
    content: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct):
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Probabilities | None = None


class Chunk(msgspec.Struct):
    """One event of a stream, or a whole answer; ``content`` and ``stop_type`` are llama.cpp's own."""

    choices: list[_Choice] = []
    timings: dict[str, float] = {}
    content: str = ""
    stop: bool = False
    stop_type: str = ""
    error: Any = None

    @property
    def _said(self) -> _Message | None:
        return (self.choices[0].delta or self.choices[0].message) if self.choices else None

    @property
    def text(self) -> str:
        said = self._said
        if said is not None:
            return said.content or ""
        return (self.choices[0].text or "") if self.choices else self.content

    @property
    def thought(self) -> str:
        said = self._said
        return (said.reasoning_content or said.reasoning or "") if said is not None else ""

    @property
    def calls(self) -> list[_Call]:
        said = self._said
        return said.tool_calls or [] if said is not None else []


_chunk = msgspec.json.Decoder(Chunk).decode


def chunks(data: bytes) -> list[Chunk]:
    """The chunks in whole server-sent events; Fault where one is the engine's error."""
    found: list[Chunk] = []
    for line in data.splitlines():
        if not line.startswith(b"data:"):
            if line.startswith(b"error:"):  # llama.cpp's older way to fail in a stream
                raise from_engine(502, line[6:].strip())
            continue
        line = line[5:].strip()
        if not line or line == b"[DONE]":
            continue
        try:
            chunk = _chunk(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            continue
        if chunk.error is not None:
            raise from_engine(502, line)
        found.append(chunk)
    return found


def finished(chunk: Chunk) -> str:
    """Ollama's word for why the answer ended; "" while it goes on."""
    if chunk.choices:
        reason = chunk.choices[0].finish_reason
        return "" if reason is None else "length" if reason == "length" else "stop"
    return ("length" if chunk.stop_type == "limit" else "stop") if chunk.stop else ""


def probabilities(chunk: Chunk) -> list[dict[str, Any]]:
    """Log probabilities as Ollama has them."""
    told = chunk.choices[0].logprobs if chunk.choices else None
    if told is None or not told.content:
        return []
    made: list[dict[str, Any]] = []
    for token in told.content:
        one = _token(token)
        top: Any = token.get("top_logprobs")
        if isinstance(top, list) and top:
            one["top_logprobs"] = [_token(t) for t in top if isinstance(t, dict)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        made.append(one)
    return made


def _token(token: dict[str, Any]) -> dict[str, Any]:
    made = {"token": token.get("token", ""), "logprob": token.get("logprob", 0.0)}
    return made | ({"bytes": token["bytes"]} if token.get("bytes") else {})


class Tools:
    """Collects the calls of an answer: Ollama tells each of them whole."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[str, list[str], list[str]]] = {}

    def add(self, chunk: Chunk) -> None:
        """Take what a chunk says of calls."""
        for number, call in enumerate(chunk.calls):
            index = call.index if call.index else number
            _, name, text = self._calls.setdefault(index, (call.id or f"call_{index}", [], []))
            name.append(call.function.name or "")
            text.append(call.function.arguments or "")

    def finish(self) -> tuple[list[dict[str, Any]], str]:
        """The calls, and as text those that broke off before their arguments were whole."""
        calls: list[dict[str, Any]] = []
        rest = ""
        for index, (id, names, texts) in sorted(self._calls.items()):
            name, text = "".join(names), "".join(texts)
            try:
                arguments = msgspec.json.decode(text or "{}", type=dict[str, Any])
            except (msgspec.MsgspecError, RecursionError):
                rest += f"{name}({text}"
                continue
            calls.append({"id": id, "function": {"index": index, "name": name, "arguments": arguments}})
        self._calls.clear()
        return calls, rest


class Clock:
    """When what happened: Ollama's durations, in nanoseconds."""

    def __init__(self, facts: Facts) -> None:
        self._clock = facts.clock
        self._started = facts.started or facts.clock()
        self._load = 0.0
        self._sent = 0.0
        self._first = 0.0
        self._second = -1
        self._prefix = ""
        self._wall = facts.created - self._started  # Unix time at the clock's zero, to the second

    def loaded(self) -> None:
        """The model runs, and the request is about to be sent to it."""
        self._sent = self._clock()
        self._load = self._sent - self._started

    def came(self) -> None:
        """The engine answered something."""
        if not self._first:
            self._first = self._clock()

    def stamp(self) -> str:
        """The time now, as ``created_at`` has it."""
        now = self._wall + self._clock()
        second = int(now)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{int((now - second) * 1e6):06d}Z"

    def figures(self, usage: Usage, timings: dict[str, float]) -> dict[str, int]:
        """Counts and durations; the engine's own, where it tells them, else as they were seen here."""
        now = self._clock()
        first = self._first or now
        prompt = timings.get("prompt_ms", (first - self._sent) * 1e3)
        text = timings.get("predicted_ms", (now - first) * 1e3)
        return {
            "total_duration": _nanoseconds(now - self._started),
            "load_duration": _nanoseconds(self._load),
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": _nanoseconds(prompt / 1e3),
            "eval_count": usage.completion,
            "eval_duration": _nanoseconds(text / 1e3),
        }


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
