"""Whether a manifest of strangers can be a model: its parts, their paths and their kinds; pure."""

from __future__ import annotations

from pathlib import PurePosixPath

import msgspec

from pierhead.errors import CorruptData, UsageError
from pierhead.store.blobs import DIGEST
from pierhead.store.layers import check_filepath, config_of, files_of
from pierhead.store.manifest import Manifest
from pierhead.store.media import FILEPATH, GGUF, kind_of
from pierhead.store.model import ModelFile

MAX_LAYERS = 4096


def sound_manifest(body: bytes, where: str) -> Manifest:
    """The manifest, read and looked through; CorruptData or UsageError (a kind of artifact that is no model)."""
    try:
        found = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as exc:  # nested without end
        raise CorruptData(f"{where} has no manifest that can be read: {exc}") from exc
    if len(found.layers) > MAX_LAYERS:
        raise CorruptData(f"{where} has more than {MAX_LAYERS} layers")
    for one in (found.config, *found.layers):
        if not DIGEST.fullmatch(one.digest) or not 0 <= one.size < 1 << 63:
            raise CorruptData(f"{where} has a manifest with a part that is not named by a sha256 digest and a size")
    paths = [check_filepath(x.annotations[FILEPATH]) for x in found.layers if x.annotations.get(FILEPATH)]
    if len({str(PurePosixPath(path)).casefold() for path in paths}) != len(paths):  # as the model's folder has them
        raise CorruptData(f"{where} has two files of one name")
    odd = sorted({x.media_type for x in found.layers if kind_of(x.media_type) is None})
    if odd:
        raise UsageError(
            f"{where} has layers of a kind that cannot be used: {', '.join(odd)[:300]}",
            hint="Models can be pulled as Docker's or CNCF ModelPack's artifacts.",
        )
    if found.config.size > 4 << 20:
        raise CorruptData(f"the config of {where} is larger than a config may be")
    return found


def sound_files(found: Manifest, config: bytes, where: str) -> tuple[ModelFile, ...]:
    """The files of the layers; UsageError where none of them is a model's."""
    files = files_of(found.layers, config_of(config))
    if not any(f.role in ("weights", "code") or f.packing != "raw" for f in files):
        raise UsageError(f"{where} holds no model's weights", hint=f"A model has a layer of type {GGUF}.")
    return files
