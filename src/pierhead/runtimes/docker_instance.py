"""One container: its end, its readings, its words; creates none."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

from pierhead.engines.base import LaunchSpec
from pierhead.errors import EngineFailed, RuntimeUnavailable, Timeout, UsageError
from pierhead.runtimes import docker_folder
from pierhead.runtimes.base import ExecResult, Exit, Stats
from pierhead.runtimes.docker_api import Engine, Refused, frames
from pierhead.runtimes.job import OUTPUT
from pierhead.runtimes.readiness import Notify

LINE_LIMIT = 1 << 16
OUTPUT_LIMIT = 1 << 20
TAIL_LIMIT = 100_000  # lines kept for ``tail``
LOST = 60.0  # seconds that the Engine may be away (an upgrade) before its container counts as gone
SLACK = 30.0  # seconds beyond the stop timeout before the Engine's word is no longer waited for


class DockerInstance:
    """One engine program in a container."""

    def __init__(
        self, engine: Engine, spec: LaunchSpec, container: str, folder: Path, notify: Notify | None, address: str = ""
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._container: Any = engine.docker.containers.container(container)
        self.container = container
        self.folder = folder
        self.notify = notify
        self._ended = asyncio.ensure_future(self._watch())
        self._pumps: list[asyncio.Future[Any]] = []
        self._address = address

    @property
    def spec(self) -> LaunchSpec:
        return self._spec

    @property
    def socket(self) -> str:
        return self._address or str(self.folder / docker_folder.NAME / "engine.sock")

    @property
    def output(self) -> Path | None:
        """See ``Instance.output``."""
        return self.folder / OUTPUT if self._spec.kind == "job" else None

    async def wait(self) -> Exit:
        """See ``Instance.wait``."""
        return await asyncio.shield(self._ended)

    async def _watch(self) -> Exit:
        try:
            return await self._end_of_container()
        finally:
            if self.notify is not None:
                self.notify.close()

    async def _end_of_container(self) -> Exit:
        """Held open by the Engine until the end; asked again when the Engine itself was restarted meanwhile."""
        lost: float | None = None
        while True:
            try:
                with self._engine.refusals("wait for the container", passing=(404,)):
                    await self._container.wait()
                    return await self._exit()
            except Refused:
                return Exit(137, signal.SIGKILL, at=time.time(), reason="was removed by somebody")
            except RuntimeUnavailable as exc:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > LOST:
                    return Exit(137, signal.SIGKILL, at=time.time(), reason=f"was lost: {exc.message}")
                await asyncio.sleep(0.5)  # the Engine is away: nothing announces its return

    async def _exit(self) -> Exit:
        shown: dict[str, Any] = await self._container.show()
        state: dict[str, Any] = shown["State"]
        code = int(state.get("ExitCode", 0))
        number = code - 128 if 128 < code <= 128 + signal.NSIG else 0
        reason = str(state.get("Error", ""))[:500]
        return Exit(code, number, oom=bool(state.get("OOMKilled")), at=_unix(state.get("FinishedAt")), reason=reason)

    async def stop(self, timeout: float | None = None) -> Exit:
        """See ``Instance.stop``."""
        grace = self._spec.stop_timeout if timeout is None else timeout
        if not self._ended.done():
            with (
                contextlib.suppress(Refused, TimeoutError),
                self._engine.refusals("stop the container", passing=(304, 404, 409)),
            ):
                async with asyncio.timeout(grace + SLACK):
                    await self._end(grace)
        found = await self._limited(grace)
        await self.discard()
        return found

    async def _end(self, grace: float) -> None:
        if grace <= 0:
            await self._container.kill()
            return
        await self._container.kill(signal="SIGTERM")
        try:
            async with asyncio.timeout(grace):
                await self.wait()
        except TimeoutError:
            await self._container.kill()

    async def _limited(self, grace: float) -> Exit:
        try:
            async with asyncio.timeout(grace + SLACK):
                return await self.wait()
        except TimeoutError as exc:
            raise Timeout(
                f"the container of '{self._spec.model}' does not end", hint="See the Docker Engine's log."
            ) from exc

    async def discard(self) -> None:
        """Remove the container, its socket folder and whatever else it left."""
        with contextlib.suppress(Refused), self._engine.refusals("remove the container", passing=(404, 409)):
            await self._container.delete(force=True, v=True)
        for task in (self._ended, *self._pumps):
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await asyncio.to_thread(docker_folder.remove, self.folder)

    async def stats(self) -> Stats:
        """See ``Instance.stats``."""
        params = {"stream": "false", "one-shot": "true"}
        with contextlib.suppress(Refused), self._engine.refusals("read the container's figures", passing=(404, 409)):
            async with self._engine.request("GET", f"containers/{self.container}/stats", params) as answer:
                return reading(await answer.json(content_type=None))
        return Stats(at=time.time())

    async def logs(self, *, tail: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        """See ``Instance.logs``."""
        params = {
            "stdout": "1",
            "stderr": "1",
            "follow": str(int(follow)),
            "tail": "all" if tail is None else str(tail),
        }
        kept: deque[bytes] = deque(maxlen=TAIL_LIMIT if tail is None else tail)
        with contextlib.suppress(Refused), self._engine.refusals("read the container's log", passing=(404, 409)):
            async with self._engine.request("GET", f"containers/{self.container}/logs", params) as answer:
                async for line in _lines(answer.content):
                    if follow:
                        yield line
                    else:
                        kept.append(line)
        for line in kept:
            yield line

    async def exec(self, argv: tuple[str, ...], *, timeout: float = 30.0) -> ExecResult:
        """See ``Instance.exec``."""
        if self._ended.done():
            raise EngineFailed(f"'{self._spec.model}' does not run", hint=f"Start it: `pier run {self._spec.model}`.")
        output = {1: bytearray(), 2: bytearray()}
        with self._engine.refusals("run a command in the container"):
            job: Any = await self._container.exec(list(argv), stdin=False, tty=False)
            async with asyncio.timeout(timeout), job.start(detach=False) as stream:
                while message := await stream.read_out():
                    part = output[message.stream]
                    part += message.data[: OUTPUT_LIMIT - len(part)]
            shown: dict[str, Any] = await job.inspect()
        return ExecResult(int(shown.get("ExitCode") or 0), bytes(output[1]), bytes(output[2]))

    async def attach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """See ``Instance.attach``; what the program said since its start comes first."""
        if not self._spec.stdio:
            raise UsageError("this instance was started without stdio", hint="Set stdio in its launch spec.")
        outer = await asyncio.open_unix_connection(self._engine.path)
        path = f"/v{self._engine.api}/containers/{self.container}/attach?stream=1&logs=1&stdin=1&stdout=1"
        upgrade = "Host: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
        outer[1].write(f"POST {path} HTTP/1.1\r\n{upgrade}".encode())
        answer = await outer[0].readuntil(b"\r\n\r\n")
        if answer.split(b" ", 2)[1] not in (b"101", b"200"):
            outer[1].close()
            raise EngineFailed(
                f"the container of '{self._spec.model}' cannot be attached to", hint="Does it still run? See `pier ps`."
            )
        ours, theirs = socket.socketpair()
        inner = await asyncio.open_connection(sock=theirs)
        self._pumps += [
            asyncio.ensure_future(_forward(inner[0], outer[1])),
            asyncio.ensure_future(_unwrap(outer[0], inner[1], outer[1])),
        ]
        return await asyncio.open_connection(sock=ours)


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Standard input, as it is, and its end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def _unwrap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: asyncio.StreamWriter) -> None:
    """Standard output out of its frames; a slow reader slows the container, not this memory."""
    try:
        with contextlib.suppress(OSError):
            async for stream, data in frames(reader):
                if stream == 1:
                    writer.write(data)
                    await writer.drain()
    finally:
        writer.close()
        source.close()


async def _lines(content: Any) -> AsyncIterator[bytes]:
    """Whole lines of a multiplexed log, each bounded; the two streams do not cut into each other's lines."""
    rest = {1: b"", 2: b""}
    async for stream, data in frames(content):
        *lines, last = (rest.get(stream, b"") + data).split(b"\n")
        for line in lines:
            yield line[:LINE_LIMIT] + b"\n"
        rest[stream] = last[:LINE_LIMIT]
    for last in rest.values():
        if last:
            yield last + b"\n"


