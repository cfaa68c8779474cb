"""What the control API sees of the daemon."""

from __future__ import annotations

from typing import Protocol

from pierhead.daemon.keys import Keys
from pierhead.daemon.wire import StatusInfo
from pierhead.events import Listener
from pierhead.fleet.supervisor import Supervisor
from pierhead.store.layout import Store


class Parts(Protocol):
    """The composed daemon; ``started`` is Unix time."""

    store: Store
    fleet: Supervisor
    keys: Keys
    started: float

    async def status(self) -> StatusInfo: ...

    async def pull(self, reference: str, name: str | None, listener: Listener) -> None:
        """Fetch a model into the store."""
        ...

    def models_changed(self) -> None:
        """The store's contents are others now."""
        ...

    async def keys_changed(self) -> None:
        """The set of keys that hold is another now; returns once that is in force."""
        ...

    def shut_down(self, mode: str) -> None:
        """Begin to end: ``stop`` or ``handover``."""
        ...
