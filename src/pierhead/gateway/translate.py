"""Runs a translation's steps against an engine and the store of answers; knows no dialect."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any, cast

from pierhead.gateway.dialects.base import Call, Early, Facts, Keep, Load, Make, Reply, Send, Steps, Translation
from pierhead.gateway.faults import Fault
from pierhead.gateway.fetch import fetch
from pierhead.gateway.operations import OPERATIONS, known
from pierhead.gateway.usage import NOTHING, Usage, of_whole, plus

if TYPE_CHECKING:
    from pierhead.gateway.admission import Admitted
    from pierhead.gateway.services import Services
    from pierhead.gateway.upstream import Target

# Operation → where its translation is made (``Make``). Imported when a request first needs it.
TRANSLATIONS: dict[str, str] = {
    "chat": "pierhead.gateway.dialects.to_anthropic:make",
    "messages": "pierhead.gateway.dialects.anthropic:make",
    "count-tokens": "pierhead.gateway.dialects.anthropic:make_count",
    "responses": "pierhead.gateway.dialects.responses:make",
    "input-tokens": "pierhead.gateway.dialects.responses:make_count",
    "rerank": "pierhead.gateway.dialects.ranking:make",
    "score": "pierhead.gateway.dialects.ranking:make_score",
    "classify": "pierhead.gateway.dialects.classify:make",
    "tokenize": "pierhead.gateway.dialects.tokens:make",
    "detokenize": "pierhead.gateway.dialects.tokens:make_detokenize",
    "infer": "pierhead.gateway.dialects.kserve:make",
    "generate": "pierhead.gateway.dialects.kserve:make_generate",
    "generate-stream": "pierhead.gateway.dialects.kserve:make_generate",
    "ollama-chat": "pierhead.gateway.dialects.ollama_text:make",
    "ollama-generate": "pierhead.gateway.dialects.ollama_text:make",
    "ollama-embed": "pierhead.gateway.dialects.ollama_embed:make",
    "ollama-embeddings": "pierhead.gateway.dialects.ollama_embed:make",
}
# Operation → what may answer a request before its model is started (``Early``).
EARLY: dict[str, str] = {
    "ollama-chat": "pierhead.gateway.dialects.ollama_text:unload",
    "ollama-generate": "pierhead.gateway.dialects.ollama_text:unload",
}
_CHAINED = "pierhead.gateway.dialects.chain:through_chat"
_CALL_TIMEOUT = 120.0
_CALL_MAX = 64 << 20
_WORK = frozenset(("embeddings", "rerank", "llamacpp-rerank"))  # what counts of the calls that write no text
_FREE = Usage(known=True)
# Ollama's clients send keep_alive as a matter of course: a key that may not change the model's life for all is served.
_NOT_KEPT = b"x-pierhead-keep-alive: ignored\r\n"


def _made(where: str | None) -> Any:
    if where is None:
        return None
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def may_be_early(operation: str, body: list[bytes]) -> bool:
    """Whether a look at this body is worth it before its model is started."""
    return operation in EARLY and any(b"keep_alive" in piece for piece in body)


async def early(services: Services, request: Admitted, facts: Facts, body: list[bytes]) -> Reply | None:
    """The answer to a request that needs no engine, such as one that wants its model unloaded; None for all others.

    Fault 403 for a key that may not do so: a model that others use is not its to unload.
    """
    find = cast("Early", _made(EARLY[facts.operation.name]))
    found = await asyncio.to_thread(lambda: find(b"".join(body), facts))
    if found is None:
        return None
    keep, reply = found
    if request.holder is not None:
        request.holder.require_admin()
    services.keep_loaded(_route(facts), keep.seconds)
    return reply


def _route(facts: Facts) -> str:
    return str(facts.card.get("id") or facts.model)


def head(target: Target, operation: str, method: bytes = b"POST") -> bytes:
    """The head of a request of the gateway's own, without its end."""
    if target.outside is not None:
        return target.outside.head(OPERATIONS[operation])
    path = OPERATIONS[operation].path.encode()
    return b"%b %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % (method, path)


def headers(forward: bytes) -> dict[str, str]:
    """The headers of a head that is ready to be sent on."""
    lines = forward.decode("latin-1").split("\r\n")[1:]
    return {name: value for name, colon, value in (line.partition(": ") for line in lines) if colon}


async def prepare(
    services: Services, request: Admitted, facts: Facts, target: Target, body: list[bytes], calls: list[Usage]
) -> tuple[Translation, Send | Reply, Usage, bytes]:
    """The translation of this request, what to do last, what was used up for it, and lines for the answer's head.

    Fault 404, as OpenAI's, when there is none.

    ``calls`` gets what each call of an engine used, unknown until it has ended.
    """
    make = cast("Make | None", _made(TRANSLATIONS.get(facts.operation.name)))
    translation = make(facts) if make is not None else None
    if translation is None and make is not None:
        translation = cast("Translation | None", _made(_CHAINED)(make, facts))
    if translation is None:
        raise Fault(
            404,
            "not_supported",
            f"the engine of '{facts.model}' cannot answer {request.path}.",
            hint=f"It serves: {', '.join(known(facts.serves))}.",
            param="model",
        )
    steps = translation.steps(b"".join(body))
    return translation, *await _run(services, request, facts, target, steps, calls)


async def _run(
    services: Services, request: Admitted, facts: Facts, target: Target, steps: Steps, calls: list[Usage]
) -> tuple[Send | Reply, Usage, bytes]:
    """Drive the generator; its own work happens in a thread, as bodies may be large."""
    result: bytes | Fault | None = None
    spent, note = NOTHING, b""
    while True:
        try:
            step = await asyncio.to_thread(_next, steps, result)
        except _Last as last:
            return last.value, spent, note
        result = None
        if isinstance(step, Load):
            result = await services.load(request.key_id, step.key)
        elif isinstance(step, Keep):
            if request.holder is None or request.holder.grants.admin:
                services.keep_loaded(_route(facts), step.seconds)
            else:
                note = _NOT_KEPT
        else:
            try:
                result = await _counted(target, step, calls)
                spent = plus(spent, of_whole(result))
            except Fault as fault:
                result = fault


class _Last(Exception):
    """A generator's value; StopIteration cannot cross a thread's future."""

    def __init__(self, value: Send | Reply) -> None:
        super().__init__()
        self.value = value


def _next(steps: Steps, result: bytes | Fault | None) -> Call | Load | Keep:
    try:
        return steps.throw(result) if isinstance(result, Fault) else steps.send(result)
    except StopIteration as stop:
        raise _Last(stop.value) from None


async def _counted(target: Target, call: Call, calls: list[Usage]) -> bytes:
    """The call's answer; what it used is unknown until then, and nothing if it failed."""
    if not OPERATIONS[call.operation].generates and call.operation not in _WORK:
        return await _call(target, call)
    at = len(calls)
    calls.append(NOTHING)
    try:
        answer = await _call(target, call)
    except Fault:
        calls[at] = _FREE
        raise
    calls[at] = of_whole(answer)
    return answer


async def _call(target: Target, call: Call) -> bytes:
    method = b"POST" if call.body else b"GET"
    return await fetch(target, head(target, call.operation, method), call.body, limit=_CALL_MAX, timeout=_CALL_TIMEOUT)
