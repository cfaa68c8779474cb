"""What a caller asks of the fleet about one model; decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pierhead.config import MOST_REPLICAS
from pierhead.errors import UsageError
from pierhead.events import Listener, ignore
from pierhead.fleet.intent import Intent
from pierhead.fleet.merge import Setting, values
from pierhead.store.model import ModelRecord


@dataclass(frozen=True)
class Ask:
    """Which model, and how it is to be kept; None leaves it as it is. ``by_request``: a client asks, and no person."""

    model: ModelRecord
    runtime: str | None
    settings: dict[str, Any]
    keep_alive: float | None
    pin: bool | None
    replicas: int | None
    listener: Listener
    by_request: bool

    @property
    def explicit(self) -> bool:
        """Whether a person asks, who sees what comes of it."""
        return self.listener is not ignore and not self.by_request

    def check(self) -> None:
        """UsageError for a number of replicas that cannot be."""
        if self.replicas is not None and not 1 <= self.replicas <= MOST_REPLICAS:
            raise UsageError(
                f"{self.model.name} cannot have {self.replicas} replicas",
                hint=f"Give a number from 1 to {MOST_REPLICAS}.",
            )

    def intent(self, usual: Mapping[str, Setting], replicas: int, now: float) -> Intent:
        """How a model that does not run is kept: as asked, or as is ``usual``; ``replicas`` that it had, or 0."""
        kept: dict[str, Any] = values(usual)
        return Intent(
            settings=self.settings,
            runtime=kept["runtime"] if self.runtime is None else self.runtime,
            keep_alive=kept["keep_alive"] if self.keep_alive is None else self.keep_alive,
            pinned=bool(kept["pin"] if self.pin is None else self.pin),
            replicas=self.replicas or replicas or kept["replicas"],
            asked=now,
        )
