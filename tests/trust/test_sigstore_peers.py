"""Keyless signatures against a private Sigstore, and both ways against Sigstore's own JavaScript implementation."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pierhead.errors import CorruptData, Untrusted, UsageError
from pierhead.store.index import Descriptor
from pierhead.store.layout import Store
from pierhead.store.media import MANIFEST
from pierhead.trust import bundle
from pierhead.trust.bundle import Certified, sign_keyless
from pierhead.trust.dsse import SIGNED, statement
from pierhead.trust.evidence import Evidence, Signer, prove
from pierhead.trust.gate import Gate
from pierhead.trust.keys import generate

from ..sources.servers import make_gguf  # noqa: TID252

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        shutil.which("npm") is None, reason="npm is not installed: Sigstore's own verifier is not tried"
    ),
]
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "npm" / "sigstore"
SCRIPT = Path(__file__).with_name("stand_in.js")
PACKAGES = ["@sigstore/mock@0.12", "@sigstore/verify@4", "@sigstore/bundle@5", "@sigstore/sign@5"]
DIGEST = "sha256:" + "5" * 64
SUBJECT = Descriptor(MANIFEST, DIGEST, 500)
WHO, ISSUER = "https://github.com/team/repo/.github/workflows/ci.yml@refs/heads/main", "https://issuer.example"


@pytest.fixture(scope="session")
def modules() -> Path:
    """Sigstore's packages, fetched once into the checkout's cache."""
    if not (CACHE / "node_modules" / "@sigstore" / "sign").is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        argv = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(CACHE), *PACKAGES]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=150, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install Sigstore's packages: {done.stderr[-300:]}")
    return CACHE


class Sigstore:
    """The stand-in that runs, and what trusts it."""

    def __init__(self, modules: Path, folder: Path, told: dict[str, Any]) -> None:
        self.modules = modules
        self.folder = folder
        self.url: str = told["url"]
        self.other: str = told["otherAuthority"]
        self.trusted: dict[str, Any] = told["trustedRoot"]
        self.root = folder / "trusted_root.json"
        self.root.write_text(json.dumps(self.trusted))
        self.config = folder / "trust_config.json"
        document = {"mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"}
        signing = {"trustedRoot": self.trusted, "signingConfig": told["signingConfig"]}
        self.config.write_text(json.dumps({**document, **signing}))

    def ask(self, word: str, **given: Any) -> subprocess.CompletedProcess[str]:
        argv = ["node", str(SCRIPT), str(self.modules), word]
        return subprocess.run(argv, input=json.dumps(given), capture_output=True, text=True, timeout=60, check=False)

    def signer(self, who: str = WHO, issuer: str = ISSUER, root: Path | None = None) -> Signer:
        return Signer(certified=Certified(who, "", issuer, ""), trusted_root=root or self.root)


@pytest.fixture(scope="session")
def sigstore(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sigstore]:
    argv = ["node", str(SCRIPT), str(modules), "serve"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        told = json.loads(running.stdout.readline())
        yield Sigstore(modules, tmp_path_factory.mktemp("sigstore"), told)
        running.terminate()


def token(who: str = WHO, issuer: str = ISSUER) -> str:
    now = int(time.time())
    claims = {"iss": issuer, "sub": who, "aud": "sigstore", "iat": now, "exp": now + 600}
    parts = [{"alg": "none"}, claims]
    coded = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=").decode() for p in parts]
    return ".".join((*coded, "eA"))


def evidence(data: bytes) -> Evidence:
    return Evidence("bundle", "sha256:" + "1" * 64, data)


@pytest.fixture(scope="session")
def ours(sigstore: Sigstore) -> bytes:
    return sign_keyless(statement(DIGEST, SIGNED, {}), token(), sigstore.config)


def test_a_keyless_signature_holds_for_its_identity_and_digest(sigstore: Sigstore, ours: bytes) -> None:
    assert prove(evidence(ours), DIGEST, sigstore.signer()).kind == SIGNED
    patterns = Certified("", r"https://github\.com/team/.*", "", "https://issuer.*")
    pattern = Signer(certified=patterns, trusted_root=sigstore.root)
    assert prove(evidence(ours), DIGEST, pattern).kind == SIGNED


def test_other_identities_issuers_digests_and_keys_are_refused(sigstore: Sigstore, ours: bytes) -> None:
    cases = {
        "signed by https://github.com/team": sigstore.signer(who="https://github.com/evil"),
        "issuer https://issuer.example": sigstore.signer(issuer="https://evil.example"),
        "without a key": Signer(key=generate().public),
    }
    for words, signer in cases.items():
        with pytest.raises(CorruptData, match=words):
            prove(evidence(ours), DIGEST, signer)
    part = Signer(certified=Certified("", "https://github.com/team", ISSUER, ""), trusted_root=sigstore.root)
    with pytest.raises(CorruptData):
        prove(evidence(ours), DIGEST, part)
    with pytest.raises(CorruptData, match="another model"):
        prove(evidence(ours), "sha256:" + "6" * 64, sigstore.signer())


def changed(data: bytes, change: Any) -> bytes:
    document = json.loads(data)
    change(document)
    return json.dumps(document).encode()


def _flip(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[len(raw) // 2] ^= 1
    return base64.b64encode(raw).decode()


def _entry(document: Any) -> Any:
    return document["verificationMaterial"]["tlogEntries"][0]


CHANGES: dict[str, Any] = {
    "payload": lambda d: d["dsseEnvelope"].update(payload=_flip(d["dsseEnvelope"]["payload"])),
    "signature": lambda d: d["dsseEnvelope"]["signatures"][0].update(
        sig=_flip(d["dsseEnvelope"]["signatures"][0]["sig"])
    ),
    "certificate": lambda d: d["verificationMaterial"]["certificate"].update(
        rawBytes=_flip(d["verificationMaterial"]["certificate"]["rawBytes"])
    ),
    "log entry": lambda d: _entry(d).update(canonicalizedBody=_flip(_entry(d)["canonicalizedBody"])),
    "promise": lambda d: _entry(d)["inclusionPromise"].update(
        signedEntryTimestamp=_flip(_entry(d)["inclusionPromise"]["signedEntryTimestamp"])
    ),
    "time": lambda d: _entry(d).update(integratedTime=str(int(_entry(d)["integratedTime"]) + 86400)),
    "no log entry": lambda d: d["verificationMaterial"].update(tlogEntries=[]),
    "no certificate": lambda d: d["verificationMaterial"].pop("certificate"),
    "nonsense": lambda d: d["verificationMaterial"].update(certificate={"rawBytes": "!!"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_was_changed_is_refused(sigstore: Sigstore, ours: bytes, change: Any) -> None:
    with pytest.raises(CorruptData):
        prove(evidence(changed(ours, change)), DIGEST, sigstore.signer())


def test_the_signature_of_an_expired_certificate_is_refused(sigstore: Sigstore) -> None:
    """The log saw it a day after the ten minutes for which the certificate held."""
    config = json.loads(sigstore.config.read_text())
    config["signingConfig"]["rekorTlogUrls"][0]["url"] += "/late"
    late = sigstore.folder / "late.json"
    late.write_text(json.dumps(config))
    made = sign_keyless(statement(DIGEST, SIGNED, {}), token(), late)
    with pytest.raises(CorruptData, match="does not hold"):
        prove(evidence(made), DIGEST, sigstore.signer())


def test_another_authority_log_or_damaged_root_refuses(sigstore: Sigstore, ours: bytes, tmp_path: Path) -> None:
    def root(name: str, change: Any) -> Path:
        document = json.loads(json.dumps(sigstore.trusted))
        change(document)
        (tmp_path / name).write_text(json.dumps(document))
        return tmp_path / name

    def authority(document: Any) -> None:
        document["certificateAuthorities"][0]["certChain"]["certificates"][0]["rawBytes"] = sigstore.other

    def logs(document: Any) -> None:
        document["tlogs"][0]["publicKey"], document["ctlogs"][0]["publicKey"] = (
            document["ctlogs"][0]["publicKey"],
            document["tlogs"][0]["publicKey"],
        )

    for name, change in (("authority.json", authority), ("logs.json", logs)):
        with pytest.raises(CorruptData, match="does not hold"):
            prove(evidence(ours), DIGEST, sigstore.signer(root=root(name, change)))
    (tmp_path / "damaged.json").write_text("{")
    for name in ("damaged.json", "gone.json"):
        with pytest.raises(UsageError):
            prove(evidence(ours), DIGEST, sigstore.signer(root=tmp_path / name))


def test_sigstores_own_verifier_accepts_our_keyless_bundle(sigstore: Sigstore, ours: bytes) -> None:
    given = {"bundle": json.loads(ours), "trustedRoot": sigstore.trusted, "identity": WHO, "issuer": ISSUER}
    done = sigstore.ask("verify", **given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["identity"]["subjectAlternativeName"] == WHO
    assert sigstore.ask("verify", **{**given, "identity": "https://evil.example"}).returncode != 0


@pytest.mark.parametrize("kind", ["ecdsa-p256", "ed25519"])
def test_sigstores_own_verifier_accepts_our_key_bundle(sigstore: Sigstore, kind: Any) -> None:
    key = generate(kind)
    made = json.loads(bundle.sign_with_key(statement(DIGEST, SIGNED, {}), key))
    given = {"bundle": made, "trustedRoot": sigstore.trusted}
    done = sigstore.ask("verify", **given, key=key.public.pem)
    assert done.returncode == 0, done.stderr
    assert sigstore.ask("verify", **given, key=generate(kind).public.pem).returncode != 0


def test_we_accept_what_sigstores_own_signer_makes(sigstore: Sigstore) -> None:
    payload = statement(DIGEST, SIGNED, {}).decode()
    done = sigstore.ask("sign", url=sigstore.url, token=token(), payload=payload)
    assert done.returncode == 0, done.stderr
    theirs = done.stdout.encode()
    assert prove(evidence(theirs), DIGEST, sigstore.signer()).kind == SIGNED
    with pytest.raises(CorruptData, match="another model"):
        prove(evidence(theirs), "sha256:" + "6" * 64, sigstore.signer())


def test_a_token_that_is_none_is_said_without_showing_it(sigstore: Sigstore) -> None:
    with pytest.raises(UsageError) as refused:
        sign_keyless(statement(DIGEST, SIGNED, {}), "secret-token", sigstore.config)
    assert "secret" not in refused.value.message


def test_the_verbs_sign_and_verify_without_a_key(sigstore: Sigstore, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIERHEAD_HOME": str(tmp_path / "home")}

    def pier(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        more = {**env, "SIGSTORE_ID_TOKEN": token()}
        return subprocess.run(argv, env=more, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    (tmp_path / "made.gguf").write_bytes(make_gguf(5000))
    assert pier("pull", "./made.gguf", "--name", "mine").returncode == 0
    signed = pier("sign", "mine", "--keyless", "--trust-config", str(sigstore.config))
    assert signed.returncode == 0, signed.stderr
    asked = ("verify", "mine", "--certificate-oidc-issuer", ISSUER, "--trusted-root", str(sigstore.root))
    good = pier(*asked, "--certificate-identity-regexp", r"https://github\.com/team/.*")
    assert good.returncode == 0, good.stderr
    assert pier(*asked, "--certificate-identity", "https://github.com/evil").returncode == 15
    config = tmp_path / "home" / "config"
    config.mkdir(parents=True, exist_ok=True)
    for who, code in ((WHO, 0), ("https://github.com/evil", 15)):
        identity = f'identity = "{who}"\nissuer = "{ISSUER}"\ntrusted_root = "{sigstore.root}"\n'
        rule = f'[[rules]]\nmatch = ["mine"]\n[[rules.identities]]\n{identity}'
        (config / "policy.toml").write_text(f'default = "allow"\n{rule}')
        store = Store.open(tmp_path / "home" / "state" / "store")
        if code:
            with pytest.raises(Untrusted, match="evil"):
                Gate(config).check_start(store, store.get("mine"))
        else:
            assert Gate(config).check_start(store, store.get("mine")) == []
