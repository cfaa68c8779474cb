"""Keeping and forgetting logins where Docker keeps them: its credential helpers, else its config.json."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import subprocess
from collections.abc import Generator, Mapping
from pathlib import Path

import msgspec

from pierhead.errors import ConfigError, PierError
from pierhead.registry.credentials import (
    HELPER_LIMIT,
    KeptLogins,
    Login,
    check_helper,
    config_files,
    login_keys,
    read_logins,
)
from pierhead.registry.jsontext import drop, put
from pierhead.store.files import os_errors, replace


def keep_login(host: str, login: Login, env: Mapping[str, str]) -> str:
    """Keep a login for a registry; where it is kept, for the user to read. ConfigError where that is impossible."""
    path = config_files(env)[0]
    key = login_keys(host)[0]
    with _held(path) as (file, text):
        kept = read_logins(file) or KeptLogins()
        helper = _helper(kept, host)
        entry: dict[str, str] = {}
        if helper:
            user, secret = ("<token>", login.identity_token) if login.identity_token else (login.user, login.password)
            _run(helper, "store", msgspec.json.encode({"ServerURL": key, "Username": user, "Secret": secret}), env)
        else:
            entry["auth"] = base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
            if login.identity_token:
                entry["identitytoken"] = login.identity_token
        _write(file, put(text, ("auths", key), entry))
    return f"docker-credential-{helper}" if helper else str(path)


def forget_login(host: str, env: Mapping[str, str]) -> list[str]:
    """Remove the login for a registry everywhere it is kept; the places that had one."""
    found: list[str] = []
    for path in config_files(env):
        kept = read_logins(path)
        if kept is None:
            continue
        if (helper := _helper(kept, host)) and _erase(helper, host, kept, env):
            found.append(f"docker-credential-{helper}")
        with _held(path) as (file, text):
            left = text
            for key in _spellings(kept, host):
                left = drop(left, ("auths", key))
            if left != text:
                _write(file, left)
                if not helper:
                    found.append(str(path))
    return found


def _spellings(kept: KeptLogins, host: str) -> list[str]:
    """The names under which a file has this host."""
    wanted = {key.rstrip("/") for key in login_keys(host)}
    return [key for key in kept.auths if key.rstrip("/") in wanted]


def _helper(kept: KeptLogins, host: str) -> str:
    named = [kept.cred_helpers[key] for key in login_keys(host) if kept.cred_helpers.get(key)]
    return check_helper(named[0] if named else kept.creds_store)


def _erase(helper: str, host: str, kept: KeptLogins, env: Mapping[str, str]) -> bool:
    """Whether the helper had a login for the host under any of its names."""
    done = False
    for key in dict.fromkeys((*login_keys(host), *_spellings(kept, host))):
        known = _call(helper, "get", key.encode(), env)
        if known.returncode == 0:
            _run(helper, "erase", key.encode(), env)
            done = True
    return done


def _run(helper: str, action: str, given: bytes, env: Mapping[str, str]) -> None:
    done = _call(helper, action, given, env)
    if done.returncode:
        raise PierError(
            f"docker-credential-{helper} could not {action} the login (status {done.returncode})",
            hint="Correct or remove credsStore or credHelpers in Docker's config.json.",
        )  # what it said may hold what it was given


def _call(helper: str, action: str, given: bytes, env: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    argv = [f"docker-credential-{helper}", action]
    try:
        return subprocess.run(argv, input=given, capture_output=True, timeout=HELPER_LIMIT, env=dict(env), check=False)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"Docker's config.json names the credential helper '{helper}', which is not installed",
            hint=f"Install docker-credential-{helper}, or remove it from config.json.",
        ) from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise PierError(f"docker-credential-{helper} does not answer", hint="Try it by hand, then again.") from exc


@contextlib.contextmanager
def _held(path: Path) -> Generator[tuple[Path, str]]:
    """The file itself (behind links) and its text, while no other pier changes it."""
    with os_errors(f"cannot keep logins in {path}"):
        file = path.resolve()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                yield file, file.read_text(encoding="utf-8") if file.exists() else ""
            except ValueError as exc:
                raise ConfigError(f"{path} is damaged: {exc}", hint=f"Correct or move away {path}.") from exc
        finally:
            os.close(fd)


def _write(file: Path, text: str) -> None:
    """In one step, readable by its owner alone."""
    replace(file, (text if text.endswith("\n") else text + "\n").encode(), 0o600)
