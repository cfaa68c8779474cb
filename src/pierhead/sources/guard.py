"""What stands between a plan and a name in the store: files that run code, and what is said about a model."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from pierhead.errors import PierError, Untrusted
from pierhead.events import Listener, Note
from pierhead.registry.referrers import Attachment, digest_of, keep
from pierhead.sources.artifact import Artifacts
from pierhead.sources.base import PullPlan, Source
from pierhead.sources.check import check
from pierhead.store.layout import Store
from pierhead.store.media import UNSAFE
from pierhead.store.model import Layer
from pierhead.trust.gate import Gate


class Guard:
    """One pull's: ``before`` its blobs are fetched, ``check`` and ``keep`` when they are here."""

    def __init__(
        self,
        store: Store,
        source: Source,
        plan: PullPlan,
        listener: Listener,
        gate: Gate,
        *,
        allow_unsafe: bool = False,
    ) -> None:
        self._store = store
        self._gate = gate
        self._source = source
        self._plan = plan
        self._listener = listener
        self._allow_unsafe = allow_unsafe
        self._said: list[Attachment] = []
        self._vouched = False

    async def before(self, name: str) -> None:
        """Learn what is said about the model, and ask the policy; Untrusted when it does not allow the model.

        A registry that cannot tell stops the pull only where the policy asks for what it should have told.
        """
        digest, trouble = "", ""
        if isinstance(self._source, Artifacts) and self._plan.manifest:
            digest = digest_of(self._plan.manifest)
            try:
                self._said = await self._source.said(self._plan)
            except PierError as exc:
                trouble = f"signatures and attestations could not be fetched: {exc.message}"
                self._listener(Note(message=trouble, level="warning"))
        try:
            warnings = await asyncio.to_thread(self._gate.check, self._plan.source, name, digest, self._said)
        except Untrusted as exc:
            raise Untrusted(f"{exc.message}; {trouble}", hint=exc.hint, data=exc.data) if trouble else exc from None
        self._vouched = await asyncio.to_thread(self._gate.vouches, self._plan.source, name, digest, self._said)
        for warning in warnings:
            self._listener(Note(message=warning, level="warning"))

    async def check(self, layers: Sequence[Layer], name: str) -> PullPlan:
        """Refuse what runs code; the plan, which remembers what was allowed."""
        files = [(layer.filepath, self._store.blob_path(layer.digest)) for layer in layers]
        again = f"pier pull {self._plan.source} --name {name} --allow-unsafe"
        found, allowed = await asyncio.to_thread(
            check, files, allow=self._allow_unsafe, again=again, vouched=self._vouched
        )
        for finding in found:
            self._listener(Note(message=f"{finding.file}: {finding.reason}", level="warning"))
        if not allowed:
            return self._plan
        return dataclasses.replace(self._plan, annotations={**self._plan.annotations, UNSAFE: allowed})

    async def keep(self) -> None:
        """Keep what is said as long as the model, which gets its name after it: a named model is whole in this, too."""
        if self._said:
            await asyncio.to_thread(keep, self._store, digest_of(self._plan.manifest), self._said)
