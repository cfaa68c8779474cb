"""What a model is made of and where it came from: made, attached, signed, shown, and asked for by a policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pierhead.config import SourceSettings
from pierhead.errors import CorruptData, UsageError
from pierhead.paths import Paths
from pierhead.sources.pull import pull
from pierhead.store.layout import Store
from pierhead.trust.provenance import provenance
from pierhead.trust.sbom import generate, read

from ..sources.servers import make_gguf  # noqa: TID252

pytestmark = pytest.mark.timeout(120)
SPDX = {"spdxVersion": "SPDX-2.3", "SPDXID": "SPDXRef-DOCUMENT", "name": "x", "packages": []}


async def test_the_bill_of_a_real_model_is_valid_and_the_same_each_time(home: Paths, smollm2: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    store = Store.open(home.store)
    record = await pull(str(smollm2), store=store, settings=SourceSettings(), paths=home, name="smollm2")
    made = generate(record)
    assert made == generate(record)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(made.decode())
    assert problem is None, problem
    document = json.loads(made)
    about = document["metadata"]["component"]
    assert about["type"] == "machine-learning-model"
    assert about["hashes"][0]["content"] == record.digest.removeprefix("sha256:")
    assert about["licenses"][0]["license"]["id"] == "Apache-2.0"
    digests = {c["hashes"][0]["content"] for c in document["components"]}
    assert digests == {f.digest.removeprefix("sha256:") for f in record.files}
    assert {p["name"]: p["value"] for p in about["properties"]}["pierhead:architecture"] == "llama"
    assert read(made)[0] == "application/vnd.cyclonedx+json"
    made_from = provenance(record, "https://ci.example/job")
    assert made_from["runDetails"]["builder"]["id"] == "https://ci.example/job"
    materials = made_from["buildDefinition"]["resolvedDependencies"]
    assert materials[0]["uri"] == record.source
    assert {"sha256": record.files[0].digest.removeprefix("sha256:")} in [m.get("digest") for m in materials]


@pytest.mark.parametrize("data", [b"{}", b"[]", b'{"spdxVersion": "SPDX-9"}', b'{"bomFormat": "CycloneDX"}'])
def test_what_is_no_bill_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="neither"):
        read(data)


def test_damage_is_said() -> None:
    for data in (b"{", b'{"x":' + b"[" * 50_000):
        with pytest.raises(CorruptData):
            read(data)
    with pytest.raises(UsageError, match="MiB"):
        read(b" " * (9 << 20))


@pytest.fixture
def pier(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIERHEAD_")}
    env |= {"PIERHEAD_HOME": str(tmp_path / "home"), "COSIGN_PASSWORD": "a word"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        return subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    (tmp_path / "made.gguf").write_bytes(make_gguf(5000))
    assert run("pull", "./made.gguf", "--name", "mine").returncode == 0
    assert run("sign", "--generate-key", "team").returncode == 0
    return run


def test_attestations_are_attached_shown_and_verified(
    pier: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "sbom.json").write_text(json.dumps(SPDX))
    bare = pier("attest", "mine", "--sbom", "sbom.json", "--provenance")
    assert bare.returncode == 0, bare.stderr
    assert "unsigned" in bare.stderr
    signed = pier("attest", "mine", "--generate", "--provenance", "--key", "team.key", "--json")
    assert len(json.loads(signed.stdout)["attached"]) == 2, signed.stderr
    rows = json.loads(pier("referrers", "mine", "--json").stdout)
    assert sorted((r["what"], r["signed"]) for r in rows) == [
        ("SBOM", False),
        ("SBOM", True),
        ("provenance", False),
        ("provenance", True),
    ]
    shown = json.loads(pier("inspect", "mine", "--attestations", "--json").stdout)
    assert len(shown["attestations"]) == 4
    assert "provenance" in pier("inspect", "mine", "--attestations").stdout
    assert pier("verify", "mine", "--key", "team.pub").returncode == 15, "an attestation is no signature"
    assert pier("sign", "mine", "--key", "team.key").returncode == 0
    kinds = [c["kind"] for c in json.loads(pier("verify", "mine", "--key", "team.pub", "--json").stdout)["verified"]]
    assert sorted(kinds) == ["https://cyclonedx.org/bom", "https://slsa.dev/provenance/v1", "signature"]
    printed = json.loads(pier("attest", "mine", "--generate", "--print").stdout)
    assert printed["bomFormat"] == "CycloneDX"
    for words, code in (
        (("attest", "mine"), 2),
        (("attest", "mine", "--sbom", "gone"), 3),
        (("attest", "mine", "--sbom", "made.gguf"), 5),
        (("attest", "oci://localhost:1/a/b:1", "--generate"), 2),
        (("attest", "nothing", "--generate"), 3),
    ):
        assert pier(*words).returncode == code, words
