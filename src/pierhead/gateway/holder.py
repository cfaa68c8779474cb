"""A key as the gateway knows it: what its holder may do and has under way; lives on from snapshot to snapshot."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pierhead.gateway.account import Account
from pierhead.gateway.ask import Ask
from pierhead.gateway.budgets import PATIENCE, Budgets
from pierhead.gateway.faults import Fault
from pierhead.gateway.ledger import MemoryLedger
from pierhead.gateway.limits import Bucket, sized, told
from pierhead.gateway.link import Key, Price
from pierhead.gateway.operations import Dialect, Operation
from pierhead.gateway.plan import Plan, amount, answer_within, plan
from pierhead.gateway.prices import cost
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.routes import Entry

_REMEMBERED = 1000  # verdicts on models


class Hold:
    """What one request has been granted; ``settle`` gives back what it did not use, exactly once.

    ``cap`` is the most tokens that its answer may have (0: no bound); the relay clamps or injects ``max_tokens``.
    ``headers`` tell the client its limits.
    """

    __slots__ = ("_holder", "_plan", "cap", "claims", "headers", "taken")

    def __init__(self, holder: Holder, granted: Plan | None) -> None:
        self._holder = holder
        self._plan = granted
        self.claims: list[tuple[Account, int, int]] | tuple[()] = ()
        self.taken = 0
        self.cap = 0
        self.headers = b""

    def settle(self, usage: Usage, asked: bool = True) -> None:
        """The request has ended, well or not; unless an engine was ``asked`` and answered, it has cost nothing."""
        holder, granted = self._holder, self._plan
        holder.open -= 1
        if granted is None:
            return
        if not asked:
            tokens, spent = 0, None
        elif usage.known:
            tokens, spent = usage.prompt + usage.completion, usage
            if usage.prompt > granted.prompt:
                holder.room.learn(granted.model, granted.margin + usage.prompt - granted.prompt)
        else:
            tokens, spent = granted.tokens, granted.usage
        if self.taken and holder.tokens is not None:
            holder.tokens.level += self.taken - tokens
        for account, epoch, reserved in self.claims:
            account.settle(epoch, reserved, _spent(account.unit, tokens, spent, granted.price))


def _spent(unit: str, tokens: int, usage: Usage | None, price: Price | None) -> int:
    """What a request has used of a budget."""
    if usage is None:
        return 0
    if unit == "requests":
        return 1
    if unit == "tokens":
        return tokens
    return cost(price, usage) if price is not None else 0


class Holder:
    """One key; ``open`` are its requests under way."""

    __slots__ = (
        "_counts",
        "_free",
        "_priced",
        "_shares",
        "_verdicts",
        "accounts",
        "grants",
        "id",
        "key",
        "open",
        "requests",
        "room",
        "tokens",
    )

    def __init__(self, key: Key, room: Budgets | None = None) -> None:
        self.id = key.id
        self.room = room if room is not None else Budgets(MemoryLedger())
        self.open = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.update(key)

    def update(self, key: Key) -> None:
        """Go on with what the key may do now."""
        now = time.monotonic()
        self.key = key
        self.grants = grants = key.grants
        self.requests = sized(self.requests, grants.rpm, now)
        self.tokens = sized(self.tokens, grants.tpm, now)
        self._shares = self.room.shares(key.id, grants.budgets)
        self.accounts = tuple([share.account for share in self._shares])
        self._priced = any(account.unit == "usd" for account in self.accounts)
        self._counts = bool(grants.tpm or self.accounts)
        self._free = not (grants.rpm or grants.concurrent or self._counts)
        self._verdicts: dict[str, tuple[Sequence[str], bool]] = {}

    # --- scopes ---------------------------------------------------------------------------------------------------

    def sees(self, model: str, aliases: Sequence[str] = ()) -> bool:
        """Whether the key's scopes cover a model, by any of its names."""
        patterns = self.grants.models
        if not patterns:
            return True
        found = self._verdicts.get(model)
        if found is None or (found[0] is not aliases and found[0] != aliases):  # names move from model to model
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            covered = any(fnmatch.fnmatchcase(name, pattern) for name in (model, *aliases) for pattern in patterns)
            found = self._verdicts[model] = aliases, covered
        return found[1]

    def require_admin(self) -> None:
        """Fault 403 when the key may not change what this host runs."""
        if not self.grants.admin:
            raise Fault(
                403,
                "admin_needed",
                "this API key may not manage Pierhead.",
                hint="Make one that may with: pier key create NAME --admin",
            )

    def require_dialect(self, dialect: Dialect) -> None:
        """Fault 403 when the key's scopes do not cover this dialect."""
        dialects = self.grants.dialects
        if dialects and dialect not in dialects:
            raise Fault(
                403,
                "dialect_not_allowed",
                f"this API key may not use the {dialect} API.",
                hint=f"It may use: {', '.join(dialects)}.",
            )

    def require_all(self) -> None:
        """Fault 403 when the key's scopes cover some models only, so that it may not see figures of all."""
        if self.grants.models and not self.grants.admin:
            raise Fault(
                403,
                "metrics_not_allowed",
                "this API key is for some models only, and these figures are those of all models and keys.",
                hint="Make a key for Prometheus with: pier key create prometheus",
            )

    def allow(self, operation: Operation, model: str, aliases: Sequence[str] = ()) -> None:
        """Fault 403 when the key's scopes do not cover this."""
        grants = self.grants
        if grants.dialects:
            self.require_dialect(operation.dialect)
        if grants.models:
            self.require_model(model, aliases)

    def require_model(self, model: str, aliases: Sequence[str] = ()) -> None:
        """Fault 403 when the key's scopes do not cover this model."""
        if not self.sees(model, aliases):
            raise Fault(
                403,
                "model_not_allowed",
                f"this API key may not use the model '{model[:200]}'.",
                param="model",
                hint="GET /v1/models lists those that it may use.",
            )

    # --- limits and budgets ---------------------------------------------------------------------------------------

    def begin(self, ask: Ask, entry: Entry, size: int, operation: Operation, text: bytes = b"") -> Hold | None:
        """Count a request of ``size`` body bytes in; Fault 429 or 402 beyond a limit; None: ``wait`` must decide.

        ``text`` is the body or its skeleton.
        """
        if self._free:
            self.open += 1
            return Hold(self, None)
        planned = self._planned(ask, entry, size, operation, text)
        self._check(planned)
        if planned is None or not self.accounts:
            return self._grant(planned, operation)
        now, amounts = time.time(), list[int]()
        for account in self.accounts:
            needed = amount(account.unit, planned, planned.answer)
            if account.available < needed or not account.since <= now < account.until:
                account.refuse(amount(account.unit, planned, planned.least))
                return None
            amounts.append(needed)
        return self._grant(planned, operation, amounts)

    def begin_free(self, operation: Operation) -> Hold:
        """The same for a request that no engine will work for: it takes no tokens and nothing of a budget."""
        self._check(None)
        return self._grant(None, operation)

    async def wait(self, ask: Ask, entry: Entry, size: int, operation: Operation, text: bytes = b"") -> Hold:
        """The slow way of ``begin``: when a budget's slice is used up and the next one must be leased durably."""
        planned = self._planned(ask, entry, size, operation, text)
        if planned is None:  # its limits went away meanwhile
            self._check(None)
            return self._grant(None, operation)
        deadline = time.monotonic() + PATIENCE
        while True:
            short = False
            for account in self.accounts:
                least, most = (amount(account.unit, planned, tokens) for tokens in (planned.least, planned.answer))
                short |= not await account.fill(least, most, deadline)
            self._check(planned)
            fits = min((answer_within(a.unit, planned, a.available) for a in self.accounts), default=planned.answer)
            if fits >= planned.answer or (short and fits >= planned.least):
                hold = self._grant(planned.clamped(fits), operation)
                for account in self.accounts:
                    if account.available > 0:
                        account.wake(False)
                return hold

    def _planned(self, ask: Ask, entry: Entry, size: int, operation: Operation, text: bytes) -> Plan | None:
        if not self._counts:
            return None
        price = self.room.prices.of(entry) if self._priced else None
        if self._priced and price is None:
            raise Fault(
                402,
                "unknown_price",
                f"nobody has said what the model '{entry.name}' costs, and this API key's budget is in money.",
                hint="Set its price in prices.toml (0 for a free one); `pier prices` shows where.",
            )
        planned = plan(self.room, ask, entry, size, operation, price, text)
        bucket = self.tokens
        if bucket is not None and planned.tokens > bucket.capacity:
            planned = planned.clamped(bucket.capacity - planned.prompt)
            if planned.answer < planned.least:
                raise _limited(
                    "tokens_per_minute",
                    f"this request may take {planned.prompt + planned.least} tokens, and this API "
                    f"key's limit is {bucket.capacity} a minute.",
                    0,
                )
        return planned

    def _check(self, planned: Plan | None) -> None:
        """Fault 429 when a limit is reached; takes nothing yet."""
        most, requests, tokens = self.grants.concurrent, self.requests, self.tokens
        if most and self.open >= most:
            raise _limited("too_many_requests", f"{self.open} requests of this API key are under way, its limit.", 1)
        now = time.monotonic() if requests is not None or tokens is not None else 0.0
        if requests is not None and requests.refill(now) < 1:
            raise _limited(
                "requests_per_minute",
                f"this API key may make {requests.capacity} requests a minute.",
                requests.wait(1),
            )
        if tokens is not None and planned is not None and tokens.refill(now) < planned.tokens:
            raise _limited(
                "tokens_per_minute",
                f"this API key may use {tokens.capacity} tokens a minute.",
                tokens.wait(planned.tokens),
            )

    def _grant(self, planned: Plan | None, operation: Operation, amounts: list[int] | None = None) -> Hold:
        hold = Hold(self, planned)
        self.open += 1
        requests, tokens = self.requests, self.tokens
        if requests is not None:
            requests.level -= 1
        if planned is not None:
            hold.cap = planned.cap
            if tokens is not None:
                hold.taken = planned.tokens
                tokens.level -= planned.tokens
            if self.accounts:
                if amounts is None:
                    amounts = [amount(a.unit, planned, planned.answer) for a in self.accounts]
                hold.claims = [a.reserve(needed) for a, needed in zip(self.accounts, amounts, strict=True)]
        if requests is not None or tokens is not None:
            hold.headers = told(requests, tokens, operation.dialect)
        return hold


def _limited(code: str, message: str, wait: int) -> Fault:
    headers = ((b"retry-after", b"%d" % wait),) if wait else ()
    return Fault(
        429, code, message, hint=f"Try again in {wait} s." if wait else "Ask for less at once.", headers=headers
    )
