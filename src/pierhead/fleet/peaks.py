"""What replicas were seen to use, kept on disk: the next start of the same kind claims no less; small and atomic."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import msgspec

from pierhead.engines.base import LaunchSpec

_KEPT = 512  # kinds of starts that are remembered; the longest unseen are forgotten
_NEWS = 1.01  # a peak that is not this much higher is not worth a write


class Peak(msgspec.Struct, frozen=True):
    """The most bytes that replicas of one kind were seen to use, when (Unix time), and what they are.

    ``device`` are the most bytes of one accelerator's memory.
    """

    memory: int
    at: float
    digest: str = ""  # of the model
    engine: str = ""
    context: int = 0
    device: int = 0


def kind(digest: str, spec: LaunchSpec) -> str:
    """What makes two starts alike: the model, the engine with its version, and all that it is told."""
    image = spec.image
    told = (digest, spec.engine, spec.argv, sorted(spec.env.items()), image.requirements if image is not None else ())
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest()[:24]


class Peaks:
    """The peaks by kind. A file that cannot be read is an empty one; one that cannot be written is forgotten."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, Peak] = {}
        self._dirty = False
        with contextlib.suppress(OSError, msgspec.DecodeError):
            self._found = msgspec.json.decode(file.read_bytes(), type=dict[str, Peak])

    def of(self, key: str) -> int:
        """Bytes that replicas of this kind were seen to use; 0 when none was."""
        peak = self._found.get(key)
        return peak.memory if peak is not None else 0

    def on_devices(self, key: str) -> int:
        """Bytes of one accelerator's memory that replicas of this kind were seen to use; 0 when none was."""
        peak = self._found.get(key)
        return peak.device if peak is not None else 0

    def of_model(self, digest: str) -> list[Peak]:
        """Those of all kinds of starts of one model, the latest first."""
        return sorted((p for p in self._found.values() if p.digest == digest), key=lambda p: -p.at)

    def learn(
        self, key: str, memory: int, digest: str = "", engine: str = "", context: int = 0, device: int = 0
    ) -> bool:
        """Note what one uses now; True when that is news to be written down."""
        known = self._found.get(key) or Peak(0, 0.0)
        if memory <= known.memory * _NEWS and device <= known.device * _NEWS:
            return False
        memory, device = max(memory, known.memory), max(device, known.device)
        self._found[key] = Peak(memory, time.time(), digest, engine, context, device)
        for old in sorted(self._found, key=lambda k: self._found[k].at)[: max(0, len(self._found) - _KEPT)]:
            del self._found[old]
        self._dirty = True
        return True

    def save(self) -> None:
        """Write down what is news; readers see the old or the new file, whole."""
        if not self._dirty:
            return
        self._dirty = False
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(self._found))
            temporary.replace(self._file)
