"""Ollama's own folder of models on this machine; read only, and no link inside it is followed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pierhead.errors import BadReference, CorruptData, NotFound
from pierhead.sources.foreign import read_beneath
from pierhead.sources.ollama_model import MAX_MANIFEST, OllamaName
from pierhead.store.files import opened_beneath, os_errors

MAX_MODELS = 10_000
SYSTEM = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/models", "/var/lib/ollama/.ollama/models")


def ollama_folders(env: Mapping[str, str]) -> tuple[Path, ...]:
    """Where Ollama keeps models, for this user and for the system; only those that are there."""
    given = env.get("OLLAMA_MODELS", "").strip(" \t\"'")
    home = Path(env.get("HOME") or "/nonexistent")
    places = [Path(given)] if given else [home / ".ollama" / "models", *map(Path, SYSTEM)]
    return tuple(found for place in places if (found := _folder(place)) is not None)


def _folder(place: Path) -> Path | None:
    """The folder itself may be a link of the user's; what is inside it may not."""
    try:
        return place.resolve() if (place / "manifests").is_dir() else None
    except (OSError, RuntimeError):
        return None


@dataclass(frozen=True)
class OllamaStore:
    """One such folder; ``root`` holds ``manifests`` and ``blobs``."""

    root: Path

    def manifest(self, name: OllamaName) -> bytes:
        """NotFound when the folder has no such model."""
        place = f"manifests/{name.host}/{name.space}/{name.model}/{name.tag}"
        try:
            return read_beneath(self.root, place, MAX_MANIFEST)
        except NotFound as exc:
            raise NotFound(
                f"Ollama has no model '{name.short}' in {self.root}", hint="`pier adopt ollama` lists what it has."
            ) from exc

    def blob(self, digest: str) -> Path:
        """Where a blob is, or would be."""
        return self.root / self.blob_name(digest)

    @staticmethod
    def blob_name(digest: str) -> str:
        """The same, relative to the folder."""
        return f"blobs/{digest.replace(':', '-', 1)}"

    def read(self, digest: str, limit: int) -> bytes:
        """A small blob; the caller checks its digest."""
        return read_beneath(self.root, self.blob_name(digest), limit)

    def missing(self, wanted: Sequence[tuple[str, int]]) -> list[str]:
        """The digests of blobs that are not there in full."""
        found: list[str] = []
        for digest, size in wanted:
            try:
                with opened_beneath(self.root, self.blob_name(digest)) as handle:
                    whole = os.fstat(handle).st_size == size
            except NotFound:
                whole = False
            if not whole:
                found.append(digest)
        return found

    def partial(self, digest: str) -> bool:
        """Whether Ollama has begun to download the blob."""
        return os.path.lexists(f"{self.blob(digest)}-partial")

    def names(self) -> list[OllamaName]:
        """Every model that has a manifest, by name; what else lies there is passed over."""
        found: list[OllamaName] = []
        with os_errors(f"cannot read {self.root}"):
            for parts in _files(self.root / "manifests", 4):
                try:
                    found.append(OllamaName(*parts))
                except BadReference:
                    continue
                if len(found) > MAX_MODELS:
                    raise CorruptData(f"{self.root} holds more than {MAX_MODELS} models")
        return sorted(found, key=lambda name: name.short)


def _files(folder: Path, depth: int, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The parts of the paths of files ``depth`` folders down; links are passed over."""
    if folder.is_symlink():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            parts = (*above, entry.name)
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, depth - 1, parts)
            elif depth == 1 and entry.is_file(follow_symlinks=False):
                yield parts
