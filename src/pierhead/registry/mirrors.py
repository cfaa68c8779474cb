"""One repository at its mirrors and then at its own registry: a mirror that fails is passed over; for pulls only."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import TracebackType
from typing import Self, TypeVar

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, SourceUnavailable
from pierhead.events import Listener, Note, ignore
from pierhead.registry.client import Registry
from pierhead.registry.credentials import find_login
from pierhead.registry.name import ImageName
from pierhead.registry.places import mirror_places, own_place
from pierhead.registry.wire import Retry

T = TypeVar("T")
PASSED = (AccessDenied, CorruptData, NotFound, SourceUnavailable)  # what another place may do better


class Mirrors:
    """Each place is asked with its own login. A mirror that is down or lies is left out from then on."""

    def __init__(self, name: ImageName, registries: tuple[Registry, ...], listener: Listener = ignore) -> None:
        self.name = name
        self._left = list(registries)  # the last is the registry itself
        self._all = registries
        self._listener = listener

    @classmethod
    async def open(
        cls,
        name: ImageName,
        settings: SourceSettings,
        env: Mapping[str, str],
        *,
        retry: Retry | None = None,
        listener: Listener = ignore,
    ) -> Self:
        """With the mirrors of the settings and the logins that are kept for each."""
        retry = retry or Retry()
        brief = dataclasses.replace(retry, attempts=min(2, retry.attempts), unreachable=1)
        found: list[Registry] = []
        for place in (*mirror_places(name.host, settings), own_place(name.host, settings)):
            login = await asyncio.to_thread(find_login, place.host, env)
            found.append(Registry(name, settings, login, retry=brief if place.mirror else retry, place=place))
        return cls(name, tuple(found), listener)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for registry in self._all:
            await registry.__aexit__(kind, value, trace)

    @property
    def own(self) -> Registry:
        """The registry itself."""
        return self._all[-1]

    @property
    def mirrored(self) -> bool:
        """Whether something else than the registry itself would be asked first."""
        return self._left[0] is not self.own

    def each(self) -> Iterator[Registry]:
        """The places to ask, the registry itself at the end."""
        for registry in tuple(self._left):
            if registry in self._left:
                yield registry

    async def first(self, ask: Callable[[Registry], Awaitable[T]]) -> T:
        """The first good answer; the registry's own error when there is none."""
        for registry in self.each():
            try:
                return await ask(registry)
            except PASSED as exc:
                if registry is self.own:
                    raise
                self.pass_over(registry, exc)
        raise AssertionError

    def pass_over(self, registry: Registry, why: PierError) -> None:
        """A mirror failed: for good, unless it only lacked something."""
        if not isinstance(why, NotFound) and registry in self._left:
            self._left.remove(registry)
            self._listener(Note(message=f"The mirror {registry.place.host} is passed over: {why.message}"))
