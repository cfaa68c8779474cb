"""What is said about a model, sorted into what can be proved; and whether one signer's word holds for one digest.

Three forms are read: Sigstore bundles (cosign 3, and ours), cosign's older simple-signing layers, and its older DSSE
layers. Proof comes first: nothing inside a signed document is believed before its signature holds.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from pierhead.errors import CorruptData
from pierhead.registry.referrers import DSSE_LAYER, SIMPLE_SIGNING, Attachment
from pierhead.trust import bundle
from pierhead.trust.bundle import Certified
from pierhead.trust.dsse import CYCLONEDX, PAYLOAD, PROVENANCE, SIGNED, SPDX, Envelope, Statement, read_statement
from pierhead.trust.keys import PublicKey

Form = Literal["bundle", "simple", "dsse", "document"]
SPDX_JSON = "application/spdx+json"
CYCLONEDX_JSON = "application/vnd.cyclonedx+json"
MAX_EVIDENCE = 256
_SIGNATURE = "dev.cosignproject.cosign/signature"
_CERTIFICATE = "dev.sigstore.cosign/certificate"


@dataclass(frozen=True)
class Evidence:
    """One signed document, or a bare one (``document``: an SBOM that nobody signed); ``referrer`` is its manifest's."""

    form: Form
    referrer: str
    data: bytes
    kind: str = ""  # what it says it is: a predicate type or media type; not proved
    signature: bytes = b""
    created: str = ""
    certificate: bool = False


@dataclass(frozen=True)
class Signer:
    """One of the two: a key, or a certified identity with the root that its instance of Sigstore is judged by."""

    key: PublicKey | None = None
    certified: Certified | None = None
    trusted_root: Path | None = None
    offline: bool = True
    label: str = ""

    def __str__(self) -> str:
        if self.label:
            return self.label
        if self.key is not None:
            return f"key {self.key.fingerprint[:16]}"
        wanted = self.certified or Certified()
        return f"{wanted.identity or wanted.identity_regexp} (issuer {wanted.issuer or wanted.issuer_regexp})"


@dataclass(frozen=True)
class Claim:
    """What a signature proves: a claim of some type; ``names`` are references that it was made for (or none)."""

    kind: str
    names: tuple[str, ...]
    predicate: Any
    referrer: str


def evidence_of(attachments: Sequence[Attachment]) -> list[Evidence]:
    """Everything in some referrers that can be proved or shown; what cannot be read is passed over."""
    found: list[Evidence] = []
    for one in attachments:
        try:
            found += _of(one)
        except CorruptData:
            continue
    return found[:MAX_EVIDENCE]


def _of(one: Attachment) -> list[Evidence]:
    document = one.document
    created = document.annotations.get("org.opencontainers.image.created", "")
    kind = document.annotations.get("dev.sigstore.bundle.predicateType", "")
    found: list[Evidence] = []
    for layer in document.layers:
        data = one.blobs.get(layer.digest, b"")
        if layer.media_type.startswith("application/vnd.dev.sigstore.bundle"):
            found.append(Evidence("bundle", one.digest, data, kind or _kind_in(data), created=created))
        elif layer.media_type == SIMPLE_SIGNING:
            signature = _decoded(layer.annotations.get(_SIGNATURE, ""))
            certified = _CERTIFICATE in layer.annotations
            found.append(Evidence("simple", one.digest, data, SIGNED, signature, created, certified))
        elif layer.media_type == DSSE_LAYER:
            kind = layer.annotations.get("predicateType", "")
            certified = _CERTIFICATE in layer.annotations
            found.append(Evidence("dsse", one.digest, data, kind, created=created, certificate=certified))
        elif layer.media_type == PAYLOAD:
            found.append(Evidence("document", one.digest, data, _statement_kind(data), created=created))
        elif layer.media_type.startswith((SPDX_JSON, CYCLONEDX_JSON)):
            found.append(Evidence("document", one.digest, data, layer.media_type, created=created))
    return found


