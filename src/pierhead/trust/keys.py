"""Key pairs that sign and verify: ECDSA and Ed25519, in PEM and in cosign's encrypted form; asks nobody for passwords.

Cosign's private keys are PKCS #8 inside a JSON document: scrypt makes the key, NaCl's secretbox is the cipher.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec

from pierhead.errors import AccessDenied, CorruptData, UsageError
from pierhead.trust.extra import extra

Kind = Literal["ecdsa-p256", "ecdsa-p384", "ed25519"]
COSIGN_KEY = "ENCRYPTED SIGSTORE PRIVATE KEY"
MAX_KEY_FILE = 64 << 10
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s+([A-Za-z0-9+/=\s]+?)-----END \1-----")
_SCRYPT = {"N": 65536, "r": 8, "p": 1}
_MAX_SCRYPT_N = 1 << 20


@dataclass(frozen=True)
class PublicKey:
    """A key that verifies; ``der`` is its SubjectPublicKeyInfo."""

    der: bytes

    @property
    def pem(self) -> str:
        text = base64.b64encode(self.der).decode()
        lines = [text[i : i + 64] for i in range(0, len(text), 64)]
        return "\n".join(("-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""))

    @property
    def fingerprint(self) -> str:
        """What names it: the SHA-256 of its DER, as Sigstore's hints have it."""
        return base64.b64encode(hashlib.sha256(self.der).digest()).decode()

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether ``signature`` over ``data`` is this key's."""
        with extra():
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives import hashes, serialization
            from cryptography.hazmat.primitives.asymmetric import ec, ed25519
        key = serialization.load_der_public_key(self.der)
        # Older versions of cosign hash with SHA-256 whatever the curve.
        tries: list[hashes.HashAlgorithm] = [hashes.SHA256(), hashes.SHA384()]
        if isinstance(key, ed25519.Ed25519PublicKey):
            tries = tries[:1]
        for algorithm in tries:
            try:
                if isinstance(key, ec.EllipticCurvePublicKey):
                    key.verify(signature, data, ec.ECDSA(algorithm))
                else:
                    cast("ed25519.Ed25519PublicKey", key).verify(signature, data)
            except InvalidSignature:
                continue
            return True
        return False


