"""What stands between a plan and a name in the store: what is said about a model comes along with it."""

from __future__ import annotations

import asyncio

from pierhead.errors import PierError
from pierhead.events import Listener, Note
from pierhead.registry.referrers import Attachment, keep
from pierhead.sources.artifact import Artifacts
from pierhead.sources.base import PullPlan, Source
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord


class Guard:
    """One pull's; ``before`` its blobs are fetched and ``after`` the model has its name."""

    def __init__(self, store: Store, source: Source, plan: PullPlan, listener: Listener) -> None:
        self._store = store
        self._source = source
        self._plan = plan
        self._listener = listener
        self._said: list[Attachment] = []

    async def before(self) -> None:
        """Learn what is said about the model; a registry that cannot tell does not stop the pull."""
        if not isinstance(self._source, Artifacts) or not self._plan.manifest:
            return
        try:
            self._said = await self._source.said(self._plan)
        except PierError as exc:
            self._listener(Note(message=f"signatures and attestations were not brought along: {exc.message}"))

    async def after(self, record: ModelRecord) -> None:
        """Keep it as long as the model."""
        await asyncio.to_thread(keep, self._store, record.digest, self._said)
