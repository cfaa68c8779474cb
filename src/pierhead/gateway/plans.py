"""A route's plan at work: who answers, who is asked next after what, and what a shadow may take; sends nothing."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from pierhead.gateway.faults import Fault, from_engine
from pierhead.gateway.link import Mirror, Plan, Share, Trouble
from pierhead.gateway.metrics import labels
from pierhead.gateway.skeleton import Skeleton
from pierhead.routing.split import (
    Allowance,
    Asked,
    Condition,
    Decision,
    Destination,
    Rule,
    Split,
    Sticky,
    decide,
)
from pierhead.routing.split import Mirror as Copied

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pierhead.gateway.usage import Usage

_DAY = 86400.0
_NOT_THERE = (
    "daemon_unavailable",
    "runtime_unavailable",
    "starting",
    "engine_gone",
    "not_found",
    "model_not_found",
    "provider_unreachable",
)


def trouble(fault: Fault) -> Trouble | None:
    """What kind of trouble a failure is; None for one that another destination would not help: the client's own."""
    if fault.code == "context_length_exceeded":
        return "context"
    if fault.code in _NOT_THERE:
        return "error"
    if fault.status in (429, 503) or fault.code == "queue_timeout":
        return "overload"
    if fault.status == 504:
        return "timeout"
    return "error" if fault.status >= 500 or fault.cannot else None


