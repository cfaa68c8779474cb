"""What tokens cost: the price of a model by the first pattern that fits, and sums in millionths of a dollar; pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from pierhead.gateway.link import Price
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.routes import Entry

_MILLION: Final = 1_000_000
_REMEMBERED: Final = 10000


def cost(price: Price, usage: Usage) -> int:
    """Millionths of a dollar, rounded up."""
    cached = price.cached if price.cached >= 0 else price.input
    total = (usage.prompt - usage.cached) * price.input + usage.cached * cached + usage.completion * price.output
    return -(-total // _MILLION)


def bound(price: Price, prompt: int, answer: int) -> int:
    """The most that ``prompt`` and ``answer`` tokens can cost."""
    dearest = max(price.input, price.cached)
    return -(-(prompt * dearest + answer * price.output) // _MILLION)


def affordable(price: Price, prompt: int, money: int) -> int:
    """How many tokens of an answer ``money`` pays for after ``prompt``; without bound where they are free."""
    left = money * _MILLION - prompt * max(price.input, price.cached)
    if left < 0:
        return -1
    return left // price.output if price.output else 1 << 60


class Prices:
    """The prices of a snapshot."""

    def __init__(self, prices: tuple[Price, ...] = ()) -> None:
        self._prices = prices
        self._found: dict[str, Price | None] = {}

    def of(self, entry: Entry) -> Price | None:
        """What a route costs, by any of its names, else by those of the models behind it; None when one is unknown."""
        name = entry.name
        if name in self._found:
            return self._found[name]
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        price = self._find((name, *entry.aliases))
        if price is None:
            price = dearest([self._find((target.model,)) for target in entry.targets])
        self._found[name] = price
        return price

    def _find(self, names: Iterable[str]) -> Price | None:
        for price in self._prices:
            if any(fnmatch.fnmatchcase(name, price.pattern) for name in names if name):
                return price
        return None


def dearest(prices: Sequence[Price | None]) -> Price | None:
    """A price that is as high as each of these; None where one is unknown."""
    known = [price for price in prices if price is not None]
    if not known or len(known) < len(prices):
        return None
    cached = [price.cached if price.cached >= 0 else price.input for price in known]
    return Price("", max(p.input for p in known), max(p.output for p in known), max(cached))
