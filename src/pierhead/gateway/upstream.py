"""Connections to one engine's unix socket, or to a provider: the pool, the framing and its watchful reading."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast

from pierhead.gateway import passthrough
from pierhead.gateway.faults import REASONS
from pierhead.gateway.link import Endpoint
from pierhead.gateway.remote import Outside, answer_header, answer_status
from pierhead.gateway.wire import HEAD_END, HOP_BY_HOP, BadMessage, ChunkedDecoder, Head, parse_response
from pierhead.routing.health import Health
from pierhead.sockets import open_unix, tcp_address

if TYPE_CHECKING:
    from pierhead.gateway.lanes import Lane

WHOLE: Final = 65536  # a body up to this size is handed over in one piece
_MAX_HEAD: Final = 65536
_MAX_INTERIM: Final = 16
_IDLE_MAX: Final = 512
_IDLE_POLITE: Final = 2  # for servers that spend a thread on an idle connection (they send Keep-Alive)
_IDLE_SECONDS: Final = 30.0
_DROPPED = HOP_BY_HOP | {b"content-length", b"x-request-id", b"server", b"date"}


class Answer(NamedTuple):
    """A response head, parsed, and the bytes that open the client's copy of it (no framing, no end)."""

    head: Head
    prefix: bytes
    sse: bool
    idle_seconds: float
    polite: bool


