"""A signature counts for one key and one digest; whatever was changed, swapped or replayed does not."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import CorruptData
from pierhead.registry.referrers import DSSE_LAYER, SIMPLE_SIGNING, Attachment, digest_of, manifest_for
from pierhead.store.index import Descriptor
from pierhead.store.media import MANIFEST
from pierhead.trust import bundle
from pierhead.trust.bundle import BUNDLE, Certified
from pierhead.trust.dsse import PAYLOAD, SIGNED, pae, statement
from pierhead.trust.evidence import Evidence, Signer, evidence_of, prove
from pierhead.trust.keys import PrivateKey, generate
from pierhead.trust.signing import signed, with_key

pytestmark = pytest.mark.timeout(60)
DIGEST = "sha256:" + "5" * 64
SUBJECT = Descriptor(MANIFEST, DIGEST, 500)
KEY = generate()


def made(key: PrivateKey = KEY, name: str = "") -> Attachment:
    return signed(SUBJECT, SIGNED, {}, with_key(key), name)


def only(attachment: Attachment) -> Evidence:
    (found,) = evidence_of([attachment])
    return found


def layer(media_type: str, data: bytes, **annotations: str) -> Attachment:
    """A manifest in cosign's older layout."""
    attachment = manifest_for(SUBJECT, "", [(media_type, data)], {})
    document = json.loads(attachment.manifest)
    document["layers"][0]["annotations"] = {k.replace("__", "/").replace("_", "."): v for k, v in annotations.items()}
    del document["subject"]
    return Attachment(json.dumps(document).encode(), attachment.blobs)


@pytest.mark.parametrize("kind", ["ecdsa-p256", "ecdsa-p384", "ed25519"])
def test_a_signature_holds_for_its_key(kind: Any) -> None:
    key = generate(kind)
    claim = prove(only(made(key, "host/repo")), DIGEST, Signer(key=key.public))
    assert (claim.kind, claim.names) == (SIGNED, ("host/repo",))


