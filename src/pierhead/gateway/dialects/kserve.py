"""The Open Inference Protocol V2 over HTTP, with Triton's generate extension, on an OpenAI engine; pure.

``text_input`` is a prompt as it is, without a chat template, as with Triton's engines for text.
"""

from __future__ import annotations

import difflib
from collections.abc import Generator
from typing import Any

import msgspec

from pierhead.gateway.dialects import kserve_models
from pierhead.gateway.dialects.base import JSON, SSE, Call, Facts, Reply, Save, Send, Steps
from pierhead.gateway.dialects.kserve_tensors import BINARY, HEADER, InferRequest, Output, read, written
from pierhead.gateway.dialects.ollama_chunks import chunks
from pierhead.gateway.faults import Fault, bad_request
from pierhead.gateway.usage import Usage

_SAMPLING: dict[str, tuple[str, type]] = {
    "max_tokens": ("max_tokens", int),
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "seed": ("seed", int),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "stop": ("stop", list),
}
_OTHER = frozenset({"binary_data_output", "stream"})
_MOST = 64  # prompts of one request


class Infer:
    """One ``infer``: n texts in, n texts, vectors or scores out."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts, role: str) -> None:
        self._facts = facts
        self._role = role
        self._request = InferRequest(inputs=[])
        self._before: list[str] = []

    def steps(self, body: bytes) -> Steps:
        self._request, texts = read(body, self._facts.headers.get(HEADER))
        names = {"query", "documents"} if self._role == "rerank" else {"text_input"}
        _names("input", texts, names)
        output = {"text": "text_output", "embedding": "embedding", "rerank": "score"}[self._role]
        _names("output", [wanted.name for wanted in self._request.outputs], {output}, missing=False)
        if self._role == "text":
            return (yield from self._text(texts["text_input"]))
        _only(self._request.parameters, frozenset())
        if self._role == "embedding":
            made = {"model": self._facts.model, "input": texts["text_input"]}
            return Send("embeddings", msgspec.json.encode(made))
        if len(texts["query"]) != 1:
            raise bad_request("the input 'query' must be one text.", param="inputs")
        made = {"model": self._facts.model, "query": texts["query"][0], "documents": texts["documents"]}
        operation = "rerank" if "rerank" in self._facts.serves else "llamacpp-rerank"
        return Send(operation, msgspec.json.encode(made))

    def _text(self, prompts: list[str]) -> Generator[Call, bytes | None, Send]:
        """All but the last prompt one after the other; the last is what the answer is made with."""
        if len(prompts) > _MOST:
            raise bad_request(f"a request may have {_MOST} prompts, this one has {len(prompts)}.", param="inputs")
        members = sampling(self._request.parameters, self._facts, len(prompts))
        bodies = [msgspec.json.encode({"model": self._facts.model, "prompt": text, **members}) for text in prompts]
        for one in bodies[:-1]:
            self._before.append(_written((yield Call("completions", one)) or b""))
        return Send("completions", bodies[-1])

    def answer(self, body: bytes, usage: Usage) -> Reply:
        if self._role == "text":
            texts = [*self._before, _written(body)]
            output = Output("text_output", "BYTES", [len(texts)], texts)
        elif self._role == "embedding":
            rows = [row.embedding for row in sorted(_read(body, _Vectors).data, key=lambda row: row.index)]
            flat = [x for row in rows for x in row]
            output = Output("embedding", "FP32", [len(rows), len(rows[0]) if rows else 0], flat)
        else:
            found = sorted(_read(body, _Ranked).results, key=lambda one: one.index)
            output = Output("score", "FP32", [len(found)], [one.relevance_score for one in found])
        made, cut = written(self._facts.model, self._request, output)
        if not cut:
            return Reply(made)
        return Reply(made, kind=BINARY, headers=b"Inference-Header-Content-Length: %d\r\n" % cut)

    def events(self, data: bytes) -> bytes:
        return b""

    def end(self, usage: Usage) -> bytes:
        return b""


class Generate:
    """One ``generate`` or ``generate_stream``: a prompt and its parameters as plain JSON."""

    kind = SSE
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._streams = facts.operation.name == "generate-stream"
        self._id = ""

    def steps(self, body: bytes) -> Steps:
        try:
            given = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
            raise bad_request(f"the request cannot be used: {exc}.", code="invalid_json") from exc
        prompt, self._id = given.pop("text_input", None), given.pop("id", "")
        own: Any = given.pop("parameters", None) or {}
        if not isinstance(prompt, str) or not isinstance(own, dict) or not isinstance(self._id, str):
            raise bad_request("send 'text_input' as a string and 'parameters' as an object.", param="text_input")
        members = sampling({**own, **given}, self._facts, 1)
        made: dict[str, Any] = {"model": self._facts.model, "prompt": prompt, **members}
        if self._streams:
            made |= {"stream": True, "stream_options": {"include_usage": True}}
        yield from ()
        return Send("completions", msgspec.json.encode(made), self._streams)

    def _told(self, text: str) -> dict[str, Any]:
        about = {"id": self._id} if self._id else {}
        return {**about, "model_name": self._facts.model, "model_version": "1", "text_output": text}

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return msgspec.json.encode(self._told(_written(body)))

    def events(self, data: bytes) -> bytes:
        texts = [chunk.text for chunk in chunks(data)]
        return b"".join(b"data: " + msgspec.json.encode(self._told(text)) + b"\n\n" for text in texts if text)

    def end(self, usage: Usage) -> bytes:
        return b""


# --- requests ---------------------------------------------------------------------------------------------------------


def sampling(given: dict[str, Any], facts: Facts, answers: int) -> dict[str, Any]:
    """The engine's members for parameters; the key's bound on the answer is shared by all ``answers``."""
    made: dict[str, Any] = {}
    _only(given, frozenset(_SAMPLING))
    for name, value in given.items():
        if name in _OTHER:
            continue
        member, kind = _SAMPLING[name]
        if kind is list:
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):  # pyright: ignore[reportUnknownVariableType]
                raise bad_request("the parameter 'stop' must be a string.", param=name)
            made[member] = texts
        elif isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
            raise bad_request(f"the parameter '{name}' must be a number.", param=name)
        else:
            made[member] = kind(value)
    if facts.cap:
        most = max(1, facts.cap // answers)
        limit = made.get("max_tokens", most)
        made["max_tokens"] = min(limit, most) if limit >= 0 else most
    return made


def _only(given: dict[str, Any], known: frozenset[str]) -> None:
    for name in given:
        if name not in known and name not in _OTHER:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise bad_request(f"there is no parameter '{name[:60]}' for this model.{hint}", param=name[:60])


def _names(what: str, given: Any, known: set[str], *, missing: bool = True) -> None:
    for name in given:
        if name not in known:
            raise bad_request(f"the model has no {what} '{name[:60]}'; it has {', '.join(sorted(known))}.")
    if missing and known - set(given):
        raise bad_request(f"the {what} '{sorted(known - set(given))[0]}' is missing.", param=f"{what}s")


# --- answers ----------------------------------------------------------------------------------------------------------


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Vectors(msgspec.Struct):
    data: list[_Vector]


class _Score(msgspec.Struct):
    index: int
    relevance_score: float


class _Ranked(msgspec.Struct):
    results: list[_Score]


class _Choice(msgspec.Struct):
    text: str = ""


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def _written(body: bytes) -> str:
    choices = _read(body, _Completion).choices
    return choices[0].text if choices else ""


def _read(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise Fault(502, "engine_failed", f"the engine's answer cannot be read: {exc}.", source="engine") from exc


def make(facts: Facts) -> Infer | None:
    """The translation for an engine that writes text, makes vectors or ranks."""
    role = kserve_models.role(facts.serves)
    return Infer(facts, role) if role else None


def make_generate(facts: Facts) -> Generate | None:
    """The same for text alone."""
    return Generate(facts) if "completions" in facts.serves else None