class Receiver(Protocol):
    """Who gets a response; exactly one of ``on_whole``, ``on_end`` and ``on_lost`` comes last."""

    def on_whole(self, answer: Answer, body: bytes) -> None: ...
    def on_head(self, answer: Answer) -> None: ...
    def on_piece(self, piece: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_lost(self, reason: str, pristine: bool) -> None: ...


def _answer(raw: bytes, outside: bool) -> Answer:
    head = parse_response(raw)
    if outside:
        answer_status(head.status)
    lines = [b"HTTP/1.1 %d %s\r\n" % (head.status, REASONS.get(head.status, b"Unknown"))]
    idle, polite, sse = _IDLE_SECONDS, False, False
    for name, value in head.headers:
        if name == b"keep-alive":
            polite = True
            _, _, text = value.partition(b"timeout=")
            digits = text.partition(b",")[0].strip()
            idle = min(idle, int(digits) / 2 if digits.isdigit() and len(digits) < 8 else 2.0)
        if name == b"content-type":
            sse = value.lower().startswith(b"text/event-stream")
        elif name == b"content-encoding" and value.lower() != b"identity":
            sse = False
        if outside and not answer_header(name, value):
            continue
        if name not in _DROPPED and name not in head.dropped and not name.startswith(b"access-control-"):
            lines.append(name + b": " + value + b"\r\n")
    return Answer(head, b"".join(lines), sse, idle, polite)


class Target:
    """One engine: its socket, its idle connections and what it did since the last report."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.replica = endpoint.replica
        self.path = endpoint.socket
        self.call_prefix = endpoint.call_prefix
        self.serves = frozenset(endpoint.serves)
        self.slots = endpoint.slots
        self.context = endpoint.context
        self.model = endpoint.model
        self.wanted = passthrough.Wanted.of(endpoint.front) if endpoint.front else passthrough.NOTHING
        self.revision = endpoint.revision
        self.busy = 0  # slots in use
        self.lanes: set[Lane] = set()
        self.health = Health()
        self.who = f"the provider '{endpoint.remote.provider}'" if endpoint.remote is not None else "the engine"
        self.outside = Outside(endpoint.remote) if endpoint.remote is not None else None
        self.next_probe = 0.0
        self.open = 0
        self.finished = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.last_used = 0.0
        self.changed = False
        self.gone = False
        self.connected = 0
        self._idle: deque[UpstreamConnection] = deque()

    def take(self) -> UpstreamConnection | None:
        """An idle connection, the one used last first."""
        while self._idle:
            conn = self._idle.pop()
            if not conn.closing:
                return conn
        return None

    async def connect(self, timeout: float = 10.0) -> UpstreamConnection:
        """A new connection; OSError when the engine does not listen, BlockingIOError when it stays too busy.

        Fault when a provider cannot be reached.
        """
        if self.outside is not None:
            return await self.outside.connect(self._connection)
        loop = asyncio.get_running_loop()
        place = tcp_address(self.path)
        if place is not None:
            async with asyncio.timeout(timeout):
                return (await loop.create_connection(self._connection, *place))[1]
        give_up = loop.time() + timeout
        wait = 0.002
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                with open_unix(self.path) as address:
                    sock.connect(address)
                break
            except BlockingIOError:
                # The listen queue is full, and a unix socket tells no one when it empties again.
                sock.close()
                if loop.time() + wait > give_up:
                    raise
                await asyncio.sleep(wait)
                wait = min(wait * 2, 0.1)
            except BaseException:
                sock.close()
                raise
        _, conn = await loop.create_unix_connection(self._connection, sock=sock)
        return conn

    def _connection(self) -> Any:  # event loops ask for a subclass of their protocol, by its type only
        return UpstreamConnection(self)

    def give_back(self, conn: UpstreamConnection, answer: Answer) -> None:
        """Keep ``conn`` for the next request, or close it when there are enough."""
        if self.gone or len(self._idle) >= (_IDLE_POLITE if answer.polite else _IDLE_MAX):
            conn.close()
            return
        conn.expires = time.monotonic() + answer.idle_seconds
        self._idle.append(conn)

    def sweep(self, now: float) -> None:
        """Close what was idle for too long."""
        while self._idle and (self._idle[0].expires < now or self._idle[0].closing):
            self._idle.popleft().close()

    def retire(self) -> None:
        """The route is gone: keep nothing idle."""
        self.gone = True
        while self._idle:
            self._idle.pop().close()

    def forget(self, conn: UpstreamConnection) -> None:
        """``conn`` was lost."""
        if conn in self._idle:
            self._idle.remove(conn)


class UpstreamConnection:
    """One connection to an engine; carries one request at a time. A protocol of asyncio by its methods."""

    __slots__ = (
        "_answer",
        "_buffer",
        "_decoder",
        "_head_only",
        "_interim",
        "_left",
        "_memo",
        "_memo_raw",
        "_paused",
        "_receiver",
        "_state",
        "_transport",
        "_whole",
        "closing",
        "expires",
        "target",
    )

    def __init__(self, target: Target) -> None:
        self.target = target
        self.closing = False
        self.expires = 0.0
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._receiver: Receiver | None = None
        self._state = "head"
        self._buffer = b""
        self._left = 0
        self._interim = 0
        self._whole: list[bytes] | None = None
        self._decoder = ChunkedDecoder()
        self._answer: Answer | None = None
        self._head_only = False
        self._memo_raw = b""
        self._memo: Answer | None = None
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=1 << 20)
        self.target.connected += 1

    def eof_received(self) -> None:
        """The other end is closed: so is this one."""

    def pause_writing(self) -> None:
        """What waits to be sent is one request, which is in memory anyway."""

    def resume_writing(self) -> None:
        """See ``pause_writing``."""

    def begin(self, receiver: Receiver, head: bytes, body: Sequence[bytes], head_only: bool) -> None:
        """Send one request; the answer goes to ``receiver``."""
        self._receiver = receiver
        self._state = "head"
        self._answer = None
        self._interim = 0
        self._head_only = head_only
        if len(body) == 1 and len(body[0]) < WHOLE:
            self._transport.write(head + body[0])
            return
        self._transport.write(head)
        for piece in body:
            self._transport.write(piece)

    def pause(self) -> None:
        """Stop reading: the client is slow."""
        if not self.closing and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if not self.closing and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        """Drop the connection; its receiver hears nothing more."""
        self._receiver = None
        if not self.closing:
            self.closing = True
            self._transport.abort()

    def leave(self, receiver: Receiver) -> None:
        """Drop the connection unless it has been released meanwhile: by now another's request may be on it."""
        if self._receiver is receiver:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self.target.connected -= 1
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            self.target.forget(self)
        elif self._state == "eof" and exc is None:
            receiver.on_end()
        else:
            pristine = self._answer is None and not self._buffer and not self._interim
            receiver.on_lost(f"{self.target.who} closed the connection before its answer was complete", pristine)

    def data_received(self, data: bytes) -> None:
        asker = self._receiver
        if asker is None:
            self.close()  # bytes nobody asked for: never the start of an answer
            return
        try:
            if self._state == "head":
                self._take_head(data)
            else:
                self._take_body(data)
        except BadMessage as exc:
            self.close()
            asker.on_lost(f"{self.target.who} gave a malformed answer: {exc.reason}", False)
        except BaseException:  # a bug of ours: who asked must not wait for what never comes
            self.close()
            asker.on_lost("the gateway failed on the answer; this is a bug", False)
            raise

    def _take_head(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        while True:
            cut = data.find(HEAD_END)
            if cut < 0:
                if len(data) > _MAX_HEAD:
                    raise BadMessage("its head is too long")
                self._buffer = data
                return
            raw, data = data[: cut + 4], data[cut + 4 :]
            if raw == self._memo_raw and self._memo is not None:
                answer = self._memo
            else:
                answer = self._memo = _answer(raw, self.target.outside is not None)
                self._memo_raw = raw
            if answer.head.status >= 200:
                break
            self._interim += 1
            if answer.head.status == 101 or self._interim > _MAX_INTERIM:
                raise BadMessage("interim answers that nobody asked for")
        self._buffer = b""
        self._answer = answer
        self._start(answer, data)

    def _start(self, answer: Answer, rest: bytes) -> None:
        receiver = self._receiver
        assert receiver is not None
        head = answer.head
        if self._head_only or head.status in (204, 304) or (head.length == 0 and not rest):
            self._release(answer, not rest)
            receiver.on_whole(answer, b"")
            return
        if head.chunked:
            self._state = "chunked"
            self._decoder = ChunkedDecoder()
            receiver.on_head(answer)
        elif head.length is None:
            self._state = "eof"
            receiver.on_head(answer)
        elif head.length == len(rest) <= WHOLE:  # the usual case: all in one read
            self._release(answer, True)
            receiver.on_whole(answer, rest)
            return
        else:
            self._state = "length"
            self._left = head.length
            self._whole = [] if head.length <= WHOLE else None
            if self._whole is None:
                receiver.on_head(answer)
        if rest and self._receiver is not None:
            self._take_body(rest)

    def _take_body(self, data: bytes) -> None:
        receiver, answer = self._receiver, self._answer
        assert receiver is not None
        assert answer is not None
        if self._state == "chunked":
            pieces = self._decoder.feed(data)
            if pieces:
                receiver.on_piece(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            if self._decoder.done and self._receiver is not None:
                self._release(answer, not self._decoder.rest)
                receiver.on_end()
        elif self._state == "eof":
            receiver.on_piece(data)
        else:
            self._take_length(receiver, answer, data)

    def _take_length(self, receiver: Receiver, answer: Answer, data: bytes) -> None:
        clean = len(data) <= self._left
        data = data if clean else data[: self._left]
        self._left -= len(data)
        if self._whole is not None:
            self._whole.append(data)
        else:
            receiver.on_piece(data)
        if self._left or self._receiver is None:
            return
        self._release(answer, clean)
        if self._whole is not None:
            receiver.on_whole(answer, b"".join(self._whole))
            self._whole = None
        else:
            receiver.on_end()

    def _release(self, answer: Answer, clean: bool) -> None:
        """The answer is complete: back to the pool, unless something about it forbids reuse."""
        self._receiver = None
        self._state = "head"
        if clean and answer.head.keep_alive and not self._transport.get_write_buffer_size():
            self.resume()
            self.target.give_back(self, answer)
        else:
            self.close()
