"""Durable file operations that the store is built on: locks, atomic replacement, reflinks; knows nothing of OCI."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Generator
from io import FileIO
from pathlib import Path, PurePosixPath

from pierhead.errors import AccessDenied, CorruptData, NotFound, OutOfSpace, PierError

FICLONE = 0x40049409


@contextlib.contextmanager
def os_errors(doing: str) -> Generator[None]:
    """Map the operating system's refusals to errors a person can act on."""
    try:
        yield
    except OSError as exc:
        raise mapped(exc, doing) from exc


def mapped(exc: OSError, doing: str) -> PierError:
    """The PierError for one OSError."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutOfSpace(
            f"{doing}: the disk is full",
            hint="Free some space (`pier df`, `pier prune`, `pier rm NAME`), then try again.",
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = exc.filename or "the store"
        return AccessDenied(f"{doing}: no permission for {where}", hint="Check who owns it, or set PIERHEAD_HOME.")
    if exc.errno == errno.ENOENT:
        return NotFound(f"{doing}: {exc.filename or 'a file'} is gone", hint="It was removed meanwhile. Try again.")
    return PierError(f"{doing}: {exc.strerror or exc}")


@contextlib.contextmanager
def locked(path: Path, *, waiting: Callable[[], None] | None = None, shared: bool = False) -> Generator[None]:
    """Hold the lock file ``path``, which dies with the process; ``waiting`` is called when it is taken."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(fd, mode)
            if _is_at(fd, path):  # a cleaner may have removed the file between the two calls
                yield
                return
        finally:
            os.close(fd)


@contextlib.contextmanager
def seized(path: Path) -> Generator[bool]:
    """Hold the lock file if nobody does, and say so; whoever wants it meanwhile waits. False for a missing file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # whoever may only read the store may still look
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield _is_at(fd, path)
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a live process holds the lock file."""
    with seized(path) as free:
        return not free and path.exists()


def _is_at(fd: int, path: Path) -> bool:
    mine = os.fstat(fd)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def sync_file(path: Path) -> None:
    """Make the content of a file survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut; nothing for one that is there."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True, mode=0o755)
        sync_folder(path.parent)


@contextlib.contextmanager
def opened_beneath(root: Path, relative: str) -> Generator[int]:
    """A plain file below a folder that others own, open for reading; no link below ``root`` is followed.

    NotFound when it is not there, CorruptData when it, or a folder on the way, is anything but what it should be.
    """
    *folders, name = PurePosixPath(relative).parts
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = _inside(at, folder, os.O_DIRECTORY, root, relative)
            os.close(at)
            at = inner
        file = _inside(at, name, os.O_NONBLOCK, root, relative)
    finally:
        os.close(at)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise CorruptData(f"{root / relative} is not a plain file", hint="It is left alone.")
        yield file
    finally:
        os.close(file)


def _inside(at: int, name: str, flags: int, root: Path, relative: str) -> int:
    if name in ("..", "/", ""):
        raise CorruptData(f"{relative[:100]!r} leaves its folder")
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=at)
    except FileNotFoundError as exc:
        raise NotFound(
            f"{root / relative} is not there", hint="Fetch it again with the tool whose folder it is."
        ) from exc
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise CorruptData(
                f"{root / relative} is, or is behind, a link or something else than a plain file",
                hint="Links inside other programs' folders are not followed.",
            ) from exc
        raise mapped(exc, f"cannot read {root / relative}") from exc


def start_writing(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write a part of a file to the disk, without waiting; where it cannot, never mind."""
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, length, 2)  # SYNC_FILE_RANGE_WRITE


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    import ctypes

    try:
        found = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


def sync_folder(path: Path) -> None:
    """Make renames and removals in ``path`` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old or the new content, whatever happens."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Generator[FileIO]:
    """A file to write, which takes the place of ``path`` when the ``with`` ends well; else nothing is left of it.

    Where the filesystem can, it has no name until then, so that not even a kill leaves anything.
    """
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}")
    fd = _unnamed(path.parent)
    try:
        with os.fdopen(fd, "wb", buffering=0) if fd >= 0 else temporary.open("xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
            if fd >= 0:
                _give_name(fd, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _unnamed(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except OSError:
        return -1


def _give_name(fd: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def reflink(source: Path, target: Path) -> bool:
    """Share the blocks of ``source`` with a new file ``target``; False where the filesystem cannot."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        except OSError:
            pass
        else:
            return True
    target.unlink()
    return False


def disk_bytes(path: Path, seen: set[tuple[int, int]]) -> int:
    """Allocated bytes below ``path``, each inode counted once across calls that share ``seen``."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                if (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    total += found.st_blocks * 512
    return total


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it; nothing happens when it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
