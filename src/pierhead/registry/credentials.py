"""Who we are to a registry: Docker's own config.json and its credential helpers; never printed, never in argv."""

from __future__ import annotations

import base64
import binascii
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pierhead.errors import ConfigError
from pierhead.registry.name import HUB

HUB_KEY = "https://index.docker.io/v1/"
HELPER_LIMIT = 30.0
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Login:
    """A user and password, or an identity token; none of them appears in a ``repr``."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.identity_token or self.user)

    @property
    def basic(self) -> str:
        """The value of an ``Authorization`` header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class KeptLogins(msgspec.Struct, rename="camel"):
    """What Docker's config.json has to say about logins."""

    auths: dict[str, _Auth] = {}
    cred_helpers: dict[str, str] = {}
    creds_store: str = ""


class _Helped(msgspec.Struct, rename="pascal"):
    username: str = ""
    secret: str = ""


def config_files(env: Mapping[str, str]) -> list[Path]:
    """Where logins may be kept, the most particular first: the user's wish, Docker's file, Podman's."""
    if env.get("REGISTRY_AUTH_FILE"):
        return [Path(env["REGISTRY_AUTH_FILE"])]
    home = Path(env.get("HOME") or "/")
    found = [Path(env.get("DOCKER_CONFIG") or home / ".docker") / "config.json"]
    if env.get("XDG_RUNTIME_DIR"):
        found.append(Path(env["XDG_RUNTIME_DIR"]) / "containers" / "auth.json")
    return found


def find_login(host: str, env: Mapping[str, str]) -> Login:
    """The login for a registry's host; an empty one where there is none. ConfigError for a file that is damaged."""
    for path in config_files(env):
        kept = read_logins(path)
        if kept is not None and (login := _from_file(kept, host, path, env)):
            return login
    return Login()


def read_logins(path: Path) -> KeptLogins | None:
    """One file; None when it is not there or empty. ConfigError when it is damaged."""
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data, type=KeptLogins) if data.strip() else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"cannot read the logins in {path}: {exc}", hint=f"Correct or move away {path}.") from exc


def login_keys(host: str) -> tuple[str, ...]:
    """The names under which a host's login may be kept, the usual one first."""
    return (HUB_KEY, HUB, "index.docker.io") if host == HUB else (host, f"https://{host}", f"http://{host}")


def check_helper(name: str) -> str:
    """A helper's name, fit to be part of a program's; ConfigError for any other text."""
    if name and not _HELPER.fullmatch(name):
        raise ConfigError(f"not the name of a credential helper: {name[:80]!r}", hint="Correct Docker's config.json.")
    return name


def _from_file(kept: KeptLogins, host: str, path: Path, env: Mapping[str, str]) -> Login:
    for key in login_keys(host):
        helper = kept.cred_helpers.get(key) or kept.creds_store
        if helper and (login := _ask(helper, key, env)):
            return login
    by_host = {key.rstrip("/"): value for key, value in kept.auths.items()}
    for key in login_keys(host):
        if (found := by_host.get(key.rstrip("/"))) is not None and (login := _decode(found, host, path)):
            return login
    return Login()


def _decode(found: _Auth, host: str, path: Path) -> Login:
    user, password = found.username, found.password
    if found.auth:
        try:
            user, _, password = base64.b64decode(found.auth, validate=True).decode().rstrip("\0").partition(":")
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise ConfigError(f"the login for {host} in {path} is damaged", hint=f"Type `pier login {host}`.") from exc
    return Login(user, password, found.identitytoken)


def _ask(helper: str, key: str, env: Mapping[str, str]) -> Login:
    """What ``docker-credential-<helper> get`` answers; an empty login where it knows none or is not installed."""
    program = f"docker-credential-{check_helper(helper)}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=key.encode(),
            capture_output=True,
            timeout=HELPER_LIMIT,
            env=dict(env),
            check=False,
        )
        if done.returncode:
            return Login()
        said = msgspec.json.decode(done.stdout, type=_Helped)
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError):
        return Login()
    if said.username == "<token>":
        return Login(identity_token=said.secret)
    return Login(said.username, said.secret)
