"""What the first pull of a short name brought, where its catalog gives no digest: later pulls must bring the same."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pierhead.errors import PierError
from pierhead.store.files import locked, os_errors, replace


class Pin(msgspec.Struct, frozen=True):
    """A commit and the digest of the weights; empty when nothing is remembered."""

    revision: str = ""
    digest: str = ""


class Pins:
    """The file that remembers, by short name and source; removing it forgets."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, name: str, source: str) -> Pin:
        return self._read().get(f"{name} {source}", Pin())

    def set(self, name: str, source: str, revision: str, digest: str) -> None:
        with os_errors(f"cannot write {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._path.with_suffix(".lock")):
                pins = self._read()
                pins[f"{name} {source}"] = Pin(revision, digest)
                replace(self._path, msgspec.json.encode(pins))

    def _read(self) -> dict[str, Pin]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Pin])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as exc:
            raise PierError(f"cannot read {self._path}: {exc}", hint=f"Remove {self._path}, then try again.") from exc
