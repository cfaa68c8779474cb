"""A key as the gateway knows it: what its holder may do and has under way; lives on from snapshot to snapshot."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pierhead.gateway.ask import Ask
from pierhead.gateway.faults import Fault
from pierhead.gateway.link import Key
from pierhead.gateway.operations import Operation
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.routes import Entry

_REMEMBERED = 1000  # verdicts on models


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

    __slots__ = ("_verdicts", "grants", "id", "key")

    def __init__(self, key: Key) -> None:
        self.id = key.id
        self.update(key)

    def update(self, key: Key) -> None:
        """Go on with what the key may do now."""
        self.key = key
        self.grants = key.grants
        self._verdicts: dict[str, bool] = {}

    def sees(self, model: str, aliases: Sequence[str] = ()) -> bool:
        """Whether the key's scopes cover a model, by any of its names."""
        patterns = self.grants.models
        if not patterns:
            return True
        verdict = self._verdicts.get(model)
        if verdict is None:
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            verdict = self._verdicts[model] = any(
                fnmatch.fnmatchcase(name, pattern) for name in (model, *aliases) for pattern in patterns
            )
        return verdict

    def require_admin(self) -> None:
        """Fault 403 when the key may not change what this host runs."""
        if not self.grants.admin:
            raise Fault(
                403,
                "admin_needed",
                "this API key may not manage Pierhead.",
                hint="Make one that may with: pier key create NAME --admin",
            )

    def allow(self, operation: Operation, model: str, aliases: Sequence[str] = ()) -> None:
        """Fault 403 when the key's scopes do not cover this."""
        grants = self.grants
        if grants.dialects and operation.dialect not in grants.dialects:
            raise Fault(
                403,
                "dialect_not_allowed",
                f"this API key may not use the {operation.dialect} API.",
                hint=f"It may use: {', '.join(grants.dialects)}.",
            )
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

    def begin(self, ask: Ask, entry: Entry, size: int) -> Hold | None:
        """Count a request of ``size`` body bytes in; Fault 429 or 402 beyond a limit; None: ``wait`` must decide."""
        return _FREE

    async def wait(self, ask: Ask, entry: Entry, size: int) -> Hold:
        """The slow way of ``begin``: when a budget's slice is used up and the next one must be leased durably."""
        return _FREE
