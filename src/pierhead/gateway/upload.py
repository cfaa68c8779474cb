"""A long request body on its way to the daemon as it arrives, and the short answer; keeps about a megabyte of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from pierhead.gateway import peer
from pierhead.gateway.faults import Fault
from pierhead.gateway.wire import BadMessage, ChunkedDecoder, Head, parse_response
from pierhead.sockets import open_unix

if TYPE_CHECKING:
    from pierhead.gateway.admission import Admitted
    from pierhead.gateway.answering import Answering
    from pierhead.gateway.services import Services

MOST = 4 << 40  # bytes of one body: more than any model's file
_HIGH, _LOW = 1 << 20, 1 << 18
_ANSWER = 1 << 20
_CONNECT = 10.0


class Upload:
    """The ``Work`` of one such request; ``take`` and ``finish`` come from the connection while it reads."""

    def __init__(self, services: Services, client: Answering, request: Admitted, request_id: bytes) -> None:
        self._services = services
        self._client = client
        self._request = request
        self._id = request_id
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._whole = False
        self._held = False
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.started = time.monotonic()
        self.status = 0

    def start(self) -> None:
        """Begin to send."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._ran)

    def take(self, pieces: list[bytes]) -> None:
        """More of the body is there."""
        self._pieces.extend(pieces)
        self._size += sum(map(len, pieces))
        self._more.set()
        if self._size > _HIGH and not self._held:
            self._held = True
            self._client.hold()

    def finish(self) -> None:
        """The body is whole."""
        self._whole = True
        self._more.set()

    # --- the daemon -----------------------------------------------------------------------------------------------

    def _ran(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # a bug of ours: say so, leave nobody waiting
            asyncio.get_running_loop().call_exception_handler({"message": "an upload broke", "task": task})
            self._fail(Fault(500, "internal", "the gateway failed on this request; this is a bug."))

    async def _run(self) -> None:
        try:
            if self._request.own:
                await asyncio.to_thread(peer.may_change, *self._client.ends)
            status, kind, body = await self._exchange()
        except Fault as fault:
            self._fail(fault)
            return
        except (OSError, EOFError, BadMessage, asyncio.LimitOverrunError, TimeoutError):
            self._fail(self._services.no_daemon())
            return
        self._release()
        self.status = status
        self._client.finish_early(whole=self._whole)
        self._client.send_local(status, kind, body, self._id)
        self._client.relay_done()

    async def _exchange(self) -> tuple[int, bytes, bytes]:
        target = self._services.control()
        async with asyncio.timeout(_CONNECT):
            with open_unix(target.path) as address:
                reader, writer = await asyncio.open_unix_connection(address)
        answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        try:
            length = self._request.length
            framing = b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % length
            ending = b"x-request-id: %b\r\nconnection: close\r\n\r\n" % self._id
            writer.write(self._request.forward + framing + ending)
            await self._pour(writer, answer, chunked=length is None)
            head = parse_response(await answer)
            return head.status, head.get(b"content-type") or b"application/json", await _body(reader, head)
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            writer.transport.abort()

    async def _pour(self, writer: asyncio.StreamWriter, answer: asyncio.Task[bytes], *, chunked: bool) -> None:
        """Send the body until it is whole, or the daemon has answered already."""
        while not answer.done():
            if not self._pieces:
                if self._whole:
                    if chunked:
                        writer.write(b"0\r\n\r\n")
                    return
                self._more.clear()
                more = asyncio.create_task(self._more.wait())
                await asyncio.wait({more, answer}, return_when=asyncio.FIRST_COMPLETED)
                more.cancel()
                continue
            piece = self._pieces.popleft()
            self._size -= len(piece)
            if piece:
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            try:
                await writer.drain()
            except ConnectionError:
                return  # it has said why, or it is gone
            if self._held and self._size < _LOW:
                self._release()

    def _release(self) -> None:
        if self._held:
            self._held = False
            self._client.go_on()

    def _fail(self, fault: Fault) -> None:
        self._release()
        if self.status:  # a bug after the answer began: nobody knows what the client has of it
            self._client.abort()
            return
        self.status = fault.status
        self._client.finish_early(whole=self._whole)
        self._client.send_fault(fault, self._id)
        self._client.relay_done()

    # --- the client -----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """The client went away."""
        self._pieces.clear()
        if self._task is not None:
            self._task.cancel()

    def expire(self, fault: Fault) -> None:
        """It took too long."""
        self.cancel()
        self._fail(fault)

    def pause(self) -> None:
        """The answer is short."""

    def resume(self) -> None:
        """See ``pause``."""

    def probe(self) -> None:
        """See ``pause``."""


async def _body(reader: asyncio.StreamReader, head: Head) -> bytes:
    """The daemon's short answer."""
    if head.status in (204, 304):
        return b""
    if not head.chunked:
        length = head.length if head.length is not None else -1
        if length > _ANSWER:
            raise BadMessage("the answer is too long")
        return await reader.readexactly(length) if length >= 0 else await reader.read(_ANSWER)
    decoder, pieces = ChunkedDecoder(), list[bytes]()
    while not decoder.done and sum(map(len, pieces)) < _ANSWER:
        data = await reader.read(65536)
        if not data:
            raise EOFError
        pieces += decoder.feed(data)
    return b"".join(pieces)
