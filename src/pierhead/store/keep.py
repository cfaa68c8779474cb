"""What must stay although no name needs it: models that replicas use (pins), and what appears during a lease."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Generator
from pathlib import Path

from pierhead.errors import NotFound, UsageError
from pierhead.store.blobs import Blobs
from pierhead.store.files import locked, os_errors, replace, seized

MARGIN = 1.0  # seconds: filesystems may round times


class Keep:
    """The folders ``pins`` and ``leases``; the lock of the index orders pins and the collector."""

    def __init__(self, root: Path, blobs: Blobs) -> None:
        self._lock = root / "index.lock"
        self._pins = root / "pins"
        self._leases = root / "leases"
        self._blobs = blobs

    @contextlib.contextmanager
    def lease(self) -> Generator[None]:
        """While held by a live process, the collector keeps everything that appeared since it was taken."""
        path = self._leases / f"{uuid.uuid4().hex}.lock"
        with os_errors("cannot write to the store"):
            path.parent.mkdir(exist_ok=True)
            holder = locked(path)
            holder.__enter__()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            holder.__exit__(None, None, None)

    def horizon(self) -> float:
        """Unix time; what appeared later may be needed. Infinity without live leases; dead ones are removed."""
        oldest = float("inf")
        for path in self._leases.glob("*.lock"):
            with seized(path) as dead:
                if dead:
                    with contextlib.suppress(OSError):  # a look at a store that can only be read
                        path.unlink(missing_ok=True)
                    continue
            with contextlib.suppress(FileNotFoundError):
                oldest = min(oldest, path.stat().st_mtime - MARGIN)
        return oldest

    def pin(self, digest: str, owner: str) -> None:
        """Keep a model for ``owner`` until ``unpin``; NotFound when a collector was faster."""
        with os_errors("cannot write to the store"), locked(self._lock):
            if not self._blobs.has(digest):
                raise NotFound(f"the model {digest[:19]} is gone from the store", hint="Pull it again.")
            replace(self._pins / _owner(owner), self._blobs.path(digest).name.encode())

    def unpin(self, owner: str) -> None:
        (self._pins / _owner(owner)).unlink(missing_ok=True)

    def pins(self) -> dict[str, set[str]]:
        """Owners by model digest."""
        found: dict[str, set[str]] = {}
        with contextlib.suppress(FileNotFoundError):
            for path in self._pins.iterdir():
                if not path.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        found.setdefault(f"sha256:{path.read_text().strip()}", set()).add(path.name)
        return found


def _owner(owner: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", owner):
        raise UsageError(f"not an owner's name: {owner[:80]!r}")
    return owner
