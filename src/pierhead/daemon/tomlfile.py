"""A user's TOML file that is read whole, edited without losing comments and replaced atomically; knows no contents."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets as random
from collections.abc import Callable, Iterable
from pathlib import Path

from pierhead.daemon.watch import FolderWatch
from pierhead.errors import AccessDenied, ConfigError

_MAX = 4 << 20


def read_text(file: Path) -> str:
    """The file's text, "" when there is none; ConfigError when it cannot be read. Blocking."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MAX + 1)
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}", hint="Let the daemon's user read it.") from exc
    if len(raw) > _MAX:
        raise ConfigError(f"{file} is longer than {_MAX >> 20} MiB", hint="Take tables out of it.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file} is not UTF-8", hint="Save it as UTF-8.") from exc


def write_text(file: Path, text: str) -> None:
    """Replace the file, whose mode stays; readers see the old or the new text, whole. Blocking."""
    target = file.resolve()  # of a link, the file behind it
    temporary = target.with_name(f".{target.name}.{random.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise AccessDenied(f"cannot write {target}: {exc.strerror}", hint="Edit the file where it comes from.") from exc


async def follow(
    folders: Callable[[], Iterable[Path]], refresh: Callable[[], None], changed: Callable[[], None]
) -> None:
    """``refresh`` in a thread, then ``changed``, whenever something in the folders changes; until cancelled."""
    loop = asyncio.get_running_loop()
    dirty = asyncio.Event()
    watches: dict[Path, FolderWatch] = {}

    def notice(watch: FolderWatch) -> None:
        watch.names()
        dirty.set()

    try:
        while True:
            for folder in set(folders()) - watches.keys():
                with contextlib.suppress(OSError):
                    watches[folder] = watch = FolderWatch(folder)
                    loop.add_reader(watch.fd, notice, watch)
                    dirty.set()  # what changed before it was watched
            await dirty.wait()
            dirty.clear()
            await asyncio.to_thread(refresh)
            changed()
    finally:
        for watch in watches.values():
            loop.remove_reader(watch.fd)
            watch.close()
