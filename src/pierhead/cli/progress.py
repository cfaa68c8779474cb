"""Progress of long work: bars with speed and remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from typing import Any

from pierhead import events
from pierhead.cli.output import printable, say, size, warn

_STATES = {"preparing": "Preparing", "starting": "Starting", "loading": "Loading", "backoff": "Waiting to restart"}


@contextlib.contextmanager
def bars() -> Generator[events.Listener]:
    """A listener that shows pulls, builds and starts while the ``with`` lasts."""
    shown = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        yield shown.on
    finally:
        shown.close()


def _note(message: str, level: str) -> None:
    if level == "warning":
        warn(printable(message))
    else:
        say(printable(message))


class _Lines:
    """Plain lines for logs and pipes: the plan, every ten seconds of progress, notes."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def on(self, event: events.AnyEvent) -> None:
        match event:
            case events.PullPlanned(name=name, source=source, total=total):
                say(f"Pulling {name} from {source}" + (f", {size(total)}" if total else ""))
            case events.PushPlanned(name=name, target=target, total=total):
                say(f"Pushing {name} to {target}, {size(total)}")
            case (
                events.PullProgress(file=file, done=done, total=total)
                | events.PushProgress(file=file, done=done, total=total)
            ) if time.monotonic() - self._last > 10:
                self._last = time.monotonic()
                say(f"  {file}: {size(done)} of {size(total)}" if total else f"  {file}: {size(done)}")
            case events.BuildProgress(image=image, step=step):
                say(f"Building {image}: {step}")
            case events.Note(message=message, level=level):
                _note(message, level)
            case _:
                pass

    def close(self) -> None:
        pass


class _Bars:
    """A bar for each file on a terminal; one line that comes and goes while a replica starts."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._line = False

    def on(self, event: events.AnyEvent) -> None:
        match event:
            case events.PullPlanned(name=name, source=source, total=total):
                self._say(f"Pulling {name} from {source}" + (f", {size(total)}" if total else ""))
            case events.PullProgress(file=file, done=done, total=total, resumed=resumed):
                self._update(file, file, done, total, resumed)
            case events.PushPlanned(name=name, target=target, total=total):
                self._say(f"Pushing {name} to {target}, {size(total)}")
            case events.PushProgress(file=file, done=done, total=total, resumed=resumed):
                self._update(file, file, done, total, resumed)
            case events.BuildProgress(image=image, step=step, done=done, total=total):
                self._update(f"build {image}", f"Engine image: {step}", done, total, 0)
            case events.Note(message=message, level=level):
                self._clear()
                _note(message, level)
            case events.Phase(state=state, detail=detail) if self._progress is None:
                self._transient(f"{_STATES[state]} {detail}".rstrip() + " …" if state in _STATES else "")
            case _:
                self._clear()

    def close(self) -> None:
        self._clear()
        if self._progress is not None:
            self._progress.stop()

    def _update(self, key: str, text: str, done: int, total: int, resumed: int) -> None:
        progress = self._open()
        if key not in self._tasks:
            self._tasks[key] = progress.add_task(text, total=total or None, completed=resumed)
        progress.update(self._tasks[key], description=text, completed=done, total=total or None)

    def _open(self) -> Any:
        if self._progress is None:
            self._clear()
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.progress import TransferSpeedColumn as Speed

            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(bar_width=None), DownloadColumn(), Speed(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
            self._progress.start()
        return self._progress

    def _say(self, text: str) -> None:
        self._clear()
        say(text)

    def _transient(self, text: str) -> None:
        self._clear()
        if text:
            self._line = True
            sys.stderr.write(printable(text).replace("\n", " ")[:70])
            sys.stderr.flush()

    def _clear(self) -> None:
        if self._line:
            self._line = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
