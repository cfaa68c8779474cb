"""Logins: tried at the registry, kept where Docker keeps them, shown to nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, ConfigError, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.registry.credentials import Login, find_login
from pierhead.registry.keeping import forget_login, keep_login
from pierhead.registry.login import registry_host, try_login
from pierhead.registry.wire import Retry

from .conftest import PASSWORD, USER
from .doubles import Double, guarded

pytestmark = pytest.mark.timeout(60)
FAST = Retry(attempts=3, first=0.001, most=0.002)
HELPER = """#!/bin/sh
# keeps each login in a file of its own; what it was asked goes to a log without secrets
cd "{folder}"
echo "$1" >> log
case "$1" in
store) cat > kept.json; [ ! -e refuse ] || {{ echo "cannot: $(cat kept.json)"; exit 1; }} ;;
get) cat > asked; [ -e kept.json ] || {{ echo "credentials not found in native keychain"; exit 1; }}; cat kept.json ;;
erase) cat > erased; rm -f kept.json ;;
esac
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment with a home of its own and a credential helper named vault."""
    vault = tmp_path / "vault"
    vault.mkdir()
    helper = tmp_path / "bin" / "docker-credential-vault"
    helper.parent.mkdir()
    helper.write_text(HELPER.format(folder=vault))
    helper.chmod(0o755)
    docker = tmp_path / "docker"
    docker.mkdir()
    return {"HOME": str(tmp_path), "DOCKER_CONFIG": str(docker), "PATH": f"{helper.parent}:/usr/bin:/bin"}


def config(env: dict[str, str]) -> Path:
    return Path(env["DOCKER_CONFIG"]) / "config.json"


Pier = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def pier(env: dict[str, str], tmp_path: Path) -> Pier:
    def run(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        full = {**env, "PIERHEAD_HOME": str(tmp_path / "home")}
        return subprocess.run(argv, env=full, input=given, capture_output=True, text=True, timeout=30, check=False)

    return run


# --- trying -----------------------------------------------------------------------------------------------------------


async def test_a_real_registry_says_whether_a_login_is_good(guarded_registry: str) -> None:
    tried = await try_login(guarded_registry, Login(USER, PASSWORD), SourceSettings())
    assert tried.asked
    with pytest.raises(AccessDenied, match="does not accept") as caught:
        await try_login(guarded_registry, Login(USER, "wrong-word"), SourceSettings())
    assert "wrong-word" not in str(caught.value.to_dict())


async def test_a_token_maker_says_whether_a_login_is_good(double: Double) -> None:
    double.behave = guarded("http://{base}/token", password="word")
    tried = await try_login(double.host, Login("me", "word"), SourceSettings(), retry=FAST)
    assert (tried.login, tried.asked) == (Login("me", "word"), True)
    asked = next(r for r in double.requests if r.path == "/token")
    assert asked.query["offline_token"] == "true"
    assert "scope" not in asked.query
    with pytest.raises(AccessDenied):
        await try_login(double.host, Login("me", "wrong"), SourceSettings(), retry=FAST)


async def test_an_identity_token_is_kept_in_place_of_the_password(double: Double) -> None:
    double.behave = guarded("http://{base}/token", password="word", refresh="long-lived")
    tried = await try_login(double.host, Login("me", "word"), SourceSettings(), retry=FAST)
    assert (tried.login.identity_token, tried.login.password) == ("long-lived", "")


async def test_a_registry_without_logins_is_said(double: Double) -> None:
    assert not (await try_login(double.host, Login("me", "word"), SourceSettings(), retry=FAST)).asked


async def test_what_is_no_registry_is_said(double: Double, unused: int) -> None:
    from aiohttp import web

    double.behave = lambda double, request: web.Response(status=404)
    with pytest.raises(NotFound, match="is not a registry"):
        await try_login(double.host, Login("me", "word"), SourceSettings(), retry=FAST)
    with pytest.raises(SourceUnavailable, match="cannot talk"):
        await try_login(f"127.0.0.1:{unused}", Login("me", "word"), SourceSettings(), retry=FAST)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("ghcr.io", "ghcr.io"),
        ("https://GHCR.io/", "ghcr.io"),
        ("oci://localhost:5000", "localhost:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("[::1]:5000", "[::1]:5000"),
    ],
)
def test_a_registry_is_named_as_users_know_it(text: str, host: str) -> None:
    assert registry_host(text) == host


@pytest.mark.parametrize("text", ["", "ghcr", "ghcr.io/team", "..", "user@ghcr.io", "a b.example", "-x.example"])
def test_other_words_are_not_registries(text: str) -> None:
    with pytest.raises(UsageError):
        registry_host(text)


# --- keeping ----------------------------------------------------------------------------------------------------------

DOCKERS = (
    '{\n    "auths": {"old.example": {"auth": "bWU6cGE="}},\n    "HttpHeaders": {"X":  "\\u00e9"}, "psFormat": "x"\n}'
)


def test_a_login_is_kept_in_dockers_file_and_the_rest_of_it_stays(env: dict[str, str]) -> None:
    config(env).write_text(DOCKERS)
    assert keep_login("ghcr.io", Login("me", "pa:ss"), env) == str(config(env))
    text = config(env).read_text()
    assert text.startswith('{\n    "auths": {"old.example": {"auth": "bWU6cGE="}')
    assert text.endswith(',\n    "HttpHeaders": {"X":  "\\u00e9"}, "psFormat": "x"\n}\n')
    assert stat.S_IMODE(config(env).stat().st_mode) == 0o600
    assert find_login("ghcr.io", env) == Login("me", "pa:ss")
    assert find_login("old.example", env) == Login("me", "pa")
    assert forget_login("ghcr.io", env) == [str(config(env))]
    assert config(env).read_text() == DOCKERS + "\n"
    assert forget_login("ghcr.io", env) == []


def test_a_link_to_the_file_stays_a_link(env: dict[str, str], tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "docker.json"
    real.parent.mkdir()
    real.write_text("{}")
    config(env).symlink_to(real)
    keep_login("ghcr.io", Login("me", "word"), env)
    assert config(env).is_symlink()
    assert json.loads(real.read_text())["auths"] == {"ghcr.io": {"auth": base64.b64encode(b"me:word").decode()}}


def test_an_identity_token_is_kept_as_docker_keeps_it(env: dict[str, str]) -> None:
    keep_login("acr.example", Login("me", identity_token="long"), env)
    kept = json.loads(config(env).read_text())["auths"]["acr.example"]
    assert kept == {"auth": base64.b64encode(b"me:").decode(), "identitytoken": "long"}
    assert find_login("acr.example", env).identity_token == "long"


def test_the_file_that_the_user_names_is_the_one(env: dict[str, str], tmp_path: Path) -> None:
    env["REGISTRY_AUTH_FILE"] = str(tmp_path / "deep" / "er" / "auth.json")
    keep_login("docker.io", Login("me", "word"), env)
    assert list(json.loads(Path(env["REGISTRY_AUTH_FILE"]).read_text())["auths"]) == ["https://index.docker.io/v1/"]
    assert not config(env).exists()
    assert find_login("docker.io", env) == Login("me", "word")


@pytest.mark.parametrize("kind", [{"credsStore": "vault"}, {"credHelpers": {"ghcr.io": "vault"}}])
def test_a_helper_keeps_and_forgets_instead_of_the_file(env: dict[str, str], tmp_path: Path, kind: object) -> None:
    config(env).write_text(json.dumps(kind))
    assert keep_login("ghcr.io", Login("me", "word"), env) == "docker-credential-vault"
    assert "word" not in config(env).read_text()
    kept = json.loads((tmp_path / "vault" / "kept.json").read_text())
    assert kept == {"ServerURL": "ghcr.io", "Username": "me", "Secret": "word"}
    assert find_login("ghcr.io", env) == Login("me", "word")
    assert forget_login("ghcr.io", env) == ["docker-credential-vault"]
    assert (tmp_path / "vault" / "erased").read_text() == "ghcr.io"
    assert json.loads(config(env).read_text())["auths"] == {}
    assert not find_login("ghcr.io", env)


def test_a_helper_that_fails_is_named_and_its_words_are_not_repeated(env: dict[str, str], tmp_path: Path) -> None:
    config(env).write_text('{"credsStore": "vault"}')
    (tmp_path / "vault" / "refuse").touch()
    with pytest.raises(PierError, match="docker-credential-vault could not store") as caught:
        keep_login("ghcr.io", Login("me", "hidden-word"), env)
    assert "hidden-word" not in str(caught.value.to_dict())
    config(env).write_text('{"credsStore": "gone"}')
    with pytest.raises(ConfigError, match="not installed"):
        keep_login("ghcr.io", Login("me", "word"), env)


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": {"x": {}}, }', "\x80"])
def test_a_damaged_file_is_left_as_it_is(env: dict[str, str], text: str) -> None:
    config(env).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        keep_login("ghcr.io", Login("me", "word"), env)
    assert config(env).read_bytes() == text.encode("latin-1")


def test_two_logins_at_once_are_both_kept(env: dict[str, str]) -> None:
    hosts = [f"r{number}.example" for number in range(8)]

    async def all_of_them() -> None:
        await asyncio.gather(*(asyncio.to_thread(keep_login, host, Login("me", host), env) for host in hosts))

    asyncio.run(all_of_them())
    assert all(find_login(host, env) == Login("me", host) for host in hosts)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_logs_in_to_a_real_registry_and_out_again(
    guarded_registry: str, pier: Pier, env: dict[str, str]
) -> None:
    refused = pier("login", guarded_registry, "-u", USER, "--password-stdin", given="wrong-word\n")
    assert (refused.returncode, config(env).exists()) == (7, False)
    done = pier("login", guarded_registry, "-u", USER, "--password-stdin", "--json", given=PASSWORD + "\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept_in"] == str(config(env))
    assert find_login(guarded_registry, env) == Login(USER, PASSWORD)
    assert json.loads(pier("logout", guarded_registry, "--json").stdout)["removed_from"] == [str(config(env))]
    assert "There is no login" in pier("logout", guarded_registry).stderr
    for said in (refused, done):
        assert "wrong-word" not in said.stderr + said.stdout
        assert PASSWORD not in said.stderr + said.stdout


def test_a_password_is_typed_without_being_shown(guarded_registry: str, env: dict[str, str], tmp_path: Path) -> None:
    full = {**os.environ, **env, "PIERHEAD_HOME": str(tmp_path / "home")}
    child = pexpect.spawn(sys.executable, ["-m", "pierhead.cli.main", "login", guarded_registry], env=full, timeout=20)
    child.expect("User")
    child.sendline(USER)
    child.expect("Password or token")
    child.waitnoecho()
    child.sendline(PASSWORD)
    child.expect("Logged in to")
    child.expect(pexpect.EOF)
    assert PASSWORD.encode() not in child.before
    assert find_login(guarded_registry, env) == Login(USER, PASSWORD)


def test_without_a_terminal_nothing_is_asked(pier: Pier) -> None:
    assert "--password-stdin" in pier("login", "ghcr.io").stderr
    assert pier("login", "ghcr.io", "--password-stdin", given="x").returncode == 2
    assert pier("login", "ghcr.io", "-u", "a:b", "--password-stdin", given="x").returncode == 2
    assert pier("login", "ghcr.io", "-u", "a", "--password-stdin", given="").returncode == 2
