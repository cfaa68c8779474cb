"""The part of a delivery that a translation has a say in: its whole answers, what it stores, how it tells a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from pierhead.gateway.booking import Booked
from pierhead.gateway.dialects.base import JSON, Reply, Save, Translation
from pierhead.gateway.faults import REASONS, Fault
from pierhead.gateway.skeleton import INLINE
from pierhead.gateway.usage import plus

if TYPE_CHECKING:
    pass


class Translated(Booked):
    """What ``Delivery`` is made of beside the relaying itself."""

    def _translated(self, translation: Translation, body: bytes) -> None:
        """Give the client its whole answer, made of the engine's."""
        if len(body) > INLINE:
            self._spawn(self._translate_aside(translation, body))
            return
        try:
            made = translation.answer(body, self.usage)
        except Fault as fault:
            self._fail(fault)
            return
        self._when_kept(translation, lambda: self._give(made), self._fail)

    async def _translate_aside(self, translation: Translation, body: bytes) -> None:
        """The same for a long answer, off the loop."""
        try:
            made = await asyncio.to_thread(translation.answer, body, self.usage)
            if translation.saves:
                await self._services.keep(self._request.key_id, translation.saves)
        except Fault as fault:
            self._fail(fault)
            return
        self._give(made)

    def _give(self, made: bytes | Reply) -> None:
        if isinstance(made, Reply):
            self._reply(made)
        else:
            self._whole(self._prefix(200, JSON), made)

    def _when_kept(self, translation: Translation, then: Callable[[], None], failed: Callable[[Fault], None]) -> None:
        """Go on when what is to be found again is stored: nobody has the last byte of an answer that is not."""
        if translation.saves:
            self._spawn(self._keep(translation.saves, then, failed))
        else:
            then()

    async def _keep(self, saves: tuple[Save, ...], then: Callable[[], None], failed: Callable[[Fault], None]) -> None:
        try:
            await self._services.keep(self._request.key_id, saves)
        except Fault as fault:
            failed(fault)
            return
        then()

    def _reply(self, reply: Reply) -> None:
        """A translation knew the answer by itself."""
        self.status = reply.status
        if reply.spent.known:  # an engine has worked for it, if not by the usual way
            self.usage, self._asked = plus(self.usage, reply.spent), True
        self._whole(self._prefix(reply.status, reply.kind) + reply.headers, reply.body)

    def _prefix(self, status: int, kind: bytes) -> bytes:
        """The first lines of an answer that a translation made; Anthropic's clients look for its id by another name."""
        line = b"request-id: %b\r\n" % self.id if self._request.dialect == "anthropic" else b""
        return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\n%b" % (status, REASONS.get(status, b"Unknown"), kind, line)

    # --- what the rest of the delivery does -----------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        raise NotImplementedError

    def _whole(self, prefix: bytes, body: bytes) -> None:
        raise NotImplementedError

    def _fail(self, fault: Fault) -> None:
        raise NotImplementedError
