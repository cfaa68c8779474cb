"""What one client connection answers and how long it waits: heads, faults, ends, deadlines; reads no request."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol, cast

from pierhead.gateway.admission import Admitted, Door
from pierhead.gateway.booking import Booked
from pierhead.gateway.faults import REASONS, Fault
from pierhead.gateway.incoming import Incoming
from pierhead.gateway.liveness import peer_state
from pierhead.gateway.local import Locals
from pierhead.gateway.services import Services
from pierhead.gateway.upload import Upload

HEAD: Final = 0
BODY: Final = 1
BUSY: Final = 2
LINGER: Final = 3
_LINGER_SECONDS: Final = 2.0
_DRAIN_IDLE: Final = 1.0  # a connection just accepted may have its request under way: a drain does not cut it
_NOWHERE = ("::", 0)  # the ends of a connection that was reset before anyone looked
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Work(Protocol):
    """What answers the current request."""

    started: float
    status: int

    def cancel(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def expire(self, fault: Fault) -> None: ...
    def probe(self) -> None: ...


class Answering:
    """The half of a connection that answers; ``door`` says what its listener demands."""

    __slots__ = (
        "_buffer",
        "_charged",
        "_close_after",
        "_door",
        "_eof",
        "_generation",
        "_incoming",
        "_local_ip",
        "_locals",
        "_memo",
        "_memo_raw",
        "_paused_at",
        "_pumping",
        "_reading_paused",
        "_request",
        "_services",
        "_since",
        "_state",
        "_transport",
        "_upload",
        "_work",
        "extra",
        "peer",
        "writing_paused",
    )

    def __init__(self, services: Services, locals_: Locals, door: Door) -> None:
        self._services = services
        self._locals = locals_
        self._door = door
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._state = HEAD
        self._buffer = b""
        self._incoming: Incoming | None = None
        self._charged = 0
        self._request: Admitted | None = None
        self._memo_raw = b""
        self._memo: Admitted | None = None
        self._generation = -1
        self._work: Work | None = None
        self._upload: Upload | None = None
        self._close_after = False
        self._eof = False
        self._pumping = False
        self._reading_paused = False
        self._since = 0.0
        self._paused_at = 0.0
        self._local_ip = ""
        self.writing_paused = False
        self.extra = b""  # header lines that the current answer gets
        self.peer = ""

    def _pump(self) -> None:
        """Work through what the client has sent."""
        raise NotImplementedError

    def _uncharge(self) -> None:
        """The bodies that were held for this connection are gone."""
        self._services.buffered -= self._charged
        self._charged = 0

    # --- answers --------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes of the current answer."""
        self._transport.write(data)

    def connection_line(self) -> bytes:
        """The headers of an answer that depend on this connection."""
        request = self._request
        if self._services.draining:
            self._close_after = True
        if request is None:
            return b"connection: close\r\n"
        if self._close_after:
            return b"connection: close\r\n" + request.cors + self.extra
        own = request.cors + self.extra
        return b"connection: keep-alive\r\n" + own if request.http10 else own

    @property
    def ends(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Our address and port, and the client's; of a TCP connection only."""
        own: Any = self._transport.get_extra_info("sockname") or _NOWHERE
        other: Any = self._transport.get_extra_info("peername") or _NOWHERE
        return (str(own[0]), int(own[1])), (str(other[0]), int(other[1]))

    def hold(self) -> None:
        """Read no more of a body for now."""
        self._transport.pause_reading()

    def go_on(self) -> None:
        """Read on."""
        if not self._reading_paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def finish_early(self, *, whole: bool) -> None:
        """The answer to a body that is still arriving is there: what comes of it is not read, and no other request."""
        if not whole:
            self._upload = self._incoming = None
            self._state = BUSY
            self._close_after = True

    @property
    def closes(self) -> bool:
        """Whether the end of this answer is the end of the connection."""
        return self._close_after

    def close_after(self) -> None:
        """This answer is the last one here."""
        self._close_after = True

    def send_fault(self, fault: Fault, request_id: bytes) -> None:
        """An error envelope as the whole answer."""
        request = self._request
        dialect = request.dialect if request is not None else "openai"
        body = fault.body(dialect, request_id)
        headers = (*fault.headers, (b"request-id", request_id)) if dialect == "anthropic" else fault.headers
        self.send_local(fault.status_in(dialect), b"application/json", body, request_id, headers)

    def send_local(
        self,
        status: int,
        kind: bytes,
        body: bytes,
        request_id: bytes,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """A whole answer of the gateway's own."""
        request = self._request
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, REASONS.get(status, b"Unknown"))]
        if status != 204:
            lines.append(b"content-type: %b\r\ncontent-length: %d\r\n" % (kind, len(body)))
        lines += [b"%b: %b\r\n" % header for header in headers]
        lines.append(b"x-request-id: %b\r\n%b\r\n" % (request_id, self.connection_line()))
        if request is None or request.method != "HEAD":
            lines.append(body)
        self._transport.write(b"".join(lines))
        booked = isinstance(self._work, Booked)  # then it has its line in the log already
        self._services.log_local(self, request, status, request_id, logged=booked)

    def relay_done(self) -> None:
        """The current answer is complete: on to the next request."""
        self._work = None
        if self._state != BUSY:
            return
        self._uncharge()
        self._since = self._services.now
        if self._close_after or (self._services.draining and not self._buffer):
            self._end()
            return
        self._state = HEAD
        if (self._buffer or self._eof or self._reading_paused) and not self._pumping:
            self._pump()

    def _refuse(self, fault: Fault) -> None:
        """Answer a request that was not read whole, then close."""
        work, self._work, self._upload = self._work, None, None
        if work is not None:
            work.cancel()
        self._close_after = True
        if self._state != BODY:
            self._request = None
        self._incoming = None
        self.send_fault(fault, self._services.new_id())
        self._end()

    def _end(self) -> None:
        """Close so that the answer arrives: our side first, then wait a little for the client's."""
        self._state = LINGER
        self._since = self._services.now
        self._buffer = b""
        if self._eof or self._door.tls:
            self._transport.close()  # TLS waits for the client's own end by itself
            return
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
        self._transport.write_eof()

    def abort(self) -> None:
        """Cut the connection, so that the client cannot take what it got for a whole answer; its work ends now."""
        work, self._work = self._work, None
        self._state = LINGER
        self._transport.abort()
        if work is not None:
            work.cancel()

    # --- time -----------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Apply the deadlines; called about twice a second."""
        if self.writing_paused and now - self._paused_at > self._services.settings.write_timeout:
            self._transport.abort()
        else:
            _SWEEPS[self._state](self, now, now - self._since)

    def _sweep_head(self, now: float, age: float) -> None:
        settings = self._services.settings
        if self._buffer and not self.writing_paused and age > settings.header_timeout:
            self._refuse(Fault(408, "header_timeout", "the request's headers took too long."))
        elif not self._buffer and age > (_DRAIN_IDLE if self._services.draining else settings.idle_timeout):
            self._transport.close()

    def _sweep_body(self, now: float, age: float) -> None:
        earned = self._incoming.allowance if self._incoming is not None else 0.0
        if age > self._services.settings.body_timeout + earned:
            self._refuse(Fault(408, "body_timeout", "the request's body took too long."))

    def _sweep_busy(self, now: float, age: float) -> None:
        if self._work is None:
            return
        limit = self._services.settings.request_timeout
        if self._request is not None and self._request.timeout:
            limit = min(limit, self._request.timeout)
        if now - self._work.started > limit:
            theirs = limit < self._services.settings.request_timeout
            hint = "The header x-request-timeout said so." if theirs else "See request_timeout in [gateway]."
            self._work.expire(Fault(504, "timeout", f"the answer took longer than {limit:g} s.", hint=hint))
        elif self._eof or self._reading_paused:
            self._check_alive()

    def _sweep_linger(self, now: float, age: float) -> None:
        unsent = self._transport.get_write_buffer_size()
        if age > (self._services.settings.write_timeout if unsent else _LINGER_SECONDS):
            self._transport.abort()

    def _check_alive(self) -> None:
        """Abort when the client is gone; where only that can tell, send what it may ignore. See ``liveness``."""
        if self._state != BUSY or self._work is None or self._transport.is_closing():
            return
        state = peer_state(self._transport)
        if state == "gone":
            self._transport.abort()
        elif state == "unsure":
            if self._work.status:
                self._work.probe()
            elif self._request is not None and not self._request.http10:
                self._transport.write(CONTINUE)


_SWEEPS = (
    Answering._sweep_head,  # pyright: ignore[reportPrivateUsage]
    Answering._sweep_body,  # pyright: ignore[reportPrivateUsage]
    Answering._sweep_busy,  # pyright: ignore[reportPrivateUsage]
    Answering._sweep_linger,  # pyright: ignore[reportPrivateUsage]
)
