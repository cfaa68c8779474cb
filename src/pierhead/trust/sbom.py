"""Bills of materials of models: made as a CycloneDX ML-BOM, or taken as they are in SPDX or CycloneDX; pure."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

import msgspec

from pierhead.errors import CorruptData, UsageError
from pierhead.store.model import ModelFile, ModelRecord
from pierhead.trust.dsse import CYCLONEDX, SPDX
from pierhead.trust.evidence import CYCLONEDX_JSON, SPDX_JSON
from pierhead.trust.extra import extra

MAX_SBOM = 8 << 20
_SPACE = uuid.UUID("6f7c2a52-61a0-5d0e-9c3a-0d7c1f1f4a10")  # of serial numbers: one model, one number
_TOLD = ("architecture", "quantization", "parameters", "context_length", "format", "layers", "embedding_length")


def generate(record: ModelRecord) -> bytes:
    """A CycloneDX 1.6 ML-BOM from what the store knows: files and their digests, licence, source, the header's facts.

    The same model gives the same bytes.
    """
    with extra():
        cyclonedx = _Library()
    model = cyclonedx.model(record)
    files = [cyclonedx.file(f) for f in record.files]
    about = cyclonedx.bom.BomMetaData(component=model, timestamp=_moment(record.created))
    made = cyclonedx.bom.Bom(metadata=about, components=files, serial_number=uuid.uuid5(_SPACE, record.digest))
    made.register_dependency(model, files)
    text: str = cyclonedx.output.JsonV1Dot6(made).output_as_string(indent=2)
    return text.encode()


class _Library:
    """CycloneDX's library, whose decorated classes a type checker cannot follow."""

    def __init__(self) -> None:
        self.basic: Any = import_module("cyclonedx.model")
        self.bom: Any = import_module("cyclonedx.model.bom")
        self.output: Any = import_module("cyclonedx.output.json")
        self._component: Any = import_module("cyclonedx.model.component")
        self._license: Any = import_module("cyclonedx.contrib.license.factories")

    def _hashed(self, digest: str) -> Any:
        basic = self.basic
        return basic.HashType(alg=basic.HashAlgorithm.SHA_256, content=digest.removeprefix("sha256:"))

    def _properties(self, told: Mapping[str, Any]) -> list[Any]:
        return [self.basic.Property(name=f"pierhead:{k}", value=str(v)) for k, v in told.items() if v not in (None, "")]

    def model(self, record: ModelRecord) -> Any:
        basic, kinds = self.basic, self._component.ComponentType
        places: list[Any] = []
        if record.source:
            kind = basic.ExternalReferenceType.DISTRIBUTION
            places.append(basic.ExternalReference(type=kind, url=basic.XsUri(record.source)))
        licence = str(record.metadata.get("license") or "").strip()[:200]
        return self._component.Component(
            type=kinds.MACHINE_LEARNING_MODEL,
            name=record.name,
            version=record.digest,
            bom_ref=record.digest,
            hashes=[self._hashed(record.digest)],
            licenses=[self._license.LicenseFactory().make_from_string(licence)] if licence else [],
            external_references=places,
            properties=self._properties({name: record.metadata.get(name) for name in _TOLD}),
        )

    def file(self, file: ModelFile) -> Any:
        kinds = self._component.ComponentType
        return self._component.Component(
            type=kinds.DATA if file.role == "weights" else kinds.FILE,
            name=file.name,
            bom_ref=f"{file.digest}/{file.name}",
            hashes=[self._hashed(file.digest)],
            properties=self._properties({"role": file.role, "size": file.size, "media-type": file.media_type}),
        )


def _moment(created: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(created.replace("Z", "+00:00")).astimezone(datetime.UTC)
    except ValueError:
        return datetime.datetime.fromtimestamp(0, datetime.UTC)


def read(data: bytes) -> tuple[str, str, dict[str, Any]]:
    """A document of a user's: its media type, its predicate type and its content.

    UsageError for what is neither SPDX 2 nor CycloneDX in JSON.
    """
    if len(data) > MAX_SBOM:
        raise UsageError(f"an SBOM of more than {MAX_SBOM >> 20} MiB is not attached")
    try:
        found: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"the SBOM cannot be read: {exc}", hint="SPDX and CycloneDX are read as JSON.") from exc
    if isinstance(found, dict):
        document = cast("dict[str, Any]", found)
        if str(document.get("spdxVersion", "")).startswith("SPDX-2."):
            return SPDX_JSON, SPDX, document
        if document.get("bomFormat") == "CycloneDX" and document.get("specVersion"):
            return CYCLONEDX_JSON, CYCLONEDX, document
    raise UsageError(
        "this is neither an SPDX 2 nor a CycloneDX document", hint="`pier attest MODEL --generate` makes one."
    )
