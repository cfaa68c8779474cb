"""Keys are read and written as cosign and OpenSSL do; wrong passwords, kinds and damage are said without secrets."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import AccessDenied, CorruptData, PierError, UsageError
from pierhead.trust import keys
from pierhead.trust.keys import encrypted, generate, load_private, load_public

pytestmark = pytest.mark.timeout(60)
KINDS: list[Any] = ["ecdsa-p256", "ecdsa-p384", "ed25519"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_holds_for_its_key_and_data_only(kind: Any) -> None:
    mine, other = generate(kind), generate(kind)
    signature = mine.sign(b"data")
    assert mine.public.verifies(signature, b"data")
    assert not mine.public.verifies(signature, b"date")
    assert not other.public.verifies(signature, b"data")
    assert not mine.public.verifies(signature[:-1], b"data")
    assert not mine.public.verifies(b"", b"data")
    assert load_public(mine.public.pem.encode()) == mine.public


@pytest.mark.parametrize("kind", KINDS)
def test_cosigns_encrypted_form_opens_with_its_password_only(kind: Any) -> None:
    mine = generate(kind)
    sealed = encrypted(mine, b"secret")
    assert sealed.startswith(b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n")
    assert load_private(sealed, b"secret") == mine
    for wrong in (b"", b"Secret", None):
        with pytest.raises(AccessDenied) as refused:
            load_private(sealed, wrong)
        assert "secret" not in f"{refused.value.message} {refused.value.hint}".replace("PIERHEAD_KEY_PASSWORD", "")


def test_the_document_is_the_one_of_go_securesystemslib() -> None:
    body = encrypted(generate(), b"x").decode().split("-----")[2]
    document = json.loads(base64.b64decode(body))
    assert document["kdf"]["name"] == "scrypt"
    assert document["kdf"]["params"] == {"N": 65536, "r": 8, "p": 1}
    assert len(base64.b64decode(document["kdf"]["salt"])) == 32
    assert document["cipher"]["name"] == "nacl/secretbox"
    assert len(base64.b64decode(document["cipher"]["nonce"])) == 24


def test_parameters_that_would_take_the_machine_are_refused() -> None:
    body = json.loads(base64.b64decode(encrypted(generate(), b"x").decode().split("-----")[2]))
    body["kdf"]["params"] = {"N": 1 << 40, "r": 8, "p": 1}
    text = base64.b64encode(json.dumps(body).encode()).decode()
    with pytest.raises(AccessDenied):
        load_private(f"-----BEGIN {keys.COSIGN_KEY}-----\n{text}\n-----END {keys.COSIGN_KEY}-----\n".encode(), b"x")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (["ecparam", "-name", "prime256v1", "-genkey", "-noout"], "plain"),
        (["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"], "plain"),
        (["genpkey", "-algorithm", "ed25519"], "plain"),
        (["genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "env:SECRET"], "encrypted"),
    ],
)
def test_openssls_keys_are_read_and_its_signatures_agree(tmp_path: Path, make: list[str], kind: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "SECRET": "word"}

    def openssl(*words: str) -> bytes:
        return subprocess.run(["openssl", *words], env=environment, capture_output=True, check=True, timeout=30).stdout

    pem = openssl(*make)
    (tmp_path / "key").write_bytes(pem)
    assert keys.needs_password(pem) == (kind == "encrypted")
    mine = load_private(pem, b"word" if kind == "encrypted" else None)
    public = openssl("pkey", "-in", str(tmp_path / "key"), "-pubout", "-passin", "env:SECRET")
    assert load_public(public) == mine.public
    if "ed25519" not in make:
        (tmp_path / "data").write_bytes(b"data")
        (tmp_path / "pub").write_bytes(public)
        (tmp_path / "sig").write_bytes(mine.sign(b"data"))
        digest = "-sha384" if "ec_paramgen_curve:P-384" in make else "-sha256"
        files = [str(tmp_path / n) for n in ("pub", "sig", "data")]
        assert b"OK" in openssl("dgst", digest, "-verify", files[0], "-signature", files[1], files[2])


def test_other_kinds_of_keys_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(UsageError, match="this kind"):
        load_public(pem)


@given(st.binary(max_size=200))
def test_any_bytes_are_answered(data: bytes) -> None:
    wrapped = b"-----BEGIN PRIVATE KEY-----\n" + base64.b64encode(data) + b"\n-----END PRIVATE KEY-----\n"
    for one in (data, wrapped, wrapped.replace(b"PRIVATE", b"ENCRYPTED SIGSTORE PRIVATE")):
        with pytest.raises(PierError):
            load_private(one, b"x")
    with pytest.raises(CorruptData):
        load_public(wrapped.replace(b"PRIVATE", b"PUBLIC"))


def test_a_private_key_does_not_show_itself() -> None:
    mine = generate()
    assert repr(mine) == "PrivateKey(…)"
