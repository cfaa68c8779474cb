"""What the control API sees of the daemon."""

from __future__ import annotations

from typing import Protocol

from pierhead.config import Settings
from pierhead.daemon.keys import Keys
from pierhead.daemon.modelsettings import ModelDesk
from pierhead.daemon.routefile import RouteTable
from pierhead.daemon.usage import Usage
from pierhead.daemon.wire import RouteList, StatusInfo
from pierhead.events import Listener
from pierhead.fleet.supervisor import Supervisor
from pierhead.gateway.link import Price
from pierhead.paths import Paths
from pierhead.refs import Reference
from pierhead.store.layout import Store


class Parts(Protocol):
    """The composed daemon; ``started`` is Unix time."""

    store: Store
    fleet: Supervisor
    keys: Keys
    models: ModelDesk
    usage: Usage
    settings: Settings
    paths: Paths
    started: float

    async def status(self) -> StatusInfo: ...

    async def pull(self, reference: str, name: str | None, listener: Listener) -> None:
        """Fetch a model into the store."""
        ...

    async def push(self, model: str, target: Reference, listener: Listener) -> None:
        """Send a model to a registry."""
        ...

    async def models_refreshed(self) -> None:
        """The store's contents are others now; returns once the gateway acts on them."""
        ...

    def models_changed(self) -> None:
        """The store's contents are others now."""
        ...

    async def keys_changed(self) -> None:
        """The set of keys that hold is another now; returns once that is in force."""
        ...

    async def routes(self) -> RouteList:
        """Every name that clients may send."""
        ...

    async def check_routes(self, text: str) -> RouteList:
        """What a ``routes.toml`` with this text would offer."""
        ...

    async def change_route(self, name: str, table: RouteTable | None) -> RouteList:
        """Write a configured route, or take it out; returns once the gateway acts on it."""
        ...

    async def prices_changed(self) -> list[tuple[Price, str]]:
        """Read the prices again; those that hold, with where each comes from."""
        ...

    def shut_down(self, mode: str) -> None:
        """Begin to end: ``stop`` or ``handover``."""
        ...
