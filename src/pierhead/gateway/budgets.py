"""All budgets of a gateway: who has which account, what lies idle goes back to the ledger; keeps no file.

A slice lasts a few seconds of what its key is spending, so a crash forfeits little.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from pierhead.gateway.account import Account
from pierhead.gateway.ledger import Ledger
from pierhead.gateway.link import Budget
from pierhead.gateway.prices import Prices, cost
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.routes import Entry

PATIENCE = 30.0  # seconds that a request waits for others to settle before it is refused


class Share:
    """An account as long as somebody holds it: a compiled class cannot be referred to weakly, this one can."""

    __slots__ = ("__weakref__", "account")

    def __init__(self, account: Account) -> None:
        self.account = account


class Budgets:
    """All accounts of a gateway, and the prices that money is counted by.

    ``answer`` are the tokens that an answer may have where nobody says. ``margins`` are those that models' templates
    add to a prompt beyond the bytes of its request, as far as seen.
    """

    def __init__(self, ledger: Ledger, answer: int = 4096) -> None:
        self.ledger = ledger
        self.answer = answer
        self.prices = Prices()
        self.margins: dict[str, int] = {}
        self._shares: WeakValueDictionary[tuple[str, str, str], Share] = WeakValueDictionary()
        self._resting: asyncio.Task[None] | None = None

    def cost(self, entry: Entry, usage: Usage) -> int:
        """What an answer has cost, in millionths of a dollar; 0 where nobody has said the price."""
        price = self.prices.of(entry) if usage.known else None
        return cost(price, usage) if price is not None else 0

    def shares(self, key: str, budgets: tuple[Budget, ...]) -> tuple[Share, ...]:
        """The accounts of a key's budgets; those that somebody holds live on."""
        return tuple(self._share(key, budget) for budget in budgets)

    def _share(self, key: str, budget: Budget) -> Share:
        name = (key, budget.unit, budget.window)
        share = self._shares.get(name)
        if share is None:
            share = self._shares[name] = Share(Account(self.ledger, key, budget))
        share.account.limit = budget.amount
        return share

    def learn(self, model: str, margin: int) -> None:
        """A prompt had ``margin`` tokens more than its request had bytes."""
        if len(self.margins) < 10000 or model in self.margins:
            self.margins[model] = max(margin, self.margins.get(model, 0))

    def sweep(self) -> None:
        """Let go of what lies idle; asked twice a second."""
        if self._resting is not None and not self._resting.done():
            return
        idle = [share.account for share in self._shares.values() if share.account.idle()]
        if idle:
            self._resting = asyncio.get_running_loop().create_task(_rest(idle))

    async def close(self) -> None:
        """The gateway ends well: what it had borrowed goes back."""
        if self._resting is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._resting
        await _rest([share.account for share in self._shares.values()])
        await asyncio.to_thread(self.ledger.close)


async def _rest(accounts: list[Account]) -> None:
    for account in accounts:
        await account.rest()