def _kind_in(data: bytes) -> str:
    try:
        envelope = bundle.read(data).dsse_envelope
        return read_statement(envelope.payload_type, envelope.payload).predicate_type if envelope else ""
    except CorruptData:
        return ""


def _statement_kind(data: bytes) -> str:
    try:
        return read_statement(PAYLOAD, data).predicate_type
    except CorruptData:
        return PAYLOAD


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""


# --- proof ------------------------------------------------------------------------------------------------------------


def prove(evidence: Evidence, digest: str, signer: Signer) -> Claim:
    """What ``signer`` claims about ``digest``; CorruptData says why this evidence proves nothing of the kind."""
    if evidence.form == "document":
        raise CorruptData("it is not signed")
    if evidence.form == "simple":
        return _simple(evidence, digest, signer)
    statement = _bundle(evidence, signer) if evidence.form == "bundle" else _envelope(evidence, signer)
    names = statement.names(digest)
    if names is None:
        raise CorruptData("it was made for another model: the digest that it signs is not this one's")
    return Claim(statement.predicate_type, tuple(n for n in names if n), statement.predicate, evidence.referrer)


def _bundle(evidence: Evidence, signer: Signer) -> Statement:
    if bundle.read(evidence.data).keyless:
        if signer.certified is None:
            raise CorruptData("it was made without a key, by an identity")
        return bundle.verify_keyless(evidence.data, signer.certified, signer.trusted_root, offline=signer.offline)
    if signer.key is None:
        raise CorruptData("it was made with a key, not by an identity")
    return bundle.verify_with_key(evidence.data, signer.key)


def _envelope(evidence: Evidence, signer: Signer) -> Statement:
    key = _key_of(evidence, signer)
    try:
        envelope = msgspec.json.decode(evidence.data, type=Envelope)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"it cannot be read: {exc}") from exc
    if not any(key.verifies(s.sig, envelope.signed_bytes) for s in envelope.signatures[:16]):
        raise CorruptData("the signature is not this key's")
    return read_statement(envelope.payload_type, envelope.payload)


def _key_of(evidence: Evidence, signer: Signer) -> PublicKey:
    if signer.key is None and evidence.certificate:
        raise CorruptData("it is in cosign's older keyless form, which is not read; sign again with a bundle")
    if signer.key is None:
        raise CorruptData("it was made with a key, not by an identity")
    return signer.key


class _Image(msgspec.Struct, rename="kebab"):
    docker_manifest_digest: str


class _Named(msgspec.Struct, rename="kebab"):
    docker_reference: str = ""


class _Critical(msgspec.Struct):
    image: _Image
    type: str
    identity: _Named = msgspec.field(default_factory=_Named)


class _Simple(msgspec.Struct):
    critical: _Critical


def _simple(evidence: Evidence, digest: str, signer: Signer) -> Claim:
    """Cosign's older form: a small JSON document that names the digest."""
    key = _key_of(evidence, signer)
    if not key.verifies(evidence.signature, evidence.data):
        raise CorruptData("the signature is not this key's")
    try:
        critical = msgspec.json.decode(evidence.data, type=_Simple).critical
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"it cannot be read: {exc}") from exc
    if critical.type not in ("cosign container image signature", "atomic container signature"):
        raise CorruptData(f"it signs something else: {critical.type[:80]!r}")
    if critical.image.docker_manifest_digest != digest:
        raise CorruptData("it was made for another model: the digest that it signs is not this one's")
    name = critical.identity.docker_reference
    return Claim(SIGNED, (name,) if name else (), None, evidence.referrer)


def is_signature(kind: str) -> bool:
    return kind == SIGNED


def is_sbom(kind: str) -> bool:
    return kind.startswith((SPDX, CYCLONEDX, SPDX_JSON, CYCLONEDX_JSON))


def is_provenance(kind: str) -> bool:
    return kind.startswith(PROVENANCE.rpartition("/")[0])
