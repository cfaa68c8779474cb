"""pier sign, verify and referrers as a person runs them, in the store and in a real registry."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ..sources.servers import make_gguf  # noqa: TID252

pytestmark = pytest.mark.timeout(120)
Pier = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def pier(tmp_path: Path) -> Pier:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIERHEAD_", "COSIGN", "SIGSTORE", "ACTIONS_"))}
    env |= {"PIERHEAD_HOME": str(tmp_path / "home"), "COSIGN_PASSWORD": "a word", "DOCKER_CONFIG": str(tmp_path)}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        return subprocess.run(
            argv,
            env={**env, **more},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    (tmp_path / "made.gguf").write_bytes(make_gguf(5000))
    assert run("pull", "./made.gguf", "--name", "mine").returncode == 0
    for name in ("team", "other"):
        assert run("sign", "--generate-key", name).returncode == 0
    return run


def test_a_model_of_the_store_is_signed_and_verified(pier: Pier, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "team.key").stat().st_mode) == 0o600
    assert pier("sign", "--generate-key", "team").returncode == 2, "keys are not overwritten"
    before = pier("verify", "mine", "--key", "team.pub")
    assert before.returncode == 15
    assert "nothing is attached" in before.stderr
    signed = pier("sign", "mine", "--key", "team.key")
    assert signed.returncode == 0, signed.stderr
    assert pier("verify", "mine", "--key", "team.pub").returncode == 0
    assert pier("verify", "mine", "--key", "other.pub").returncode == 15
    shown = json.loads(pier("verify", "mine", "--key", "team.pub", "--json").stdout)
    assert shown["verified"][0]["kind"] == "signature"
    (row,) = json.loads(pier("referrers", "mine", "--json").stdout)
    assert (row["what"], row["signed"], row["digest"]) == ("signature", True, signed.stdout.strip())
    assert "signature" in pier("referrers", "mine").stdout


def test_what_is_wrong_is_said_with_the_next_step(pier: Pier) -> None:
    wrong = pier("sign", "mine", "--key", "team.key", COSIGN_PASSWORD="another")
    assert wrong.returncode == 7
    assert "PIERHEAD_KEY_PASSWORD" in wrong.stderr
    assert "another" not in wrong.stderr.replace("is another one", "")
    for words, code in (
        (("sign", "mine"), 2),
        (("sign", "mine", "--key", "gone.key"), 3),
        (("sign", "nothing", "--key", "team.key"), 3),
        (("sign", "mine", "--key", "team.pub"), 5),
        (("sign", "mine", "--keyless"), 7),
        (("verify", "mine"), 2),
        (("verify", "mine", "--key", "team.key"), 5),
        (("verify", "mine", "--certificate-identity", "a"), 2),
        (("verify", "mine", "--certificate-identity-regexp", "(", "--certificate-oidc-issuer", "b"), 2),
        (("referrers", "nothing"), 3),
    ):
        done = pier(*words)
        assert done.returncode == code, (words, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here (scripts/test-host)")
def test_signatures_go_along_with_a_push_and_are_made_in_the_registry(pier: Pier, tmp_path: Path) -> None:
    host = os.environ["PIERHEAD_TEST_IMAGE"].partition("/")[0]
    where = f"oci://{host}/signed/{uuid.uuid4().hex[:12]}:v1"
    assert pier("sign", "mine", "--key", "team.key").returncode == 0
    assert pier("push", "mine", where).returncode == 0
    assert pier("verify", where, "--key", "team.pub").returncode == 0
    assert pier("verify", where, "--key", "other.pub").returncode == 15
    signed = pier("sign", where, "--key", "other.key")
    assert signed.returncode == 0, signed.stderr
    claims = json.loads(pier("verify", where, "--key", "other.pub", "--json").stdout)["verified"]
    assert claims[0]["names"] == [where.removeprefix("oci://").rpartition(":")[0]]
    assert len(json.loads(pier("referrers", where, "--json").stdout)) == 2
    there = {"PIERHEAD_HOME": str(tmp_path / "elsewhere")}
    config = tmp_path / "elsewhere" / "config"
    config.mkdir(parents=True)
    rule = f'[[rules]]\nmatch = ["oci://{host}/signed/*"]\nrequire = "all"\n'
    keys = "".join(f'[[rules.identities]]\nkey = "{tmp_path / name}"\n' for name in ("team.pub", "other.pub"))
    (config / "policy.toml").write_text(f'default = "deny"\n{rule}{keys}')
    pulled = pier("pull", where, "--name", "back", **there)
    assert pulled.returncode == 0, pulled.stderr
    assert pier("verify", "back", "--key", "other.pub", **there).returncode == 0
    assert pier("pull", "./made.gguf", "--name", "unsigned", **there).returncode == 15
