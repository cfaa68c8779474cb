"""Where requests wait for a model, and what a thread does with one: sound piece by piece to segments."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from . import sound
from .asks import Ask
from .faults import Refused
from .metrics import Metrics
from .settings import Settings
from .whisper import Model, Models, Segment

np: Any = importlib.import_module("numpy")
Tell = Callable[[Segment], None]
MARGIN = 30.0  # seconds at the end of a piece that are heard again, with what follows: a window of Whisper's
TAIL = 400  # characters of what was said that the next piece is told


@dataclass(frozen=True)
class Heard:
    """All of a recording; ``duration`` in seconds."""

    segments: tuple[Segment, ...]
    language: str
    duration: float

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()


class Hall:
    """Gives each request a model, in order; a bounded number may wait."""

    def __init__(self, models: list[Model], settings: Settings, metrics: Metrics) -> None:
        self._pool = ThreadPoolExecutor(len(models), "whisper")
        self._models = Models(models)
        self._settings = settings
        self._metrics = metrics
        self._most = len(models) + settings.queue
        self._there: set[Callable[[], bool]] = set()  # for each request, whether its client is gone
        self._closing = False

    async def hear(self, ask: Ask, gone: Callable[[], bool], tell: Tell | None = None) -> Heard:
        """What was said; Refused 429 when too many wait. ``tell`` hears of each segment, in the worker's thread."""
        if len(self._there) >= self._most and sum(not left() for left in self._there) >= self._most:
            raise Refused(429, f"{self._settings.queue} requests wait already, which is as many as may.", "queue_full")
        self._there.add(gone)
        self._metrics.waiting += 1
        since = time.monotonic()
        loop = asyncio.get_running_loop()

        def begun() -> None:
            self._metrics.waiting -= 1
            self._metrics.running += 1
            self._metrics.queued.add(time.monotonic() - since)

        def ended() -> None:
            self._there.discard(gone)
            self._metrics.running -= 1

        def work() -> Heard:
            loop.call_soon_threadsafe(begun)
            try:
                return self._work(ask, lambda: self._closing or gone(), tell)
            finally:
                loop.call_soon_threadsafe(ended)

        try:
            return await loop.run_in_executor(self._pool, work)
        except InterruptedError as exc:
            self._metrics.cancelled += 1
            if self._closing:
                raise Refused(503, "The server is ending.", "unavailable") from exc
            raise Refused(499, "The client is gone.", "gone") from exc

    def _work(self, ask: Ask, gone: Callable[[], bool], tell: Tell | None) -> Heard:
        if gone():
            raise InterruptedError
        model = self._models.take()
        try:
            return _hear(model, ask, self._settings, gone, tell, self._metrics)
        finally:
            self._models.give(model)

    def close(self) -> None:
        """Refuse what waits and stop what runs; returns when all threads are done."""
        self._closing = True
        self._pool.shutdown(wait=True)


def _hear(
    model: Model,
    ask: Ask,
    settings: Settings,
    gone: Callable[[], bool],
    tell: Tell | None,
    metrics: Metrics,
) -> Heard:
    done: list[Segment] = []
    wish, start = ask.wish, 0.0
    pending = np.zeros(0, np.float32)
    for samples, last in sound.pieces(ask.sound, settings.piece, settings.max_seconds):
        audio = np.concatenate((pending, samples)) if pending.size else samples
        del samples  # long sound fills memory
        length = audio.size / sound.RATE
        sure = length if last else length - MARGIN
        found, language = model.hear(audio, wish, gone, None if tell is None else _teller(tell, start, sure, last))
        kept, cut = (found, length) if last else parted(found, length)
        metrics.worked(cut, sum(len(segment.tokens) for segment in found))
        done += [segment.later(start) for segment in kept]
        pending = audio[round(cut * sound.RATE) :]
        start += cut
        tail = "".join(segment.text for segment in done[-8:])[-TAIL:]
        wish = replace(wish, language=language, prompt=f"{ask.wish.prompt} {tail}".strip())
    return Heard(tuple(done), wish.language, start)


def _teller(tell: Tell, start: float, sure: float, last: bool) -> Tell:
    """Tells at once of segments that will stay."""

    def told(segment: Segment) -> None:
        if last or segment.end <= sure:
            tell(segment.later(start))

    return told


def parted(found: list[Segment], length: float) -> tuple[list[Segment], float]:
    """Of a piece that more follows: the segments that stay, and the second from which on it is heard again."""
    if not found:
        return [], length
    kept = [segment for segment in found if segment.end <= length - MARGIN]
    return kept, max(kept[-1].end if kept else 0.0, length - 2 * MARGIN)