class Budget:
    """What a shadow may take: requests a minute and at a time, tokens a day (of UTC); counts what came of them."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.sent = 0
        self.skipped = 0
        self.failed = 0
        self.tokens = 0
        self.open = 0
        self._allowance = Allowance(mirror.requests_per_minute, max(1.0, mirror.requests_per_minute / 4))
        self._day = -1
        self._today = 0

    def take(self, estimate: int, now: float, unix: float) -> bool:
        """Whether one more may be sent that takes about ``estimate`` tokens; ``end`` must follow."""
        mirror, day = self.mirror, int(unix // _DAY)
        if day != self._day:
            self._day, self._today = day, 0
        over = mirror.tokens_per_day and self._today + estimate > mirror.tokens_per_day
        if over or self.open >= mirror.concurrent or not self._allowance.take(now):
            self.skipped += 1
            return False
        self.open += 1
        self.sent += 1
        self._today += estimate
        return True

    def end(self, estimate: int, usage: Usage | None) -> None:
        """It has ended; without a ``usage`` it failed."""
        self.open -= 1
        if usage is None:
            self.failed += 1
            self._today -= estimate
            return
        spent = usage.prompt + usage.completion if usage.known else estimate
        self.tokens += spent
        self._today += spent - estimate


class Live:
    """The plan of one route; counts live on from one snapshot to the next (``before``)."""

    def __init__(self, name: str, plan: Plan, before: Live | None = None) -> None:
        self.name = name
        self.timeout = plan.timeout
        self.on = {f.model: frozenset(f.on) for f in plan.fallbacks}
        self.attempts: dict[tuple[str, str], int] = before.attempts if before is not None else {}
        self.budget: Budget | None = None
        mirror = plan.mirror
        if mirror is not None:
            kept = before.budget if before is not None else None
            self.budget = kept if kept is not None and kept.mirror == mirror else Budget(mirror)
        self._header = plan.sticky.removeprefix("header:") if plan.sticky.startswith("header:") else ""
        sticky = Sticky.USER if self._header else Sticky(plan.sticky or "none")
        self._split = Split(
            to=_shares(plan.to),
            rules=tuple(
                Rule(tuple(Condition(m.value, m.header, m.prefix) for m in rule.when), _shares(rule.to))
                for rule in plan.rules
            ),
            fallbacks=tuple(f.model for f in plan.fallbacks),
            sticky=sticky,
            mirror=Copied(mirror.model, mirror.share) if mirror is not None else None,
        )
        self.reads_headers = bool(self._header) or any(m.header for rule in plan.rules for m in rule.when)
        self._reads_body = sticky if sticky in (Sticky.USER, Sticky.CONVERSATION) and not self._header else Sticky.NONE

    def decide(self, key: str, headers: Mapping[str, str] | None, text: bytes) -> Decision:
        """Who answers; ``text`` is the body or its skeleton, and ``headers`` are needed if ``reads_headers``."""
        user = conversation = ""
        if self._header:
            user = (headers or {}).get(self._header, "")
        elif self._reads_body is Sticky.USER:
            user = user_of(text)
        elif self._reads_body is Sticky.CONVERSATION:
            conversation = conversation_of(text)
        asked = Asked(key=key, user=user, conversation=conversation, headers=headers)
        dice, shadow = random.random(), random.random() if self.budget is not None else 1.0  # noqa: S311 - no secret
        return decide(self._split, asked, dice, shadow)

    def count(self, destination: str, result: str) -> None:
        """One attempt has ended."""
        at = destination, result
        self.attempts[at] = self.attempts.get(at, 0) + 1


def _shares(to: tuple[Share, ...]) -> tuple[Destination, ...]:
    return tuple(Destination(share.model, share.weight) for share in to)


class _Metadata(msgspec.Struct):
    user_id: str | None = None


class _User(msgspec.Struct):
    user: str | None = None
    safety_identifier: str | None = None
    metadata: _Metadata | None = None


class _Role(msgspec.Struct):
    role: str = ""


class _Talk(msgspec.Struct):
    """The beginning of a conversation is the same in all its requests."""

    conversation: str | None = None
    system: msgspec.Raw = msgspec.Raw()
    messages: list[msgspec.Raw] = []
    input: msgspec.Raw = msgspec.Raw()


_user = msgspec.json.Decoder(_User).decode
_role = msgspec.json.Decoder(_Role).decode
_talk = msgspec.json.Decoder(_Talk).decode
_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def user_of(text: bytes) -> str:
    """What a request calls its user, in the words of either dialect; "" when it does not say."""
    try:
        found = _user(text)
    except _ERRORS:
        return ""
    named = found.metadata.user_id if found.metadata is not None else None
    return found.user or found.safety_identifier or named or ""


def conversation_of(text: bytes) -> str:
    """A name for the conversation that a request belongs to: its id, or its messages up to the first of the user.

    Long strings count as their absence does: so it is the same name whether the body was reduced already or not.
    """
    skeleton = Skeleton()
    skeleton.feed(text)
    try:
        found = _talk(skeleton.result())
        if found.conversation:
            return found.conversation
        digest = blake2b(bytes(found.system), digest_size=16)
        for message in found.messages:
            digest.update(bytes(message))
            if _role(message).role == "user":
                break
        else:
            if not found.messages and not bytes(found.input):
                return ""
            digest.update(bytes(found.input))
    except _ERRORS:
        return ""
    return digest.hexdigest()


_STATUSES = {"overloaded_error": 503, "rate_limit_error": 429, "timeout_error": 504}


def stream_error(piece: bytes) -> Fault | None:
    """The failure that a stream begins with instead of an answer; None when it begins well, as far as can be seen."""
    if b'"error"' not in piece:
        return None
    line = next((line for line in piece.split(b"\n") if line.startswith(b"data:")), piece)
    data = line.removeprefix(b"data:").strip()
    try:
        found = _failure(data)
    except _ERRORS:
        return None
    if found.error is None:
        return None
    kind, code = found.error.type or "", found.error.code
    status = code if isinstance(code, int) and 400 <= code < 600 else _STATUSES.get(kind, 502)
    return from_engine(status, data)


class _Failure(msgspec.Struct):
    type: str | None = None
    code: int | str | None = None


class _Failed(msgspec.Struct):
    error: _Failure | None = None


_failure = msgspec.json.Decoder(_Failed).decode


def render(plans: Iterable[Live]) -> str:
    """The metrics of routes: attempts by destination and what came of them, and what shadows were sent."""
    listed = sorted(plans, key=lambda plan: plan.name)
    out = ["# HELP pierhead_route_attempts_total Requests sent to a route's destinations, by what came of them."]
    out.append("# TYPE pierhead_route_attempts_total counter")
    out += [
        f"pierhead_route_attempts_total{labels(route=p.name, destination=to, result=result)} {count}"
        for p in listed
        for (to, result), count in sorted(p.attempts.items())
    ]
    budgets = [(p.name, p.budget) for p in listed if p.budget is not None]
    for name, text, member in (
        ("pierhead_mirror_requests_total", "Copies sent to shadows.", "sent"),
        ("pierhead_mirror_skipped_total", "Copies not sent: beyond the budget, or too large.", "skipped"),
        ("pierhead_mirror_failed_total", "Copies whose answer failed, or for which no slot was free.", "failed"),
        ("pierhead_mirror_tokens_total", "Tokens of shadows; no key is charged for them.", "tokens"),
    ):
        out += [f"# HELP {name} {text}", f"# TYPE {name} counter"]
        out += [f"{name}{labels(route=r, destination=b.mirror.model)} {getattr(b, member)}" for r, b in budgets]
    return "\n".join(out) + "\n"
