"""Sigstore bundles (v0.3) around DSSE envelopes: with a key of one's own, or keyless through Sigstore's library.

Keyless verification is wholly the library's: certificate chain, signed certificate timestamp, time, transparency log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import CorruptData, UsageError
from pierhead.trust.dsse import PAYLOAD, Envelope, Signature, Statement, pae, read_statement
from pierhead.trust.extra import extra
from pierhead.trust.keys import PrivateKey, PublicKey

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_BUNDLE_TYPES = re.compile(r"application/vnd\.dev\.sigstore\.bundle(\.v0\.3\+json|\+json;version=0\.[123])")


class _Hint(msgspec.Struct, omit_defaults=True):
    hint: str = ""


class _Material(msgspec.Struct, rename="camel", omit_defaults=True):
    public_key: _Hint | None = None
    certificate: dict[str, Any] | None = None
    x509_certificate_chain: dict[str, Any] | None = None
    tlog_entries: list[Any] = []


class Bundle(msgspec.Struct, rename="camel", omit_defaults=True):
    """What we read of one; ``dsse_envelope`` is missing where a plain message was signed."""

    media_type: str
    verification_material: _Material
    dsse_envelope: Envelope | None = None
    message_signature: Any = None

    @property
    def keyless(self) -> bool:
        return self.verification_material.public_key is None


def read(data: bytes) -> Bundle:
    """A bundle's parts; CorruptData when it is not one that is used here."""
    try:
        found = msgspec.json.decode(data, type=Bundle)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"a signature bundle that cannot be read: {exc}") from exc
    if not _BUNDLE_TYPES.fullmatch(found.media_type):
        raise CorruptData(f"a signature bundle of another kind: {found.media_type[:80]!r}")
    if found.dsse_envelope is not None and len(found.dsse_envelope.signatures) != 1:
        raise CorruptData("a signature bundle must have exactly one signature")
    return found


def sign_with_key(payload: bytes, key: PrivateKey) -> bytes:
    """A bundle of a statement, signed by a key; no transparency log knows of it."""
    envelope = Envelope(payload, PAYLOAD, [Signature(key.sign(pae(PAYLOAD, payload)))])
    made = Bundle(BUNDLE, _Material(public_key=_Hint(key.public.fingerprint)), envelope)
    return msgspec.json.encode(made)


def verify_with_key(data: bytes, key: PublicKey) -> Statement:
    """The statement that a key signed; CorruptData when it did not."""
    found = read(data)
    envelope = found.dsse_envelope
    if envelope is None:
        raise CorruptData("a signature bundle without a statement")
    if not key.verifies(envelope.signatures[0].sig, envelope.signed_bytes):
        raise CorruptData("the signature is not this key's")
    return read_statement(envelope.payload_type, envelope.payload)


# --- keyless ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certified:
    """Whose certificate is asked for: identity and issuer, each exact or as a regular expression for all of it."""

    identity: str = ""
    identity_regexp: str = ""
    issuer: str = ""
    issuer_regexp: str = ""

    def accepts(self, identities: list[str], issuer: str) -> bool:
        """Whether a certificate with these names is of the kind asked for."""
        named = any(_same(i, self.identity, self.identity_regexp) for i in identities)
        return named and _same(issuer, self.issuer, self.issuer_regexp)


def _same(found: str, exact: str, pattern: str) -> bool:
    return found == exact if exact else bool(pattern) and re.fullmatch(pattern, found) is not None


class _Policy:
    """``Certified`` as Sigstore's library asks it; remembers whom it saw."""

    def __init__(self, wanted: Certified) -> None:
        self._wanted = wanted

    def verify(self, cert: Any) -> None:
        from sigstore.errors import VerificationError

        identities, issuer = who(cert)
        if not self._wanted.accepts(identities, issuer):
            raise VerificationError(f"it was signed by {', '.join(identities) or 'nobody'} (issuer {issuer or 'none'})")


