"""Docker Model Runner's folder of models on this machine; read only, and no link inside it is followed.

Source: the Go code of Docker Model Runner (pkg/distribution/internal/store).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.refs import Reference
from pierhead.registry.client import MAX_DOCUMENT
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.foreign import decode, read_beneath
from pierhead.sources.local import read_local
from pierhead.store.blobs import DIGEST, digest_of
from pierhead.store.files import opened_beneath, os_errors
from pierhead.store.model import ModelFile
from pierhead.store.sound import sound_files, sound_manifest

MAX_INDEX = 16 << 20
MAX_MANIFEST = 4 << 20
MAX_MODELS = 10_000
VOLUME = "volumes/docker-model-runner-models/_data"
_HUB = re.compile(r"(?:index\.|registry-1\.)?docker\.io/")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,253}")


class DockerEntry(msgspec.Struct):
    """A model of the index: the manifest's digest, and names."""

    id: str
    tags: list[str] | None = None

    @property
    def ours(self) -> tuple[str, ...]:
        """What the model is called in our store; a model without a tag is named after its digest."""
        names = dict.fromkeys(our_name(tag) for tag in self.tags or ())
        good = tuple(name for name in names if _NAME.fullmatch(name) and ".." not in name and "//" not in name)
        return good or (f"docker-model-{self.id[7:19]}",)


class _Index(msgspec.Struct):
    models: list[DockerEntry] | None = None


class _Layout(msgspec.Struct):
    version: str = ""


def our_name(tag: str) -> str:
    """A name as Docker keeps it, without what goes without saying: Docker Hub, ``latest``."""
    name = re.sub(r"^huggingface\.co/", "hf.co/", _HUB.sub("", tag.partition("@")[0], count=1))
    return name.removesuffix(":latest")


def docker_folders(env: Mapping[str, str]) -> tuple[Path, ...]:
    """Where Docker Model Runner keeps models: Desktop's folder, and the volume of the Engine, root's or rootless."""
    home = Path(env.get("HOME") or "/nonexistent")
    data = Path(env.get("XDG_DATA_HOME") or home / ".local" / "share")
    places = [home / ".docker" / "models", Path("/var/lib/docker") / VOLUME, data / "docker" / VOLUME]
    given = env.get("MODELS_PATH", "").strip(" \t\"'")
    return tuple(place.resolve() for place in ([Path(given)] if given else places) if _is_there(place))


def _is_there(place: Path) -> bool:
    try:
        return (place / "layout.json").is_file() or (place / "models.json").is_file()
    except OSError:  # not ours to look into
        return False


@dataclass(frozen=True)
class DockerStore:
    """One such folder, and a source of its models: a reference's ``digest`` is the manifest's."""

    root: Path

    def entries(self) -> list[DockerEntry]:
        """Every model of the index; CorruptData where it cannot be read, UsageError for a layout of another time."""
        try:
            data = read_beneath(self.root, "layout.json", MAX_MANIFEST)
        except NotFound:
            data = b"{}"
        layout = decode(data, _Layout, str(self.root / "layout.json"))
        if layout.version and layout.version.partition(".")[0] != "1":
            raise UsageError(
                f"{self.root} is laid out in version {layout.version[:20]}, which is not known here",
                hint="Push the models to a registry with `docker model push`, and pull them from there.",
            )
        data = read_beneath(self.root, "models.json", MAX_INDEX)
        found = decode(data, _Index, str(self.root / "models.json")).models or []
        if len(found) > MAX_MODELS:
            raise CorruptData(f"{self.root} holds more than {MAX_MODELS} models")
        bad = next((e.id for e in found if not DIGEST.fullmatch(e.id)), "")
        if bad:
            raise CorruptData(f"{self.root / 'models.json'} names a model by {bad[:80]!r}, which is no digest")
        return found

    def planned(self, digest: str) -> PullPlan:
        """The artifact, its documents checked; NotFound with ``missing`` when a part of it is not there in full."""
        where = f"{digest[:19]} in {self.root}"
        body = read_beneath(self.root, f"manifests/{_place(digest)}", MAX_MANIFEST)
        if digest_of(body) != digest:
            raise CorruptData(f"the manifest of {where} does not match its digest", hint="Pull the model with Docker.")
        found = sound_manifest(body, where)
        wanted = [(d.digest, d.size) for d in (found.config, *found.layers)]
        missing = self._missing(wanted)
        if missing:
            began = any(os.path.lexists(self.root / f"blobs/{_place(d)}.incomplete") for d in missing)
            raise NotFound(
                f"{where} is not whole: {len(missing)} of {len(wanted)} parts are "
                + ("still being downloaded" if began else "missing or of another size"),
                hint="Type `docker model pull` for it, then try again.",
                data={"missing": missing},
            )
        config = read_beneath(self.root, f"blobs/{_place(found.config.digest)}", MAX_DOCUMENT)
        if digest_of(config) != found.config.digest:
            raise CorruptData(f"the config of {where} does not match its digest", hint="Pull the model with Docker.")
        files = tuple(self._file(file) for file in sound_files(found, config, where))
        return PullPlan(digest, f"file:{self.root}@{digest}", files, {}, body, config)

    def _missing(self, wanted: Sequence[tuple[str, int]]) -> list[str]:
        found: list[str] = []
        for digest, size in wanted:
            try:
                with opened_beneath(self.root, f"blobs/{_place(digest)}") as handle:
                    whole = os.fstat(handle).st_size == size
            except NotFound:
                whole = False
            if not whole:
                found.append(digest)
        return found

    def _file(self, file: ModelFile) -> RemoteFile:
        path = self.root / f"blobs/{_place(file.digest)}"
        made = RemoteFile(file.name, file.digest, file.size, file.digest, file.role, path, beneath=self.root)
        return replace(made, format=file.format, packing=file.packing)

    # --- as a source ----------------------------------------------------------------------------------------------

    async def plan(self, reference: Reference) -> PullPlan:
        with os_errors(f"cannot read {self.root}"):
            return await asyncio.to_thread(self.planned, reference.digest)

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        return await asyncio.to_thread(read_local, file, offset, length)

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        raise NotImplementedError("the store takes local files in itself")

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""


def _place(digest: str) -> str:
    """A digest as a path below ``blobs`` or ``manifests``."""
    if not DIGEST.fullmatch(digest):
        raise CorruptData(f"not a sha256 digest: {digest[:80]!r}")
    return digest.replace(":", "/", 1)
