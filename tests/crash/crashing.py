"""Every point at which an operation can die: killed, cut off from power, or out of disk; knows no operation by name.

A child process performs the operation with a hook on each durable step below one folder: files opened for writing,
written, synced, renamed, linked, removed, folders made. Step by step the child is killed there, or its disk is full
there; and from one whole run the disk is built as a power cut at each step would leave it, in two ways: nothing that
was not synced is there, or all names are but the bytes of unsynced files are not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import resource
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ENDED, NO_SPACE, REFUSED, BROKEN = 0, 10, 11, 12  # how a child ended that was not killed
Act = Callable[[Path], None]
_CREATES = {"open", "write", "fsync", "os.rename", "os.link", "os.mkdir"}  # what a full disk refuses


class Steps:
    """Calls ``at(event, detail)`` before each durable step below ``root``; for the rest of the process's life.

    With ``reads`` also before files are opened to be read and folders listed.
    """

    def __init__(self, root: Path, at: Callable[[str, Any], None], *, reads: bool = False) -> None:
        self._root = str(root)
        self._at = at
        self._reads = reads
        self._busy = threading.local()

    def install(self) -> None:
        sys.addaudithook(self._audit)
        fsync, write = os.fsync, os.write

        def counted_fsync(fd: int) -> None:
            if self._ours(os.readlink(f"/proc/self/fd/{fd}")):
                self._tell("fsync", fd)
            fsync(fd)

        def counted_write(fd: int, data: Any) -> int:
            if self._ours(os.readlink(f"/proc/self/fd/{fd}")):
                self._tell("write", (fd, data))
            return write(fd, data)

        os.fsync, os.write = counted_fsync, counted_write  # type: ignore[assignment]

    def _ours(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self._root)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            wanted = self._reads or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if wanted and self._ours(args[0]):
                self._tell(event, args[0])
        elif event in ("os.listdir", "os.scandir"):
            if self._reads and self._ours(args[0]):
                self._tell(event, args[0])
        elif event in ("os.rename", "os.link"):
            if self._ours(args[0]) or self._ours(args[1]):
                self._tell(event, (args[0], args[1]))
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"):
            inside = isinstance(args[-1], int) and args[-1] >= 0 and event != "os.truncate"  # relative to a folder
            if inside or self._ours(args[0]):
                self._tell(event, args[0] if not inside else f"/proc/self/fd/{args[-1]}/{os.fspath(args[0])}")

    def _tell(self, event: str, detail: Any) -> None:
        if getattr(self._busy, "now", False):
            return
        self._busy.now = True
        try:
            self._at(event, detail)
        finally:
            self._busy.now = False


# --- the child --------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked child; its exit status, negative for a signal."""
    from pierhead.errors import OutOfSpace, PierError

    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = BROKEN
        try:
            work()
            code = ENDED
        except OutOfSpace:
            code = NO_SPACE
        except PierError:
            code = REFUSED
            traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(number: int, torn: bool, root: Path, act: Act) -> tuple[int, bool]:
    """Perform ``act`` in a child that is killed before its step ``number``; its status, and whether it can be torn.

    ``torn``: half of what was being written is there.
    """
    note = root.with_name("torn")
    note.unlink(missing_ok=True)

    def work() -> None:
        counter = itertools.count(1)
        lock = threading.Lock()

        def at(event: str, detail: Any) -> None:
            with lock:
                if next(counter) == number:
                    if event in ("fsync", "write") and _tear(event, detail, really=torn):
                        note.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

        Steps(root, at).install()
        act(root)

    return in_child(work), note.exists()


