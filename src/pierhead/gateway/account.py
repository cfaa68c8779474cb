"""One budget of one key in memory: a slice leased from the ledger, reserved before a request and settled after it.

Apart from ``budgets``, since it is what each request comes by, and can be compiled.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from typing import Literal

from pierhead.gateway.faults import Fault
from pierhead.gateway.ledger import Lease, Ledger, Row, span
from pierhead.gateway.link import Budget

_QUICK, _SLOW = 1.0, 10.0  # a slice that lasts shorter grows, one that lasts longer shrinks
_IDLE = 10  # sweeps (half seconds) after which what nobody spends goes back
_DRY = 0.25  # seconds for which the ledger's no is believed without asking again
_WORDS = {"tokens": "tokens", "usd": "money", "requests": "requests"}


class Account:
    """One budget of one key: ``available`` and ``reserved`` in memory, the rest in the ledger."""

    __slots__ = (
        "_dry",
        "_epoch",
        "_idle",
        "_leased",
        "_leasing",
        "_ledger",
        "_queue",
        "_seen",
        "_step",
        "available",
        "key",
        "label",
        "limit",
        "reserved",
        "since",
        "unit",
        "until",
        "window",
    )

    def __init__(self, ledger: Ledger, key: str, budget: Budget) -> None:
        self._ledger = ledger
        self.key = key
        self.unit = budget.unit
        self.window: Literal["day", "month"] = budget.window
        self.limit = budget.amount
        self.available = 0
        self.reserved = 0
        self.since = self.until = 0.0
        self.label = ""
        self._epoch = 0
        self._step = 0
        self._leased = 0.0
        self._leasing: asyncio.Future[None] | None = None
        self._queue: deque[asyncio.Future[None]] = deque()
        self._dry = (0, 0.0)  # so much is not to be had, until then
        self._seen = (0, 0)
        self._idle = 0

    @property
    def _row(self) -> Row:
        return Row(self.key, self.unit, self.label)

    # --- the quick way --------------------------------------------------------------------------------------------

    def reserve(self, amount: int) -> tuple[Account, int, int]:
        """Take ``amount`` of what is available; the claim is for ``settle``."""
        self.available -= amount
        self.reserved += amount
        return self, self._epoch, amount

    def settle(self, epoch: int, amount: int, spent: int) -> None:
        """A claim of ``amount`` has ended and ``spent`` of it is gone."""
        if epoch != self._epoch:
            return  # of a day or month that has passed: what was reserved then counts as spent then
        self.reserved -= amount
        self.available += amount - spent
        if self._queue:
            self.wake(not self.reserved)

    def refuse(self, least: int) -> None:
        """Fault 402 at once while it is known that ``least`` is not to be had."""
        amount, until = self._dry
        if (
            until > time.monotonic()
            and least >= amount
            and not self.reserved
            and self.since <= time.time() < self.until
        ):
            raise self._exceeded()

    # --- the slow way ---------------------------------------------------------------------------------------------

    async def fill(self, least: int, most: int, deadline: float) -> bool:
        """Have ``most`` available; False when the budget ends before that, but has ``least``. Fault when it has not."""
        while True:
            await self._turn()
            self.refuse(least)
            if self.available >= most:
                return True
            if self._leasing is not None:
                await asyncio.shield(self._leasing)
                continue
            left = await self._lease(most - self.available, self._grow(most))
            if left is None:
                continue
            if self.reserved:  # requests under way will bring something back
                await self._others(deadline)
                continue
            if self.available + left < least:
                self._dry = least, time.monotonic() + _DRY
                self.wake(True)
                raise self._exceeded()
            if left <= 0 or await self._lease(left, left) is None:
                return self.available >= most

    async def _turn(self) -> None:
        """Begin with the day or month of now: what is left of the one before goes back."""
        now = time.time()
        if self.since <= now < self.until:
            return
        rest, row = self.available, self._row
        current = span(self.window, now)
        self.label, self.since, self.until = current
        self._epoch += 1
        self.available = self.reserved = 0
        self._dry = (0, 0.0)
        self.wake(True)
        if rest and row.span:
            await _return(self._ledger, row, rest)

    def _grow(self, need: int) -> int:
        """How much to ask for: as much as lasts some seconds at the pace of late."""
        now = time.monotonic()
        age, self._leased = now - self._leased, now
        if age < _QUICK:
            self._step = min(max(self._step * 2, need * 4), self.limit // 16)
        elif age > _SLOW:
            self._step //= 2
        return need + self._step

    async def _lease(self, least: int, want: int) -> int | None:
        """Borrow; None when that was granted, else what is left. One at a time."""
        self._leasing = asyncio.get_running_loop().create_future()
        epoch = self._epoch
        work = asyncio.ensure_future(asyncio.to_thread(self._ledger.lease, self._row, self.limit, least, want))
        try:
            lease = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(lambda done: self._arrived(epoch, done))
            raise
        except OSError as exc:
            raise _unavailable(exc) from exc
        finally:
            leasing, self._leasing = self._leasing, None
            leasing.set_result(None)
        if epoch != self._epoch:
            return None
        self.available += lease.granted
        return None if lease.granted else lease.left

    def _arrived(self, epoch: int, work: asyncio.Future[Lease]) -> None:
        """A lease whose request has left meanwhile: others may have it."""
        if not work.cancelled() and work.exception() is None and epoch == self._epoch:
            self.available += work.result().granted
            self.wake(False)

    async def _others(self, deadline: float) -> None:
        """Wait until another request settles; Fault 429 when that takes too long."""
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await turn
        except TimeoutError as exc:
            if turn.done() and not turn.cancelled():
                self.wake(False)
            raise Fault(
                429,
                "budget_reserved",
                f"the rest of this API key's budget of {_WORDS[self.unit]} is reserved by requests under way.",
                hint="Ask again when they have ended, or ask for fewer tokens.",
                headers=((b"retry-after", b"5"),),
            ) from exc
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.wake(False)
            raise

    def wake(self, everyone: bool) -> None:
        """Let those who wait try again: the next one, or all."""
        queue = self._queue
        while queue:
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)
                if not everyone:
                    return

    def _exceeded(self) -> Fault:
        seconds = max(1, int(self.until - time.time()) + 1)
        renews = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.until))
        return Fault(
            402,
            "budget_exceeded",
            f"this API key's budget of {_WORDS[self.unit]} for the {self.window} is used up, or too small for this.",
            hint=f"It renews at {renews}.",
            data={"renews": renews},
            headers=((b"retry-after", b"%d" % seconds),),
        )

    # --- time -----------------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        """Whether something has been lying here unspent for a while; asked twice a second."""
        seen = (self.available, self.reserved)
        self._idle = self._idle + 1 if seen == self._seen else 0
        self._seen = seen
        return bool(self.available) and not self.reserved and self._leasing is None and self._idle >= _IDLE

    async def rest(self) -> None:
        """Give back what is available; what was spent beyond it is booked."""
        amount, self.available = self.available, 0
        if amount and self.label:
            await _return(self._ledger, self._row, amount)


async def _return(ledger: Ledger, row: Row, amount: int) -> None:
    try:
        await asyncio.to_thread(ledger.give_back, row, amount)
    except OSError as exc:  # it counts as spent then
        print(f"pierhead gateway: cannot give back a budget: {exc}", file=sys.stderr)  # noqa: T201


def _unavailable(exc: OSError) -> Fault:
    print(f"pierhead gateway: cannot read budgets: {exc}", file=sys.stderr)  # noqa: T201
    return Fault(503, "budget_unavailable", "budgets cannot be read now.", hint="See the gateway's log.")