@dataclass(frozen=True, repr=False)
class PrivateKey:
    """A key that signs; ``der`` is PKCS #8 and appears in no message."""

    der: bytes

    def __repr__(self) -> str:
        return "PrivateKey(…)"

    def _load(self) -> Any:
        with extra():
            from cryptography.hazmat.primitives import serialization
        return serialization.load_der_private_key(self.der, None)

    @property
    def public(self) -> PublicKey:
        with extra():
            from cryptography.hazmat.primitives import serialization
        key = self._load().public_key()
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return PublicKey(der)

    def sign(self, data: bytes) -> bytes:
        """DER for ECDSA (SHA-256 on P-256, SHA-384 on P-384), 64 bytes for Ed25519."""
        with extra():
            from cryptography.hazmat.primitives import hashes
            from cryptography.hazmat.primitives.asymmetric import ec
        key = self._load()
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key.sign(data, ec.ECDSA(hashes.SHA384() if key.curve.key_size == 384 else hashes.SHA256()))
        return key.sign(data)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_public(pem: bytes) -> PublicKey:
    """A public key in PEM; CorruptData for anything else, UsageError for kinds that are not used here."""
    with extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        what = "this is a private key, not a public one" if b"PRIVATE KEY" in pem else "this is not a public key in PEM"
        raise CorruptData(
            what, hint="It begins with -----BEGIN PUBLIC KEY-----; `pier sign` makes it as .pub."
        ) from exc
    _supported(key)
    return PublicKey(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def load_private(pem: bytes, password: bytes | None) -> PrivateKey:
    """A private key: cosign's encrypted form, PKCS #8 (encrypted or not) or SEC 1; AccessDenied on a wrong password."""
    with extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
    found = _PEM.search(pem)
    if found is None or found[1] == b"PUBLIC KEY":
        what = "this is not a private key in PEM" if found is None else "this is a public key, not a private one"
        raise CorruptData(what, hint="`pier sign --generate-key PREFIX` makes a pair.")
    try:
        if found[1].decode() in (COSIGN_KEY, "ENCRYPTED COSIGN PRIVATE KEY"):
            der = _decrypt(base64.b64decode(found[2]), password or b"")
            key = serialization.load_der_private_key(der, None)
        else:
            secret = password if found[1].startswith(b"ENCRYPTED") or b"Proc-Type: 4,ENCRYPTED" in pem else None
            key = serialization.load_pem_private_key(pem, secret or None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise AccessDenied(
            "the private key cannot be opened: it is damaged, or the password is another one",
            hint="Set PIERHEAD_KEY_PASSWORD or COSIGN_PASSWORD, or type the password when asked.",
        ) from exc
    _supported(key.public_key())
    return PrivateKey(_pkcs8(key))


def needs_password(pem: bytes) -> bool:
    """Whether a private key's file is encrypted."""
    return b"ENCRYPTED" in pem


def _supported(key: Any) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(key, ed25519.Ed25519PublicKey):
        return
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return
    raise UsageError("keys of this kind are not used here", hint="Use ECDSA on P-256 or P-384, or Ed25519.")


def _pkcs8(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    none = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, none)


# --- making -----------------------------------------------------------------------------------------------------------


def generate(kind: Kind = "ecdsa-p256") -> PrivateKey:
    """A new key."""
    with extra():
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    if kind == "ed25519":
        return PrivateKey(_pkcs8(ed25519.Ed25519PrivateKey.generate()))
    return PrivateKey(_pkcs8(ec.generate_private_key(ec.SECP384R1() if kind == "ecdsa-p384" else ec.SECP256R1())))


def encrypted(key: PrivateKey, password: bytes) -> bytes:
    """The key in cosign's file format."""
    with extra():
        from nacl.secret import SecretBox
    salt, nonce = os.urandom(32), os.urandom(24)
    sealed = SecretBox(_stretch(password, salt, _SCRYPT)).encrypt(key.der, nonce).ciphertext
    document = {
        "kdf": {"name": "scrypt", "params": _SCRYPT, "salt": base64.b64encode(salt).decode()},
        "cipher": {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()},
        "ciphertext": base64.b64encode(sealed).decode(),
    }
    text = base64.b64encode(msgspec.json.encode(document)).decode()
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return "\n".join((f"-----BEGIN {COSIGN_KEY}-----", *lines, f"-----END {COSIGN_KEY}-----", "")).encode()


class _Params(msgspec.Struct):
    n: int = msgspec.field(name="N")
    r: int
    p: int


class _Kdf(msgspec.Struct):
    name: str
    params: _Params
    salt: bytes


class _Cipher(msgspec.Struct):
    name: str
    nonce: bytes


class _Sealed(msgspec.Struct):
    kdf: _Kdf
    cipher: _Cipher
    ciphertext: bytes


def _decrypt(document: bytes, password: bytes) -> bytes:
    """PKCS #8 from cosign's JSON; ValueError when it is damaged or the password is wrong."""
    with extra():
        from nacl.exceptions import CryptoError
        from nacl.secret import SecretBox
    try:
        sealed = msgspec.json.decode(document, type=_Sealed)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ValueError("not cosign's key document") from exc
    params = sealed.kdf.params
    bounded = 1 < params.n <= _MAX_SCRYPT_N and 0 < params.r <= 32 and 0 < params.p <= 16
    if sealed.kdf.name != "scrypt" or sealed.cipher.name != "nacl/secretbox" or not bounded:
        raise ValueError("another way of encryption")
    key = _stretch(password, sealed.kdf.salt, {"N": params.n, "r": params.r, "p": params.p})
    try:
        return SecretBox(key).decrypt(sealed.ciphertext, sealed.cipher.nonce)
    except CryptoError as exc:
        raise ValueError("wrong password") from exc


def _stretch(password: bytes, salt: bytes, params: dict[str, int]) -> bytes:
    n, r, p = params["N"], params["r"], params["p"]
    return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=32, maxmem=256 * n * r + (1 << 20))