def _tear(event: str, detail: Any, *, really: bool) -> bool:
    """Leave half of what is being written; whether that can be."""
    if event == "write":
        fd, data = detail
        if really:
            import posix

            posix.write(fd, bytes(data)[: len(data) // 2])
        return True
    found = os.fstat(detail)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size < 2:
        return False
    name = os.readlink(f"/proc/self/fd/{detail}")
    if name.endswith(".jsonl"):
        return False  # an appended line is torn where it is written
    if really:
        os.truncate(f"/proc/self/fd/{detail}", found.st_size // 2)
    return True


def full_at(number: int, root: Path, act: Act) -> tuple[int, bool]:
    """Perform ``act`` in a child whose disk is full from step ``number`` on; its status, and whether it was reached."""
    note = root.with_name("reached")
    note.unlink(missing_ok=True)

    def work() -> None:
        counter = itertools.count(1)
        lock = threading.Lock()

        def at(event: str, detail: Any) -> None:
            if event not in _CREATES or (event == "open" and os.path.exists(detail)):
                return
            with lock:
                if next(counter) >= number:
                    note.touch()
                    raise OSError(errno.ENOSPC, "No space left on device", str(detail))

        Steps(root, at).install()
        act(root)

    return in_child(work), note.exists()


def limited_to(size: int, root: Path, act: Act) -> int:
    """Perform ``act`` in a child that may write no file beyond ``size`` bytes; its status."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        act(root)

    return in_child(work)


def meanwhile(number: int, root: Path, act: Act, rival: Act) -> tuple[int, bool]:
    """Perform ``act`` in a child in which ``rival`` does its work before step ``number``; status, and whether it did.

    A rival that would have to wait for the index's lock does not come at this step: it comes after the lock is free.
    """
    note = root.with_name("reached")
    note.unlink(missing_ok=True)

    def work() -> None:
        counter = itertools.count(1)
        lock = threading.Lock()

        def at(event: str, detail: Any) -> None:
            with lock:
                if next(counter) != number:
                    return
                note.touch()
                if not _held(root / "index.lock"):
                    rival(root)

        Steps(root, at, reads=True).install()
        act(root)

    return in_child(work), note.exists()


def _held(path: Path) -> bool:
    if not path.exists():
        return False
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# --- power cuts -------------------------------------------------------------------------------------------------------


class Disk:
    """What of the folder ``root`` is durable while a process works on it, and the trees that cuts leave in ``out``."""

    def __init__(self, root: Path, out: Path) -> None:
        self._root = root
        self._out = out
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._data: dict[int, bytes] = {}
        self._held: list[int] = []  # inodes of removed files are kept busy, so that no new file gets their number
        self._outside = {p.stat().st_ino: p for p in (root.parent / "user").glob("*")}  # what blobs may be links of
        self.count = 0
        for folder, _, files in os.walk(root):
            self._names[os.stat(folder).st_ino] = _listing(folder)
            for name in files:
                path = os.path.join(folder, name)
                self._data[os.lstat(path).st_ino] = Path(path).read_bytes()

    def at(self, event: str, detail: Any) -> None:
        """A step is about to happen: what if the power went now? Then note what the step makes durable."""
        self.cut()
        if event == "fsync":
            found = os.fstat(detail)
            if stat.S_ISDIR(found.st_mode):
                self._names[found.st_ino] = _listing(detail)
            else:
                self._data[found.st_ino] = Path(f"/proc/self/fd/{detail}").read_bytes()
        elif event in ("os.remove", "os.rmdir", "os.rename"):
            path = detail[1] if event == "os.rename" else detail
            with contextlib.suppress(OSError):
                self._held.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))

    def cut(self) -> None:
        """Build both trees of this moment."""
        self.count += 1
        if self._root.exists():
            self._strict(os.stat(self._root).st_ino, self._out / f"cut-{self.count}-strict")
            self._names_only(self._root, self._out / f"cut-{self.count}-names")

    def _strict(self, folder: int, target: Path) -> None:
        target.mkdir()
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                self._strict(inode, target / name)
            else:
                self._file(inode, target / name)

    def _names_only(self, folder: Path, target: Path) -> None:
        target.mkdir()
        for name, (inode, is_folder) in _listing(folder).items():
            if is_folder:
                self._names_only(folder / name, target / name)
            else:
                self._file(inode, target / name)

    def _file(self, inode: int, target: Path) -> None:
        if inode in self._outside:
            os.link(self._outside[inode], target)
        else:
            target.write_bytes(self._data.get(inode, b""))


def _listing(folder: Any) -> dict[str, tuple[int, bool]]:
    with os.scandir(folder) as found:
        return {e.name: (e.inode(), e.is_dir(follow_symlinks=False)) for e in found}


def power_cuts(root: Path, out: Path, act: Act) -> Iterator[tuple[Path, bool]]:
    """The trees that power cuts leave, in order; the flag tells those of after the operation's end."""

    def work() -> None:
        disk = Disk(root, out)
        lock = threading.Lock()

        def at(event: str, detail: Any) -> None:
            with lock:
                disk.at(event, detail)

        steps = Steps(root, at)
        steps.install()
        act(root)
        steps._busy.now = True
        disk.cut()
        (out / "count").write_text(str(disk.count))

    assert in_child(work) == ENDED
    count = int((out / "count").read_text())
    for number in range(1, count + 1):
        for kind in ("strict", "names"):
            tree = out / f"cut-{number}-{kind}"
            if tree.exists():
                yield tree, number == count
