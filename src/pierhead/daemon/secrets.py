"""Secrets of this installation: one file each, readable by their owner only; never logged, listed by name alone.

What protects them is the file system: mode 0600 in a folder of mode 0700. They are not encrypted, since the daemon must
be able to read them without a person being there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pierhead.errors import AccessDenied, NotFound, UsageError
from pierhead.fleet.info import iso

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
_MAX = 16384


class SecretInfo(msgspec.Struct, frozen=True):
    """A secret as it is listed: never its text. ``changed`` is ISO 8601 UTC."""

    name: str
    changed: str


class Secrets:
    """The secrets in ``folder``; blocking. A reference is a NAME, ``env:VARIABLE`` or ``file:/path``."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._env = os.environ if env is None else env

    def open_folder(self) -> None:
        """Make the folder, or take back what others may do in it."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        if self.folder.stat().st_mode & 0o077:
            self.folder.chmod(0o700)

    def set(self, name: str, value: str) -> SecretInfo:
        """Keep ``value`` under ``name``, whole or not at all; UsageError for what no header can carry."""
        file = self._file(name)
        check(value, f"the secret '{name}'")
        self.open_folder()
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as out:
                out.write(value)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return _info(file)

    def list(self) -> list[SecretInfo]:
        """All names, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return [_info(file) for file in sorted(self.folder.iterdir()) if _NAME.match(file.name)]
        return []

    def remove(self, name: str) -> SecretInfo:
        """Forget a secret; NotFound when there is none."""
        file = self._file(name)
        try:
            info = _info(file)
            file.unlink()
        except FileNotFoundError:
            raise NotFound(f"there is no secret '{name}'", hint="`pier secret list` shows which there are.") from None
        return info

    def read(self, reference: str) -> str:
        """The text behind a reference; PierError when there is none. Errors name the reference, never the text."""
        kind, colon, rest = reference.partition(":")
        if colon and kind == "env":
            value = self._env.get(rest, "")
            if not value:
                raise NotFound(
                    f"the environment variable {rest} is not set for the daemon",
                    hint=f"Set {rest} where the daemon is started, or use `pier secret set NAME`.",
                )
        elif colon and kind == "file":
            value = self._content(Path(rest), f"the secret's file {rest}")
        else:
            value = self._content(self._file(reference), f"the secret '{reference}'", name=reference)
        value = value.strip()
        check(value, f"the secret '{reference}'")
        return value

    def _content(self, file: Path, what: str, name: str = "") -> str:
        try:
            with file.open("rb") as opened:
                return opened.read(_MAX + 1).decode("utf-8")
        except FileNotFoundError:
            if name:
                raise self._missing(name) from None
            raise NotFound(f"{what} is not there", hint="Mount it, or name another file.") from None
        except UnicodeDecodeError:
            raise UsageError(f"{what} is no text", hint="Store the key's text, in UTF-8.") from None
        except OSError as exc:
            raise AccessDenied(f"cannot read {what}: {exc.strerror}", hint="Let the daemon's user read it.") from None

    def _missing(self, name: str) -> NotFound:
        return NotFound(f"there is no secret '{name}'", hint=f"Type: pier secret set {name}")

    def _file(self, name: str) -> Path:
        if not _NAME.match(name):
            raise UsageError(
                "a secret's name has letters, digits, '.', '-' and '_', at most 100 of them",
                hint="Try `pier secret set openai`.",
            )
        return self.folder / name


def check(value: str, what: str) -> None:
    """UsageError when ``value`` cannot be sent in a header; ``what`` it is called."""
    if not value:
        raise UsageError(f"{what} is empty", hint="Give its text on standard input.")
    if len(value) > _MAX:
        raise UsageError(f"{what} is longer than {_MAX} bytes", hint="Give the key alone, not a file of others.")
    if not all("!" <= character <= "~" for character in value):
        raise UsageError(f"{what} has blanks, line breaks or other signs that no key has", hint="Give the key alone.")


def _info(file: Path) -> SecretInfo:
    return SecretInfo(file.name, iso(file.stat().st_mtime))
