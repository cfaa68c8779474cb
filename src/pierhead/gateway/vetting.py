"""A connection whose request has a token that must be verified first; answers nothing itself but delays the request."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pierhead.gateway.faults import Fault
from pierhead.gateway.tokens import Tokens

if TYPE_CHECKING:
    from pierhead.gateway.protocol import ClientConnection


class Vetting:
    """Looks at the token and lets the connection read the request's head again."""

    __slots__ = ("_client", "_task", "started", "status")

    def __init__(self, client: ClientConnection, tokens: Tokens, token: bytes) -> None:
        self._client = client
        self.started = time.monotonic()
        self.status = 0
        self._task = asyncio.get_running_loop().create_task(self._vet(tokens, token))

    async def _vet(self, tokens: Tokens, token: bytes) -> None:
        await tokens.vet(token)
        self._client.vetted()

    def cancel(self) -> None:
        """The client went away."""
        self._task.cancel()

    def expire(self, fault: Fault) -> None:
        """It took too long; see the provider's own timeout."""
        self._task.cancel()
        self._client.vetted()

    def pause(self) -> None:
        """Nothing comes of this."""

    def resume(self) -> None:
        """See ``pause``."""

    def probe(self) -> None:
        """See ``pause``."""
