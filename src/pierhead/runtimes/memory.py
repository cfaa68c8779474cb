"""A runtime without processes, for tests: what it starts answers health requests from this very program."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pierhead.engines.base import LaunchSpec
from pierhead.errors import EngineFailed, UsageError
from pierhead.events import Listener
from pierhead.runtimes.base import Capabilities, ExecResult, Exit, Stats

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


class MemoryInstance:
    """A socket that answers every request with 200."""

    def __init__(self, spec: LaunchSpec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.lines = [b"up\n"]
        self._server: asyncio.Server | None = None
        self._ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    @property
    def socket(self) -> str:
        return str(self.folder / "s" / "engine.sock")

    @property
    def output(self) -> Path | None:
        return None

    async def open(self) -> None:
        Path(self.socket).parent.mkdir(parents=True, mode=0o700)
        self._server = await asyncio.start_unix_server(self._answer, self.socket)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)
            await writer.drain()
        writer.close()

    def end(self, exit: Exit) -> None:
        """End it as a crash would."""
        if self._server is not None:
            self._server.close()
        if not self._ended.done():
            self._ended.set_result(exit)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._ended)

    async def stop(self, timeout: float | None = None) -> Exit:
        self.end(Exit(143, signal.SIGTERM, at=time.time()))
        shutil.rmtree(self.folder, ignore_errors=True)
        return await self.wait()

    async def stats(self) -> Stats:
        return Stats(at=time.time()) if self._ended.done() else Stats(memory=1, pids=1, at=time.time())

    async def logs(self, *, tail: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        for line in self.lines[-tail:] if tail else self.lines:
            yield line
        if follow:
            await self.wait()

    async def exec(self, argv: tuple[str, ...], *, timeout: float = 30.0) -> ExecResult:
        if self._ended.done():
            raise EngineFailed(f"'{self.spec.model}' does not run")
        return ExecResult(0, b"", b"")

    async def attach(self) -> tuple[Any, Any]:
        raise UsageError("this instance was started without stdio")


class MemoryRuntime:
    """Keeps its instances in a table."""

    def __init__(self, replicas_dir: Path) -> None:
        self._root = replicas_dir
        self.instances: dict[str, MemoryInstance] = {}

    async def capabilities(self, spec: LaunchSpec | None = None) -> Capabilities:
        return Capabilities(name="memory", available=True)

    async def prepare(self, spec: LaunchSpec, listener: Listener) -> LaunchSpec:
        return spec

    async def start(self, spec: LaunchSpec) -> MemoryInstance:
        instance = MemoryInstance(spec, self._root / spec.replica)
        await instance.open()
        self.instances[spec.replica] = instance
        return instance

    async def list(self) -> list[str]:
        return sorted(name for name, i in self.instances.items() if i.folder.exists())

    async def adopt(self, replica: str) -> MemoryInstance | None:
        return self.instances[replica] if replica in await self.list() else None
