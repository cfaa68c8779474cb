"""What was made of a model on this machine, kept beside it: an artifact about the model, found by a key.

It goes when the model goes, and is never pushed with it: it is worth something on machines like this one only.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from pierhead.errors import CorruptData
from pierhead.store import manifest as oci
from pierhead.store.index import Descriptor
from pierhead.store.layers import check_filepath, files_of
from pierhead.store.layout import Store
from pierhead.store.media import FILE, FILEPATH, MANIFEST, TITLE

TYPE = "application/vnd.pierhead.derived.v1+json"
KEY = "ai.pierhead.derived.key"
_EMPTY = "application/vnd.oci.empty.v1+json"


def find(store: Store, subject: str, key: str) -> Path | None:
    """The read-only folder of what was kept under ``key``; None where nothing (whole) is."""
    for one in store.referrers(subject):
        if one.artifact_type != TYPE:
            continue
        document = msgspec.json.decode(store.blob_path(one.digest).read_bytes(), type=oci.Manifest)
        if document.annotations.get(KEY) == key and all(store.has(layer.digest) for layer in document.layers):
            return store.lay_out(one.digest, files_of(document.layers, {}))
    return None


def keep(store: Store, subject: str, key: str, folder: Path, about: dict[str, str]) -> Path:
    """Keep the files of a folder as what was made of ``subject``; its read-only folder. CorruptData for links in it."""
    with store.lease():
        layers: list[Descriptor] = []
        for name in regular(folder):
            blob = store.adopt_file(folder / name)
            named = {FILEPATH: check_filepath(name), TITLE: name}
            layers.append(Descriptor(FILE, blob.digest, blob.size, annotations=named))
        if not layers:
            raise CorruptData("what was built has no files")
        empty = store.blobs.put(b"{}")
        size = store.blob_path(subject).stat().st_size
        document = oci.Manifest(
            media_type=MANIFEST,
            config=Descriptor(_EMPTY, empty.digest, empty.size),
            layers=layers,
            artifact_type=TYPE,
            subject=Descriptor(MANIFEST, subject, size),
            annotations={KEY: key, **about},
        )
        store.attach(subject, msgspec.json.encode(document))
    found = find(store, subject, key)
    assert found is not None
    return found


def regular(folder: Path) -> list[str]:
    """The names of the files below a folder that a stranger's program filled; it may hold nothing but files."""
    found: list[str] = []
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(path, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise CorruptData(f"what was built holds '{name[:100]}', which is no file")
        found += [os.path.relpath(os.path.join(path, name), folder) for name in names]
    return sorted(found)
