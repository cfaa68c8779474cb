"""SLSA provenance (v1) of a model: where it came from, what it is made of, who put it together; pure."""

from __future__ import annotations

from typing import Any

from pierhead import __version__
from pierhead.store.model import ModelRecord

BUILD_TYPE = "urn:pierhead:build:model:v1"
BUILDER = "urn:pierhead:builder:local"
_BASE_DIGEST = "org.opencontainers.image.base.digest"
_BASE_NAME = "org.opencontainers.image.base.name"
_REVISION = "org.opencontainers.image.revision"


def provenance(record: ModelRecord, builder: str = "") -> dict[str, Any]:
    """The predicate: the source as pinned, the base, and every file by digest as materials."""
    materials: list[dict[str, Any]] = []
    if record.source:
        revision = record.annotations.get(_REVISION, "")
        materials.append({"uri": record.source, **({"digest": {"gitCommit": revision}} if revision else {})})
    base = record.annotations.get(_BASE_DIGEST, "")
    if base.startswith("sha256:"):
        name = record.annotations.get(_BASE_NAME, "")
        materials.append({"uri": name or f"urn:pierhead:model:{base}", "digest": _digest(base)})
    materials += [{"name": f.name, "digest": _digest(f.digest), "mediaType": f.media_type} for f in record.files]
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"source": record.source, "name": record.name},
            "internalParameters": {},
            "resolvedDependencies": materials,
        },
        "runDetails": {
            "builder": {"id": builder or BUILDER, "version": {"pierhead": __version__}},
            "metadata": {"finishedOn": record.created} if record.created else {},
        },
    }


def _digest(text: str) -> dict[str, str]:
    algorithm, _, value = text.partition(":")
    return {algorithm: value}
