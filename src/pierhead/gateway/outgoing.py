"""Makes what an engine gets of what a client sent: unchanged but for a few members, or translated; sends nothing."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote

from pierhead.gateway import forms, passthrough, translate
from pierhead.gateway.admission import Admitted
from pierhead.gateway.ask import ABSENT, Ask, VectorAsk
from pierhead.gateway.dialects.base import Facts, Reply, Translation
from pierhead.gateway.faults import bad_request
from pierhead.gateway.operations import MEMBER
from pierhead.gateway.routes import Entry
from pierhead.gateway.skeleton import INLINE
from pierhead.gateway.tool_choice import MARK, adapt
from pierhead.gateway.usage import NOTHING, Usage

if TYPE_CHECKING:
    from pierhead.gateway.services import Services
    from pierhead.gateway.upstream import Target


class Outgoing:
    """The request as one target gets it: ``head`` lacks its end.

    ``strip``: the engine tells a usage that the client did not ask for. ``note``: lines for the answer's head.
    """

    __slots__ = ("body", "head", "note", "spent", "strip", "translation")

    def __init__(
        self,
        head: bytes,
        body: list[bytes],
        strip: bool = False,
        translation: Translation | None = None,
        spent: Usage = NOTHING,  # by what was asked before
        note: bytes = b"",
    ) -> None:
        self.head = head
        self.body = body
        self.strip = strip
        self.translation = translation
        self.spent = spent
        self.note = note


class Given(NamedTuple):
    """The request as it came; ``skeleton`` has a large body's short members; ``cap`` bounds the answer (0: not)."""

    request: Admitted
    ask: Ask
    entry: Entry
    body: list[bytes]
    skeleton: bytes | None
    id: bytes
    cap: int
    started: float = 0.0
    calls: list[Usage] | None = None  # what calls of engines on the way to the last one used


def check(ask: Ask, target: Target, entry: Entry) -> None:
    """Fault 400 where the engine would give vectors of another length than is asked for: llama.cpp has only one."""
    if not isinstance(ask, VectorAsk) or ask.dimensions is None or "llamacpp-tokenize" not in target.serves:
        return
    if ask.dimensions != (own := entry.facts.get("embedding_length")):
        told = f" of {own}" if own else ""
        raise bad_request(
            f"'{entry.name}' gives vectors of its own length{told}, not of {ask.dimensions}.",
            code="not_supported",
            param="dimensions",
        )


def native(request: Admitted, ask: Ask, body: list[bytes], target: Target, cap: int) -> Outgoing | None:
    """What ``target`` gets of a small body, at once; None when it does not speak the client's dialect."""
    operation = request.operation
    assert operation is not None
    if operation.name not in target.serves or (target.model and operation.where != "body"):
        return None
    strip = passthrough.wants_usage(operation.name, ask)
    wanted = target.wanted
    if strip or target.model or wanted.text or (cap and not passthrough.within(operation.name, ask, cap)):
        text = body[0] if len(body) == 1 else b"".join(body)
        changed = passthrough.changes(operation.name, ask, target.model, cap, text, wanted)
        body = passthrough.apply(body, *changed)
    if target.outside is not None:
        return Outgoing(target.outside.head(operation, request.forward), body, strip)
    if ask.tool_choice is not ABSENT and body:
        body = [adapt(body[0], target.call_prefix)]
    return Outgoing(request.forward, body, strip)


async def make(services: Services, given: Given, target: Target) -> Outgoing | Reply:
    """What ``target`` gets, whatever that takes; or the client's answer, where a translation knows it already."""
    operation, body = given.request.operation, given.body
    assert operation is not None
    check(given.ask, target, given.entry)
    if operation.name not in target.serves:
        return await _translated(services, given, target)
    if target.model and operation.where != "body":
        if operation.where == "path":
            return _named_elsewhere(given, target)
        return await asyncio.to_thread(_named_elsewhere, given, target)
    if given.skeleton is None and sum(map(len, body)) <= INLINE:
        made = native(given.request, given.ask, body, target, given.cap)
        assert made is not None
        return made
    text = given.skeleton if given.skeleton is not None else b"".join(body) if target.wanted.text else body[0]
    front, changed = passthrough.changes(operation.name, given.ask, target.model, given.cap, text, target.wanted)
    outside = target.outside
    chooses = outside is None and MARK in text
    if changed:
        body = await asyncio.to_thread(passthrough.apply, body, front, changed)
    elif front:
        body = passthrough.apply(body, front, {})
    if chooses:
        body = [await asyncio.to_thread(adapt, b"".join(body), target.call_prefix)]
    head = given.request.forward if outside is None else outside.head(operation, given.request.forward)
    return Outgoing(head, body, passthrough.wants_usage(operation.name, given.ask))


def _named_elsewhere(given: Given, target: Target) -> Outgoing:
    """A form, or a request whose path names the model, with the engine's own name for it."""
    request, body = given.request, given.body
    assert request.operation is not None
    head = request.forward
    if request.named:
        named = unquote(request.named)  # of an engine with several models, one that is not the route's own
        inner = named[len(given.ask.model or "") :].removeprefix(MEMBER) or target.model
        head = head.replace(f"/models/{request.named}".encode(), b"/models/%b" % quote(inner, safe="").encode(), 1)
    else:
        body = [forms.renamed(b"".join(body), translate.headers(head).get("content-type", ""), target.model)]
    return Outgoing(target.outside.head(request.operation, head) if target.outside is not None else head, body)


async def early(services: Services, given: Given) -> Reply | None:
    """The answer to a request that needs no engine at all."""
    return await translate.early(services, given.request, _facts(given, None), given.body)


def _facts(given: Given, target: Target | None) -> Facts:
    request, ask = given.request, given.ask
    assert request.operation is not None
    return Facts(
        operation=request.operation,
        ask=ask,
        model=ask.model or "",
        id=given.id.decode("latin-1"),
        created=int(time.time()),
        nonce=os.urandom(16).hex(),
        serves=target.serves if target is not None else frozenset(),
        context=target.context if target is not None else 0,
        cap=given.cap,
        call_prefix=target.call_prefix if target is not None else "",
        card=given.entry.facts,
        headers=translate.headers(request.forward),
        started=given.started,
    )


async def _translated(services: Services, given: Given, target: Target) -> Outgoing | Reply:
    facts = _facts(given, target)
    translation, last, spent, note = await translate.prepare(
        services, given.request, facts, target, given.body, given.calls if given.calls is not None else []
    )
    if isinstance(last, Reply):
        return last._replace(spent=spent, headers=last.headers + note)
    body = await asyncio.to_thread(_as_wanted, last.body, target)
    return Outgoing(translate.head(target, last.operation), body, translation=translation, spent=spent, note=note)


def _as_wanted(body: bytes, target: Target) -> list[bytes]:
    """A translated request in the words of its engine: its own name of the model, its way to require a call."""
    if target.outside is not None:
        body = passthrough.without(body, "chat_template_kwargs")  # a word for engines here, which providers refuse
    elif MARK in body:
        body = adapt(body, target.call_prefix)
    front, changed = target.wanted.over(body)
    return passthrough.apply([body], front, changed | ({"model": target.model} if target.model else {}))
