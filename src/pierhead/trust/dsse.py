"""DSSE envelopes and the in-toto statements inside: built, read and bounded; who signed them is judged elsewhere."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.errors import CorruptData

PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
_STATEMENTS = frozenset({STATEMENT, "https://in-toto.io/Statement/v0.1"})
SIGNED = "https://sigstore.dev/cosign/sign/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
SPDX = "https://spdx.dev/Document"
CYCLONEDX = "https://cyclonedx.org/bom"


class Signature(msgspec.Struct, omit_defaults=True):
    sig: bytes
    keyid: str = ""


class Envelope(msgspec.Struct, rename="camel"):
    """A payload with its signatures, base64 on the wire."""

    payload: bytes
    payload_type: str
    signatures: list[Signature]

    @property
    def signed_bytes(self) -> bytes:
        """What the signatures are over."""
        return pae(self.payload_type, self.payload)


class Subject(msgspec.Struct):
    digest: dict[str, str]
    name: str = ""


class Statement(msgspec.Struct, rename="camel"):
    """A claim of type ``predicate_type`` about subjects, named by digest."""

    kind: str = msgspec.field(name="_type")
    subject: list[Subject]
    predicate_type: str
    predicate: Any = None

    def names(self, digest: str) -> list[str] | None:
        """The names under which it speaks of a digest; None when it does not."""
        algorithm, _, value = digest.partition(":")
        found = [s.name for s in self.subject if s.digest.get(algorithm) == value]
        return found or None


def pae(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    encoded = kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(encoded), encoded, len(body), body)


def statement(digest: str, predicate_type: str, predicate: Any, name: str = "") -> bytes:
    """An in-toto statement about one manifest."""
    algorithm, _, value = digest.partition(":")
    made = Statement(STATEMENT, [Subject({algorithm: value}, name)], predicate_type, predicate)
    return msgspec.json.encode(made)


def read_statement(payload_type: str, payload: bytes) -> Statement:
    """The statement inside an envelope; CorruptData when it is none."""
    if payload_type != PAYLOAD:
        raise CorruptData(f"a signed document of another kind: {payload_type[:80]!r}")
    try:
        found = msgspec.json.decode(payload, type=Statement)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"a signed document that is no in-toto statement: {exc}") from exc
    if found.kind not in _STATEMENTS:
        raise CorruptData(f"a signed document of another kind: {found.kind[:80]!r}")
    return found
