"""A key as the gateway knows it: what its holder may do and has under way; lives on from snapshot to snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pierhead.gateway.ask import Ask
from pierhead.gateway.link import Key
from pierhead.gateway.operations import Operation
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.routes import Entry


class Hold:
    """What one request has been granted; ``settle`` gives back what it did not use, exactly once.

    ``cap`` is the most tokens that its answer may have (0: no bound); the relay clamps or injects ``max_tokens``.
    """

    __slots__ = ("cap",)

    def __init__(self, cap: int = 0) -> None:
        self.cap = cap

    def settle(self, usage: Usage) -> None:
        """The request has ended, well or not."""


_FREE = Hold()


class Holder:
    """One key."""

    def __init__(self, key: Key) -> None:
        self.id = key.id

    def allow(self, operation: Operation, model: str) -> None:
        """Fault 403 when the key's scopes do not cover this."""

    def begin(self, ask: Ask, entry: Entry, size: int) -> Hold | None:
        """Count a request of ``size`` body bytes in; Fault 429 or 402 beyond a limit; None: ``wait`` must decide."""
        return _FREE

    async def wait(self, ask: Ask, entry: Entry, size: int) -> Hold:
        """The slow way of ``begin``: when a budget's slice is used up and the next one must be leased durably."""
        return _FREE