def who(cert: Any) -> tuple[list[str], str]:
    """The names in a signing certificate, and who vouched for them."""
    from cryptography import x509
    from cryptography.x509.oid import ObjectIdentifier

    names: list[str] = []
    try:
        alternative = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += alternative.get_values_for_type(x509.RFC822Name)
        names += alternative.get_values_for_type(x509.UniformResourceIdentifier)
        for other in alternative.get_values_for_type(x509.OtherName):
            if other.type_id == ObjectIdentifier("1.3.6.1.4.1.57264.1.7"):
                names.append(_utf8(other.value))
    except x509.ExtensionNotFound:
        pass
    for oid, reader in (("1.3.6.1.4.1.57264.1.8", _utf8), ("1.3.6.1.4.1.57264.1.1", bytes.decode)):
        try:
            raw = cert.extensions.get_extension_for_oid(ObjectIdentifier(oid)).value
            return names, str(reader(raw.value))
        except (x509.ExtensionNotFound, ValueError):
            continue
    return names, ""


def _utf8(der: bytes) -> str:
    """A DER UTF8String; ValueError for anything else."""
    if len(der) < 2 or der[0] != 0x0C:
        raise ValueError("not a text")
    length, at = der[1], 2
    if length & 0x80:
        size = length & 0x7F
        length, at = int.from_bytes(der[2 : 2 + size], "big"), 2 + size
    if at + length != len(der):
        raise ValueError("not a text")
    return der[at:].decode()


def verify_keyless(data: bytes, wanted: Certified, trusted_root: Path | None, *, offline: bool) -> Statement:
    """The statement that a certified identity signed; CorruptData when anything of it does not hold."""
    with extra():
        from sigstore.errors import Error as SigstoreError
        from sigstore.models import Bundle as SigstoreBundle
    verifier = _verifier(trusted_root, offline)
    try:
        kind, payload = verifier.verify_dsse(SigstoreBundle.from_json(data), _Policy(wanted))
    except SigstoreError as exc:
        raise CorruptData(f"the keyless signature does not hold: {_words(exc)}") from exc
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as exc:  # hostile bundles reach the parsers
        raise CorruptData(f"a keyless signature that cannot be read: {_words(exc)}") from exc
    return read_statement(kind, payload)


def _verifier(trusted_root: Path | None, offline: bool) -> Any:
    from sigstore.errors import Error as SigstoreError
    from sigstore.models import TrustedRoot
    from sigstore.verify import Verifier

    try:
        if trusted_root is not None:
            return Verifier(trusted_root=TrustedRoot.from_file(str(trusted_root)))
        return Verifier.production(offline=offline)
    except OSError as exc:
        raise UsageError(f"cannot read the trusted root {trusted_root}: {exc.strerror or exc}") from exc
    except (SigstoreError, ValueError) as exc:
        raise UsageError(
            f"the trusted root cannot be used: {_words(exc)}", hint="--trusted-root FILE names a trusted_root.json."
        ) from exc


def _words(exc: BaseException) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def sign_keyless(payload: bytes, token: str, trust_config: Path | None) -> bytes:
    """A bundle of a statement, signed with a short-lived certificate for the identity token's subject."""
    with extra():
        from sigstore._internal.fulcio.client import FulcioClientError
        from sigstore._internal.rekor import RekorClientError
        from sigstore.dsse import Statement as SigstoreStatement
        from sigstore.errors import Error as SigstoreError
        from sigstore.models import ClientTrustConfig
        from sigstore.oidc import IdentityToken
        from sigstore.sign import SigningContext
    try:
        config = (
            ClientTrustConfig.from_json(trust_config.read_text()) if trust_config else ClientTrustConfig.production()
        )
        with SigningContext.from_trust_config(config).signer(IdentityToken(token)) as signer:
            return signer.sign_dsse(SigstoreStatement(payload)).to_json().encode()
    except OSError as exc:
        raise UsageError(f"cannot sign: {exc.strerror or exc}") from exc
    except (SigstoreError, FulcioClientError, RekorClientError, ValueError) as exc:
        raise UsageError(
            f"Sigstore does not sign: {_words(exc)}", hint="Is the identity token current, and made for Sigstore?"
        ) from exc
