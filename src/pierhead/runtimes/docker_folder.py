"""The folder that a container and the gateway share for the engine's socket: private, small, gone at the end."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

NAME = "s"
UID = 65532  # the container's user when root starts it
SIZE = 1 << 20
INODES = 64

_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def make(folder: Path, uid: int, gid: int) -> bool:
    """Make ``folder``/s (0700, owned by ``uid``); returns whether its size is limited, which only root can arrange."""
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    sockets = folder / NAME
    release(folder)
    sockets.mkdir(mode=0o700)
    if os.geteuid() != 0:
        return False
    options = f"size={SIZE},nr_inodes={INODES},mode=0700,uid={uid},gid={gid}"
    flags = _NOSUID | _NODEV | _NOEXEC
    if _libc.mount(b"tmpfs", os.fsencode(sockets), b"tmpfs", flags, options.encode()) == 0:
        return True
    os.chown(sockets, uid, gid)
    return False


def make_output(folder: Path, uid: int, gid: int) -> None:
    """A folder on the disk that the container may fill."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(folder, uid, gid)


def release(folder: Path) -> None:
    """Unmount and remove ``folder``/s; nothing happens when it is not there."""
    sockets = folder / NAME
    while sockets.is_dir() and not sockets.is_symlink() and os.path.ismount(sockets):
        if _libc.umount2(os.fsencode(sockets), _DETACH) != 0:
            break
    shutil.rmtree(sockets, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove the replica's whole folder."""
    release(folder)
    shutil.rmtree(folder, ignore_errors=True)
