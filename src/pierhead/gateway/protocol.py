"""One client connection: requests in, answers out in order, with bounds on size; chooses no engine."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from pierhead.gateway.admission import Admitted
from pierhead.gateway.answering import BODY, BUSY, CONTINUE, HEAD, LINGER, Answering
from pierhead.gateway.faults import Fault
from pierhead.gateway.incoming import Incoming
from pierhead.gateway.local import LocalAnswer
from pierhead.gateway.relay import Relay
from pierhead.gateway.remembered import Remembered
from pierhead.gateway.services import BUFFERED_MAX
from pierhead.gateway.skeleton import INLINE, Skeleton
from pierhead.gateway.upload import MOST, Upload
from pierhead.gateway.vetting import Vetting
from pierhead.gateway.wire import HEAD_END, BadMessage, parse_request

_BACKLOG: Final = 65536  # bytes of pipelined requests kept while one is answered
_SKIP_BODY: Final = 262144  # a refused request's body up to this size is read, to keep the connection
_HIGH_WATER = 262144


def _host(transport: asyncio.BaseTransport, end: str) -> str:
    """The address of one end; "" when the client reset the connection before anyone looked."""
    address = transport.get_extra_info(end)
    return str(address[0]) if address else ""


class ClientConnection(Answering):
    """The half of a connection that reads; see ``Answering`` for the other. A protocol of asyncio by its methods."""

    __slots__ = ()

    # --- the transport --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        services = self._services
        self._since = services.now
        if self._door.tcp:
            self._local_ip = _host(transport, "sockname")
            self.peer = _host(transport, "peername")
        else:
            self.peer = "unix"
        services.connections.add(self)
        services.metrics.accepted += 1
        services.metrics.open += 1
        if len(services.connections) > services.settings.max_connections:
            services.metrics.refused += 1
            self._refuse(Fault(503, "too_many_connections", "too many connections are open."))

    def connection_lost(self, exc: Exception | None) -> None:
        services = self._services
        services.connections.discard(self)
        if services.draining and not services.connections:
            services.emptied()
        services.metrics.open -= 1
        self._state = LINGER
        self._uncharge()
        self._buffer = b""
        self._incoming = None
        work, self._work = self._work, None
        if work is not None:
            work.cancel()

    def eof_received(self) -> bool:
        self._eof = True
        if self._door.tls:
            return False  # TLS connections end as a whole
        if self._state == BUSY:
            # Half-closed, or gone? A client that only finished sending still reads. See ``_check_alive``.
            asyncio.get_running_loop().call_soon(self._check_alive)
            asyncio.get_running_loop().call_later(0.1, self._check_alive)
            return True
        if self._state == HEAD and self._buffer and self.writing_paused:
            return True
        self._transport.close()
        return True

    def pause_writing(self) -> None:
        self.writing_paused = True
        self._paused_at = self._services.now
        if self._work is not None:
            self._work.pause()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._work is not None:
            self._work.resume()
        elif self._state != LINGER:
            self._pump()

    def data_received(self, data: bytes) -> None:
        if self._state == LINGER:
            return
        if self._buffer:
            self._buffer += data
        else:
            if self._state == HEAD:
                if data[0] <= 13 and not (data := data.lstrip(b"\r\n")):
                    return  # empty lines between requests are allowed (RFC 9112, 2.2), and no sign of life
                self._since = self._services.now
            self._buffer = data
        if self._state == BUSY or self.writing_paused:
            if len(self._buffer) > _BACKLOG and not self._reading_paused:
                self._reading_paused = True
                self._transport.pause_reading()
            return
        self._pump()

    # --- requests -------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Work through the buffer until it is empty or an answer is under way."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._buffer and self._state < BUSY and not self.writing_paused:
                if not (self._take_head() if self._state == HEAD else self._take_body()):
                    break
        except BadMessage as exc:
            codes = {413: "body_too_large", 414: "url_too_long", 431: "headers_too_large"}
            self._refuse(Fault(exc.status, codes.get(exc.status, "bad_request"), f"{exc.reason}."))
        finally:
            self._pumping = False
        if self._state >= BUSY:
            return
        if self._reading_paused and len(self._buffer) <= (0 if self._state == BODY else _BACKLOG):
            self._reading_paused = False
            self._transport.resume_reading()
        if self._eof and not self.writing_paused:
            self._transport.close()

    def _take_head(self) -> bool:
        data = self._buffer
        if data[0] in b"\r\n":
            data = self._buffer = data.lstrip(b"\r\n")
        cut = data.find(HEAD_END)
        if cut < 0 or cut > self._services.settings.max_header:
            self._check_partial(data)
            return False
        raw = data[: cut + 4]
        self._buffer = data[cut + 4 :]
        if raw == self._memo_raw and self._generation == self._services.generation:
            request = self._memo
            assert request is not None
        else:
            request = self._admit(raw)
        if request.unvetted:
            self._vet(raw, request.unvetted)
            return False
        self._request = request
        self._close_after = not request.keep_alive
        if request.length or request.chunked:
            return self._expect_body(request)
        self._dispatch(request, [], None)
        return True

    def _vet(self, raw: bytes, token: bytes) -> None:
        """Verify a token first; the head is read again then."""
        tokens = self._services.doorkeeper.tokens
        assert tokens is not None
        self._buffer = raw + self._buffer
        self._memo_raw = b""
        self._state = BUSY
        self._work = Vetting(self, tokens, token)

    def vetted(self) -> None:
        """The token of the request at hand is known now, for good or ill."""
        self._work = None
        self._since = self._services.now
        self._state = HEAD
        self._pump()

    def _check_partial(self, data: bytes) -> None:
        """A head that is not whole yet: refuse what can no longer become one."""
        settings = self._services.settings
        line = data.find(b"\n")
        if data[:1] == b"\x16":
            raise BadMessage("this port speaks plain HTTP, not TLS")
        if line == 0 or (line > 0 and data[line - 1] != 0x0D):
            raise BadMessage("lines must end in CRLF")
        if (line if line >= 0 else len(data)) > settings.max_url + 32:
            raise BadMessage(f"the URL is longer than {settings.max_url} bytes", 414)
        if len(data) > settings.max_header:
            raise BadMessage(f"the headers are longer than {settings.max_header} bytes", 431)

    def _admit(self, raw: bytes) -> Admitted:
        head = parse_request(raw)
        limit = self._services.settings.max_url
        if len(head.target) > limit:
            raise BadMessage(f"the URL is longer than {limit} bytes", 414)
        request = self._services.doorkeeper.admit(head, self._door, self._local_ip)
        # Clients repeat their head on a kept connection; comparing it costs less than parsing it again.
        self._memo_raw, self._memo, self._generation = raw, request, self._services.generation
        return request

    def _expect_body(self, request: Admitted) -> bool:
        length = request.length or 0
        if request.fault is not None and (request.chunked or length > _SKIP_BODY or request.expect):
            self._refuse(request.fault)
            return False
        if not request.chunked and length <= INLINE and length <= len(self._buffer):  # the usual case: it is all here
            body, self._buffer = [self._buffer[:length]], self._buffer[length:]
            self._dispatch(request, body, None)
            return True
        pours = request.pours and request.control
        if pours:
            self._work = self._upload = Upload(self._services, self, request, request.request_id or self._new_id())
            self._upload.start()
        else:
            self._charge(length)
        self._state = BODY
        self._since = self._services.now
        settings = self._services.settings
        self._incoming = Incoming(
            None if request.chunked else length,
            limit=MOST if pours else settings.max_body,
            max_trailer=settings.max_header,
            skeleton=(length > INLINE or request.chunked) and request.reads_json,
        )
        if request.expect and not self._buffer:
            self._transport.write(CONTINUE)
        return True

    def _charge(self, size: int) -> None:
        services = self._services
        if services.buffered + size > BUFFERED_MAX:
            raise BadMessage("the gateway holds too many request bodies now", 503)
        services.buffered += size
        self._charged += size

    def _take_body(self) -> bool:
        incoming, request = self._incoming, self._request
        assert incoming is not None
        assert request is not None
        before = incoming.size
        self._buffer = incoming.feed(self._buffer)
        if self._upload is not None:
            self._poured(self._upload, incoming)
            if incoming.paused and not incoming.done:
                self._wait_a_turn()
                return False
            return True
        if request.chunked:
            self._charge(incoming.size - before)
        if incoming.done:
            self._incoming = None
            self._dispatch(request, incoming.pieces, incoming.skeleton)
        elif incoming.paused:
            self._wait_a_turn()
            return False
        return True

    def _wait_a_turn(self) -> None:
        """Go on with the buffer after others had their turn, and take in nothing more until it is done."""
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._pump)

    def _poured(self, upload: Upload, incoming: Incoming) -> None:
        """Hand on what came of a body that nobody collects."""
        pieces, incoming.pieces = incoming.pieces, []
        upload.take(pieces)
        if incoming.done:
            self._incoming = self._upload = None
            self._state = BUSY
            upload.finish()

    def _new_id(self) -> bytes:
        return self._services.new_id()

    def _dispatch(self, request: Admitted, body: list[bytes], skeleton: Skeleton | None) -> None:
        request_id = request.request_id or self._services.new_id()
        self._state = BUSY
        self.extra = b""
        if request.fault is not None:
            self.send_fault(request.fault, request_id)
            self.relay_done()
        elif request.local:
            self._work = LocalAnswer(self, request_id)
            self._work.start(self._locals.answer(request, body, lambda: self.ends))
        else:
            if skeleton is None and len(body) > 1:
                body = [b"".join(body)]
            recorder = self._services.recorder
            client = self if recorder is None else recorder.client(self, request, body)
            cached = request.holder is not None and request.holder.grants.cache and not request.control
            relay = (Remembered if cached else Relay)(self._services, client, request, body, request_id)
            self._work = relay
            relay.start(skeleton.result() if skeleton is not None else None)
