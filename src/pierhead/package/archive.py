"""Tar archives of a model's small files, the same bytes for the same files: what Docker's v0.1 wants of a folder."""

from __future__ import annotations

import io
import tarfile
import uuid
from collections.abc import Sequence
from typing import IO, cast

import msgspec

from pierhead.store.blobs import CHUNK, Ingest
from pierhead.store.layout import Store
from pierhead.store.media import DIR_TAR, VLLM_TAR
from pierhead.store.model import ModelFile, Role

_APART = frozenset({"weights", "mmproj", "lora", "draft", "template", "license"})


def packed(store: Store, files: Sequence[ModelFile]) -> tuple[tuple[ModelFile, ...], tuple[ModelFile, ...]]:
    """Files for layers of v0.1: weights and the like as they are, other files of the top in one archive, folders each
    in one of their own. The second part are the members of the archives."""
    apart = [f for f in files if f.role in _APART and "/" not in f.name and f.packing == "raw"]
    rest = [f for f in files if f not in apart]
    groups: dict[str, list[ModelFile]] = {}
    made = list(apart)
    for file in rest:
        if file.packing != "raw":
            made.append(file)
        else:
            groups.setdefault(file.name.split("/")[0] if "/" in file.name else "", []).append(file)
    members: list[ModelFile] = []
    for top, group in sorted(groups.items()):
        made.append(_pack(store, top, group))
        members += [msgspec.structs.replace(f, digest="") for f in group]
    return tuple(made), tuple(members)


def _pack(store: Store, top: str, files: Sequence[ModelFile]) -> ModelFile:
    with store.ingest(f"tar:{uuid.uuid4().hex}") as ingest:
        with tarfile.open(fileobj=cast("IO[bytes]", _Sink(ingest)), mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for file in sorted(files, key=lambda f: f.name):
                about = tarfile.TarInfo(file.name)  # owner 0, time 0
                about.size, about.mode = file.size, 0o644
                with store.blob_path(file.digest).open("rb") as data:
                    archive.addfile(about, data)
        blob = ingest.commit()
    kind = DIR_TAR if top else VLLM_TAR
    role: Role = "other" if top else "config"
    return ModelFile(f"{top or 'config'}.tar", blob.size, role, blob.digest, packing="tar", media_type=kind)


class _Sink(io.RawIOBase):
    """What tarfile writes to: an ingest, a large piece at a time."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        view = memoryview(cast("bytes", data))
        for start in range(0, len(view), CHUNK):
            self._ingest.write(view[start : start + CHUNK])
        return len(view)
