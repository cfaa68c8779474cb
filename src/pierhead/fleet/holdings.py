"""What the fleet needs of the store; a seam, so that supervision is tested without files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pierhead.store.model import ModelRecord


class Models(Protocol):
    """The store as the fleet sees it (see ``store.layout.Store``)."""

    def get(self, name: str) -> ModelRecord: ...

    def materialize(self, record: ModelRecord) -> Path: ...

    def recheck(self, record: ModelRecord) -> None: ...

    def pin(self, digest: str, owner: str) -> None: ...

    def unpin(self, owner: str) -> None: ...

    def pinned(self) -> dict[str, tuple[str, ...]]: ...
