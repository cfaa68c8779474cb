"""The thread that runs the pipeline: requests join between two steps, and each step's tokens go to who waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from .asks import Refused
from .text import Words


class Job:
    """One answer that is being written; its events are read on the loop that made it."""

    def __init__(self, prompt: Any, config: Any, words: Words) -> None:
        self.prompt = prompt
        self.config = config
        self.words = words
        self.handle: Any = None
        self.count = 0  # of tokens written
        self.gone = False  # nobody waits any more
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def tell(self, kind: str, text: str) -> None:
        """Called by the thread: ``text``, ``end`` (with the reason) or ``fail``."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, text))

    async def events(self) -> AsyncIterator[tuple[str, str]]:
        """Pieces of text and then the end; Refused when the pipeline could not do it."""
        while True:
            kind, text = await self._events.get()
            if kind == "fail":
                raise Refused(text, status=500)
            yield kind, text
            if kind == "end":
                return


class Worker(threading.Thread):
    """Owns the pipeline, which one thread may use only; counts for the metrics."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(name="pipeline", daemon=True)
        self._pipeline = pipeline
        self._wake = threading.Condition()
        self._new: list[Job] = []
        self._running: list[Job] = []
        self._next = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.cache_usage = 0.0

    @property
    def waiting(self) -> int:
        return len(self._new)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Let a job join."""
        with self._wake:
            self._new.append(job)
            self._wake.notify()

    def run(self) -> None:
        while True:
            with self._wake:
                while not self._new and not self._running:
                    self._wake.wait()
                new, self._new = self._new, []
            for job in new:
                self._begin(job)
            try:
                self._step()
            except Exception as exc:  # the pipeline's own errors have no common type: tell all, go on with the next
                for job in self._running:
                    job.tell("fail", str(exc).strip().rpartition("\n")[2] or "the pipeline failed")
                self._running = []

    def _begin(self, job: Job) -> None:
        if job.gone:
            return
        try:
            self._next += 1
            job.handle = self._pipeline.add_request(self._next, job.prompt, job.config)
        except Exception as exc:  # as above: a value that the pipeline refuses
            job.tell("fail", str(exc).strip().rpartition("\n")[2])
            return
        self.prompt_tokens += int(job.prompt.shape[1])
        self._running.append(job)

    def _step(self) -> None:
        for job in self._running:
            if job.gone:
                job.handle.cancel()
        self._running = [job for job in self._running if not job.gone]
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._running = [job for job in self._running if not self._hear(job)]
        self.cache_usage = float(self._pipeline.get_metrics().cache_usage) / 100

    def _hear(self, job: Job) -> bool:
        """Pass on what a job's step gave; whether that was its last."""
        reason = ""
        while job.handle.can_read():
            for output in job.handle.read().values():
                tokens = [int(token) for token in output.generated_ids]
                job.count += len(tokens)
                self.generated_tokens += len(tokens)
                reason = output.finish_reason.name
                if text := job.words.add(tokens):
                    job.tell("text", text)
                if job.words.stopped:
                    job.handle.stop()
                    job.tell("end", "stop")
                    return True
        status = job.handle.get_status().name
        if status == "IGNORED":
            job.tell("fail", "the prompt does not fit into the engine's cache")
            return True
        if status == "RUNNING":
            return False
        if rest := job.words.end():
            job.tell("text", rest)
        job.tell("end", "length" if reason == "LENGTH" else "stop")
        return True
