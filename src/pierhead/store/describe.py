"""What a store finds out about an artifact that others made: its header's summary, and what its archives hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pierhead.formats.reading import File
from pierhead.formats.summarize import summarize
from pierhead.store.layers import config_of, files_of
from pierhead.store.manifest import Manifest
from pierhead.store.materialize import unpacked
from pierhead.store.model import ModelFile


def describe(
    manifest: bytes, config: bytes, blob_path: Callable[[str], Path], unpack: Callable[[Sequence[ModelFile]], Path]
) -> dict[str, Any]:
    """``summary`` and ``unpacked`` of an artifact whose blobs are in the store, for ``commit_artifact``.

    ``unpack`` lays the files out and is only called where some of them are archives. CorruptData where the weights are
    not what their types say.
    """
    document = msgspec.json.decode(manifest, type=Manifest)
    files = files_of(document.layers, config_of(config))
    raw = [f for f in files if f.packing == "raw"]
    paths = {f.name: blob_path(f.digest) for f in raw}
    found: tuple[ModelFile, ...] = ()
    if len(raw) != len(files):
        folder = unpack(files)
        found = unpacked(files, folder)
        paths |= {f.name: folder / f.name for f in found}
    return {
        "summary": msgspec.to_builtins(summary_of((*raw, *found), paths)),
        "unpacked": msgspec.to_builtins(found),
    }


def summary_of(files: Sequence[ModelFile], paths: dict[str, Path]) -> dict[str, Any]:
    """The summary of files on this machine."""
    return summarize([File(f.name, f.size, f.role, f.format) for f in files], paths)
