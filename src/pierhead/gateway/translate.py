"""Runs a translation's steps against an engine and the store of answers; knows no dialect."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, cast

from pierhead.gateway.dialects.base import Call, Facts, Load, Make, Reply, Send, Steps, Translation
from pierhead.gateway.faults import Fault
from pierhead.gateway.fetch import fetch
from pierhead.gateway.operations import OPERATIONS

if TYPE_CHECKING:
    from pierhead.gateway.admission import Admitted
    from pierhead.gateway.services import Services
    from pierhead.gateway.upstream import Target

# Operation → where its translation is made (``Make``). Imported when a request first needs it.
TRANSLATIONS: dict[str, str] = {
    "messages": "pierhead.gateway.dialects.anthropic:make",
    "count-tokens": "pierhead.gateway.dialects.anthropic:make_count",
}
_CALL_TIMEOUT = 120.0
_CALL_MAX = 64 << 20


def _make(operation: str) -> Make | None:
    where = TRANSLATIONS.get(operation)
    if where is None:
        return None
    module, _, name = where.partition(":")
    return cast("Make", getattr(importlib.import_module(module), name))


def path(operation: str) -> bytes:
    """Where an engine answers an operation."""
    return OPERATIONS[operation].path.encode()


def headers(forward: bytes) -> dict[str, str]:
    """The headers of a head that is ready to be sent on."""
    lines = forward.decode("latin-1").split("\r\n")[1:]
    return {name: value for name, colon, value in (line.partition(": ") for line in lines) if colon}


async def prepare(
    services: Services, request: Admitted, facts: Facts, target: Target, body: list[bytes]
) -> tuple[Translation, Send | Reply]:
    """The translation of this request and what to do last; Fault 501 when the engine offers nothing to make it of."""
    make = _make(facts.operation.name)
    translation = make(facts) if make is not None else None
    if translation is None:
        raise Fault(
            501,
            "not_supported",
            f"the engine of '{facts.model}' cannot answer {request.path}.",
            hint=f"It serves: {', '.join(sorted(facts.serves))}.",
        )
    steps = translation.steps(b"".join(body))
    return translation, await _run(services, request, target, steps)


async def _run(services: Services, request: Admitted, target: Target, steps: Steps) -> Send | Reply:
    """Drive the generator; its own work happens in a thread, as bodies may be large."""
    result: bytes | Fault | None = None
    while True:
        try:
            step = await asyncio.to_thread(_next, steps, result)
        except _Last as last:
            return last.value
        if isinstance(step, Load):
            result = await services.load(request.key_id, step.key)
            continue
        try:
            result = await _call(target, step)
        except Fault as fault:
            result = fault


class _Last(Exception):
    """A generator's value; StopIteration cannot cross a thread's future."""

    def __init__(self, value: Send | Reply) -> None:
        super().__init__()
        self.value = value


def _next(steps: Steps, result: bytes | Fault | None) -> Call | Load:
    try:
        return steps.throw(result) if isinstance(result, Fault) else steps.send(result)
    except StopIteration as stop:
        raise _Last(stop.value) from None


async def _call(target: Target, call: Call) -> bytes:
    method = b"POST" if call.body else b"GET"
    head = b"%b %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % (method, path(call.operation))
    return await fetch(target, head, call.body, limit=_CALL_MAX, timeout=_CALL_TIMEOUT)
