"""Progress of long work: bars with speed and remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from typing import Any

from pierhead import events
from pierhead.cli.output import say, size, warn


@contextlib.contextmanager
def bars() -> Generator[events.Listener]:
    """A listener that shows pulls and builds while the ``with`` lasts."""
    shown = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        yield shown.on
    finally:
        shown.close()


class _Lines:
    """Plain lines for logs and pipes: the plan, every ten seconds of progress, notes."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def on(self, event: events.AnyEvent) -> None:
        match event:
            case events.PullPlanned(name=name, source=source, total=total):
                say(f"Pulling {name} from {source}" + (f", {size(total)}" if total else ""))
            case events.PullProgress(file=file, done=done, total=total) if time.monotonic() - self._last > 10:
                self._last = time.monotonic()
                say(f"  {file}: {size(done)} of {size(total)}" if total else f"  {file}: {size(done)}")
            case events.BuildProgress(image=image, step=step):
                say(f"Building {image}: {step}")
            case events.Note(message=message, level=level):
                warn(message) if level == "warning" else say(message)
            case _:
                pass

    def close(self) -> None:
        pass


class _Bars:
    """A bar for each file on a terminal; a spinner while a replica starts."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}

    def _open(self) -> Any:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.progress import TransferSpeedColumn as Speed

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.start()
        return self._progress

    def on(self, event: events.AnyEvent) -> None:
        match event:
            case events.PullPlanned(name=name, source=source):
                say(f"Pulling {name} from {source}")
            case events.PullProgress(file=file, done=done, total=total):
                progress = self._open()
                if file not in self._tasks:
                    self._tasks[file] = progress.add_task(file, total=total or None, completed=event.resumed)
                progress.update(self._tasks[file], completed=done, total=total or None)
            case events.BuildProgress(image=image, step=step):
                progress = self._open()
                key = f"build {image}"
                if key not in self._tasks:
                    self._tasks[key] = progress.add_task(key, total=None)
                progress.update(self._tasks[key], description=f"Building the engine image: {step}")
            case events.Note(message=message, level=level):
                warn(message) if level == "warning" else say(message)
            case _:
                pass

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