def reading(raw: dict[str, Any]) -> Stats:
    """The Engine's figures (control groups v1 or v2, Docker's or Podman's) as ours."""
    memory: dict[str, Any] = raw.get("memory_stats") or {}
    detail: dict[str, int] = memory.get("stats") or {}
    cache = detail.get("total_inactive_file", detail.get("inactive_file", 0))
    blkio: dict[str, Any] = raw.get("blkio_stats") or {}
    usage: dict[str, Any] = raw.get("cpu_stats") or {}
    cpu: dict[str, Any] = usage.get("cpu_usage") or {}
    pids: dict[str, Any] = raw.get("pids_stats") or {}
    entries: list[dict[str, Any]] = blkio.get("io_service_bytes_recursive") or []

    def moved(op: str) -> int:
        return sum(int(e.get("value", 0)) for e in entries if str(e.get("op", "")).lower() == op)

    return Stats(
        memory=max(0, int(memory.get("usage", 0)) - cache),
        memory_limit=int(memory.get("limit", 0)),
        cpu_seconds=int(cpu.get("total_usage", 0)) / 1e9,
        pids=int(pids.get("current", 0)),
        read_bytes=moved("read"),
        written_bytes=moved("write"),
        at=time.time(),
        anonymous=detail.get("anon", detail.get("total_rss", detail.get("rss", 0))),
        mapped=detail.get("file_mapped", detail.get("total_mapped_file", detail.get("mapped_file", 0))),
    )


def _unix(text: Any) -> float:
    """Docker's time (nanoseconds and all) as Unix time; now when it says none."""
    try:
        head, _, tail = str(text).partition(".")
        zone = "+00:00" if tail.endswith("Z") or not tail else tail[-6:]
        found = datetime.fromisoformat(head.removesuffix("Z") + zone).timestamp()
    except ValueError:
        return time.time()
    return found if found > 0 else time.time()
