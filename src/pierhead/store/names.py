"""Names on disk: ``index.json``, replaced under its lock, and the log of its moves; knows no model's content."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import msgspec

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.store.blobs import Blobs
from pierhead.store.files import locked, mapped, replace
from pierhead.store.history import History
from pierhead.store.index import Index, decode_index, is_digest_like
from pierhead.store.manifest import reachable
from pierhead.store.media import CONFIG
from pierhead.store.model import Blob

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@:/+-]{0,253}[A-Za-z0-9_])?")


def check_name(name: str) -> None:
    """UsageError for what cannot name a model; ``NAME@digest`` means what the digest says, and nothing else ever."""
    _, at, word = name.rpartition("@")
    digest = name.startswith("sha256:") or (at and is_digest_like(word))
    if not _NAME.fullmatch(name) or ".." in name or "//" in name or digest:
        raise UsageError(
            f"'{name[:100]}' cannot name a model", hint="Use letters, digits and . _ - : / @, up to 255 of them."
        )


class Names:
    """The index of one store; the only truth about what is in it."""

    def __init__(self, root: Path, blobs: Blobs, step: Callable[[str], None]) -> None:
        self._root = root
        self._blobs = blobs
        self._step = step
        self.path = root / "index.json"
        self.lock = root / "index.lock"
        self.history = History(root / "history.jsonl")

    def create(self) -> None:
        """An empty index, unless there is one."""
        with locked(self.lock):
            if not (self._root / "oci-layout").exists():
                replace(self._root / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            if not self.path.exists():
                replace(self.path, msgspec.json.encode(Index()))

    def read(self) -> Index:
        """The index as it is; CorruptData when it is damaged."""
        try:
            return decode_index(self.path.read_bytes())
        except msgspec.DecodeError as exc:
            raise CorruptData(
                f"the store's {self.path} cannot be read: {exc}",
                hint=f"Restore it from a backup, or move {self._root} away and pull again.",
            ) from exc
        except OSError as exc:
            raise mapped(exc, f"cannot read the store in {self._root}") from exc

    def steadily(self, look: Callable[[Index], T]) -> T:
        """What ``look`` finds; it looks again when what it misses was removed by another process meanwhile."""
        while True:
            index = self.read()
            try:
                return look(index)
            except NotFound:
                if self.read() == index:
                    raise

    @contextlib.contextmanager
    def edit(self) -> Generator[Index]:
        """The index under its lock; what was changed is written at the end, unless an exception leaves."""
        with locked(self.lock):
            index = self.read()
            before = msgspec.json.encode(index)
            yield index
            self.write(index, before)

    def write(self, index: Index, before: bytes = b"") -> None:
        """Replace the index, when it differs from ``before``; the caller holds the lock."""
        after = msgspec.json.encode(index)
        if after != before:
            replace(self.path, after)

    def point(self, name: str, stored: Blob, *, by: str, source: str = "", artifact_type: str = CONFIG) -> None:
        """Make a name mean a manifest; what it meant before becomes an earlier version of it.

        NotFound when a blob of the model is gone meanwhile: a name never means what is not there.
        """
        with self.edit() as index:
            self.complete(stored.digest)
            old = next((e.digest for e in index.named if e.name == name), "")
            self.history.add(name, stored.digest, was=old, by=by, source=source)
            self._step("model:history")
            index.set(name, stored, artifact_type)
            self._step("model:index")

    def set_aside(self, name: str, stored: Blob, artifact_type: str = CONFIG) -> None:
        """Keep a manifest as a version of a name, which goes on to mean what it means; NotFound as in ``point``."""
        with self.edit() as index:
            self.complete(stored.digest)
            index.set_aside(name, stored, artifact_type)

    def complete(self, digest: str) -> None:
        """NotFound unless the manifest and every blob it needs are here; the caller holds the lock."""
        manifest = self._blobs.path(digest)
        for name in (manifest.name, *sorted(reachable(manifest))):
            if not (self._blobs.folder / name).is_file():
                raise NotFound(
                    f"a part of the model is gone from the store: sha256:{name[:12]}",
                    hint="It was removed meanwhile. Pull the model again.",
                )
