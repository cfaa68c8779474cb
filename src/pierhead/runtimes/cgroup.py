"""Control groups for engine processes where this user may make them; does without, and says so, where not."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

from pierhead.engines.base import Limits

ROOT = Path("/sys/fs/cgroup")
PARENT = "pierhead"
PERIOD = 100_000
END_TIMEOUT = 2.0  # seconds for a killed process to be gone


class Cgroup:
    """The group of one replica: its folders (one in version 2, one a controller in version 1)."""

    def __init__(self, replica: str) -> None:
        self._name = replica
        self.folders: dict[str, Path] = {}

    def create(self, limits: Limits) -> tuple[str, ...]:
        """Make the group with its limits; the names of the limits that hold."""
        wanted = {"memory": limits.memory, "pids": limits.pids, "cpu": int(limits.cpus * PERIOD)}
        held: list[str] = []
        for controller, value in wanted.items():
            if value and self._limit(controller, value):
                held.append(controller)
        return tuple(held)

    def procs(self) -> list[str]:
        """The files that a process writes itself into."""
        return [str(folder / "cgroup.procs") for folder in dict.fromkeys(self.folders.values())]

    def oom_kills(self) -> int:
        """How often the kernel killed something in the group for memory."""
        folder = self.folders.get("memory")
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, TypeError, ValueError):
                for line in (folder / name).read_text().splitlines() if folder else ():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return 0

    def memory_limit(self) -> int:
        """Bytes, 0 without a limit."""
        folder = self.folders.get("memory")
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                return int((folder / name).read_text()) if folder else 0
        return 0

    def attach(self) -> None:
        """Find the folders that an earlier daemon made."""
        for controller in ("memory", "pids", "cpu"):
            folder = self._folder(controller)
            if folder is not None and folder.is_dir():
                self.folders[controller] = folder

    def remove(self) -> None:
        """Kill what is left in the group, wait for its end and remove the folders."""
        for process in self._left():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], END_TIMEOUT)
            os.close(process)
        for folder in dict.fromkeys(self.folders.values()):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.folders.clear()

    def _left(self) -> list[int]:
        """A pidfd for each process in the group."""
        found: list[int] = []
        for file in self.procs():
            with contextlib.suppress(OSError):
                for pid in Path(file).read_text().split():
                    with contextlib.suppress(OSError):
                        found.append(os.pidfd_open(int(pid)))
        return found

    def possible(self) -> tuple[str, ...]:
        """The limits that can be set here."""
        return tuple(c for c in ("memory", "pids", "cpu") if self._folder(c) is not None)

    def _folder(self, controller: str) -> Path | None:
        base = ROOT if (ROOT / "cgroup.controllers").exists() else ROOT / controller
        return base / PARENT / self._name if base.is_dir() and os.access(base, os.W_OK) else None

    def _limit(self, controller: str, value: int) -> bool:
        folder = self._folder(controller)
        if folder is None:
            return False
        second = folder.parent.parent == ROOT
        names = {"memory": "memory.max", "pids": "pids.max", "cpu": "cpu.max"}
        first = {"memory": "memory.limit_in_bytes", "pids": "pids.max", "cpu": "cpu.cfs_quota_us"}
        text = f"{value} {PERIOD}" if second and controller == "cpu" else str(value)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if second:
                for level in (ROOT, folder.parent):
                    (level / "cgroup.subtree_control").write_text(f"+{controller}")
            (folder / (names if second else first)[controller]).write_text(text)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            return False
        self.folders[controller] = folder
        return True