def test_it_is_laid_out_as_cosign_does() -> None:
    document = json.loads(made().manifest)
    assert document["artifactType"] == BUNDLE == document["layers"][0]["mediaType"]
    assert document["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert document["subject"]["digest"] == DIGEST
    assert document["annotations"]["dev.sigstore.bundle.predicateType"] == SIGNED
    assert document["annotations"]["dev.sigstore.bundle.content"] == "dsse-envelope"
    found = json.loads(only(made()).data)
    assert found["mediaType"] == BUNDLE
    assert found["verificationMaterial"]["publicKey"]["hint"] == KEY.public.fingerprint
    envelope = found["dsseEnvelope"]
    assert envelope["payloadType"] == PAYLOAD
    inner = json.loads(base64.b64decode(envelope["payload"]))
    assert inner["subject"][0]["digest"] == {"sha256": "5" * 64}
    assert inner["predicateType"] == SIGNED


def test_another_key_digest_or_kind_of_signer_is_refused() -> None:
    mine = only(made())
    with pytest.raises(CorruptData, match="not this key's"):
        prove(mine, DIGEST, Signer(key=generate().public))
    with pytest.raises(CorruptData, match="another model"):
        prove(mine, "sha256:" + "6" * 64, Signer(key=KEY.public))
    with pytest.raises(CorruptData, match="not by an identity"):
        prove(mine, DIGEST, Signer(certified=Certified("a", "", "b", "")))


def tampered(change: Any) -> bytes:
    document = json.loads(only(made()).data)
    change(document, document["dsseEnvelope"])
    return json.dumps(document).encode()


def _payload(document: Any, envelope: Any) -> None:
    inner = base64.b64decode(envelope["payload"]).replace(b"5555", b"6666")
    envelope["payload"] = base64.b64encode(inner).decode()


def _signature(document: Any, envelope: Any) -> None:
    raw = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    raw[-1] ^= 1
    envelope["signatures"][0]["sig"] = base64.b64encode(raw).decode()


TAMPERED = {
    "payload": _payload,
    "signature": _signature,
    "kind of payload": lambda d, e: e.update(payloadType="text/plain"),
    "no signature": lambda d, e: e.update(signatures=[]),
    "two signatures": lambda d, e: e.update(signatures=e["signatures"] * 2),
    "no envelope": lambda d, e: d.pop("dsseEnvelope"),
    "another bundle": lambda d, e: d.update(mediaType="application/vnd.dev.sigstore.bundle.v9+json"),
    "nonsense": lambda d, e: d.update(verificationMaterial=5),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED.keys())
def test_what_was_changed_is_refused(change: Any) -> None:
    evidence = Evidence("bundle", "sha256:" + "1" * 64, tampered(change))
    with pytest.raises(CorruptData):
        prove(evidence, DIGEST, Signer(key=KEY.public))


def test_a_signed_document_that_is_no_statement_is_refused() -> None:
    deep = b'{"predicate":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    for payload in (deep, b"{}", b'{"_type":"x","subject":[],"predicateType":"y"}', b"5", b'{"_type"'):
        data = bundle.sign_with_key(payload, KEY)
        with pytest.raises(CorruptData):
            prove(Evidence("bundle", "", data), DIGEST, Signer(key=KEY.public))


def simple(digest: str = DIGEST, kind: str = "cosign container image signature") -> bytes:
    critical = {
        "identity": {"docker-reference": "host/repo"},
        "image": {"docker-manifest-digest": digest},
        "type": kind,
    }
    return json.dumps({"critical": critical, "optional": None}).encode()


def legacy(payload: bytes, key: PrivateKey = KEY, **more: str) -> Attachment:
    signature = base64.b64encode(key.sign(payload)).decode()
    return layer(SIMPLE_SIGNING, payload, **{"dev_cosignproject_cosign__signature": signature, **more})


def test_cosigns_older_signatures_are_read() -> None:
    claim = prove(only(legacy(simple())), DIGEST, Signer(key=KEY.public))
    assert (claim.kind, claim.names) == (SIGNED, ("host/repo",))


def test_older_signatures_of_other_keys_digests_and_kinds_are_refused() -> None:
    signer = Signer(key=KEY.public)
    for attachment in (
        legacy(simple(), generate()),
        legacy(simple("sha256:" + "6" * 64)),
        legacy(simple(kind="something else")),
        legacy(b"{}"),
        legacy(b"[" * 50_000),
        legacy(b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    ):
        with pytest.raises(CorruptData):
            prove(only(attachment), DIGEST, signer)
    swapped = legacy(simple())
    evidence = only(swapped)
    forged = Evidence("simple", evidence.referrer, simple("sha256:" + "6" * 64), SIGNED, evidence.signature)
    with pytest.raises(CorruptData, match="not this key's"):
        prove(forged, "sha256:" + "6" * 64, signer)
    keyless = legacy(simple(), dev_sigstore_cosign__certificate="x")
    with pytest.raises(CorruptData, match="older keyless"):
        prove(only(keyless), DIGEST, Signer(certified=Certified("a", "", "b", "")))


def test_older_attestations_are_read() -> None:
    payload = statement(DIGEST, "https://slsa.dev/provenance/v1", {"x": 1})
    envelope = {
        "payloadType": PAYLOAD,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": "", "sig": base64.b64encode(KEY.sign(pae(PAYLOAD, payload))).decode()}],
    }
    evidence = only(layer(DSSE_LAYER, json.dumps(envelope).encode(), predicateType="x"))
    assert prove(evidence, DIGEST, Signer(key=KEY.public)).predicate == {"x": 1}
    with pytest.raises(CorruptData):
        prove(evidence, DIGEST, Signer(key=generate().public))


def test_an_sbom_that_nobody_signed_proves_nothing() -> None:
    bare = manifest_for(SUBJECT, "application/spdx+json", [("application/spdx+json", b"{}")], {})
    with pytest.raises(CorruptData, match="not signed"):
        prove(only(bare), DIGEST, Signer(key=KEY.public))


def test_attachments_that_cannot_be_read_are_passed_over() -> None:
    assert evidence_of([Attachment(b"x"), Attachment(b"{}"), made()])[0].form == "bundle"
    assert digest_of(made().manifest)


@given(st.binary(max_size=300))
def test_any_bytes_prove_nothing(data: bytes) -> None:
    forms: list[Any] = ["bundle", "simple", "dsse"]
    for form in forms:
        with pytest.raises(CorruptData):
            prove(Evidence(form, "", data, signature=data), DIGEST, Signer(key=KEY.public))
