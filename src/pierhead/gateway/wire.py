"""HTTP/1.1 message framing: heads through httptools, chunked bodies by a strict decoder; knows no sockets."""

from __future__ import annotations

from typing import NamedTuple

import httptools

HEAD_END = b"\r\n\r\n"
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
Headers = list[tuple[bytes, bytes]]


class BadMessage(Exception):
    """Bytes that are not one well-formed HTTP message; ``status`` is what a client hears for it."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class Head(NamedTuple):
    """A parsed head; header names are lower case, ``dropped`` are the names that ``Connection`` lists."""

    method: str
    target: bytes
    status: int
    http10: bool
    headers: Headers
    length: int | None
    chunked: bool
    keep_alive: bool
    dropped: frozenset[bytes]

    def get(self, name: bytes) -> bytes | None:
        """The first value of ``name`` (lower case)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class _Collector:
    """The callbacks httptools wants."""

    __slots__ = ("headers", "status", "target")

    def __init__(self) -> None:
        self.target = b""
        self.status = b""
        self.headers: Headers = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


def _framing(headers: Headers) -> tuple[int | None, bool, bool, bool, frozenset[bytes]]:
    """Length, chunked, and the Connection header's close, keep-alive and other names; BadMessage for ambiguity."""
    length: int | None = None
    chunked = close = keep = False
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"content-length":
            if length is not None or not value.isdigit() or len(value) > 15:
                raise BadMessage("Content-Length must be given once, as a plain number")
            length = int(value)
        elif name == b"transfer-encoding":
            if chunked or value.strip().lower() != b"chunked":
                raise BadMessage("the only Transfer-Encoding understood is 'chunked'", 501)
            chunked = True
        elif name == b"connection":
            tokens = {token.strip().lower() for token in value.split(b",")}
            close = close or b"close" in tokens
            keep = keep or b"keep-alive" in tokens
            named |= tokens
    if chunked and length is not None:
        raise BadMessage("Content-Length and Transfer-Encoding exclude each other")
    return length, chunked, close, keep, frozenset(named - {b"close", b"keep-alive", b""})


def parse_request(raw: bytes) -> Head:
    """Parse one request head that ends in an empty line; BadMessage when it breaks a rule of RFC 9112."""
    if b"\n " in raw or b"\n\t" in raw:
        raise BadMessage("folded header lines are obsolete and refused")
    if raw.count(b" ", 0, raw.find(b"\r")) != 2:
        raise BadMessage("the request line must be 'METHOD TARGET HTTP/1.1', with single spaces")
    collector = _Collector()
    parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # an upgrade may be ignored (RFC 9110, 7.8), and is
    except httptools.HttpParserError as exc:
        raise BadMessage(f"the request is not HTTP/1.1: {exc}") from exc
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise BadMessage("HTTP/1.1 and HTTP/1.0 are spoken here", 505)
    target = collector.target
    if target[:1] != b"/" and not (target == b"*" and parser.get_method() == b"OPTIONS"):
        raise BadMessage("the request target must be a path that begins with '/'")
    length, chunked, close, keep, named = _framing(collector.headers)
    http10 = version == "1.0"
    hosts = sum(1 for name, _ in collector.headers if name == b"host")
    if hosts > 1 or (not hosts and not http10):
        raise BadMessage("exactly one Host header is needed")
    if chunked and http10:
        raise BadMessage("HTTP/1.0 has no Transfer-Encoding")
    return Head(
        parser.get_method().decode("ascii"),
        target,
        0,
        http10,
        collector.headers,
        length,
        chunked,
        not close and (keep or not http10),
        named,
    )


def parse_response(raw: bytes) -> Head:
    """Parse one response head that ends in an empty line; BadMessage when an engine answers nonsense."""
    collector = _Collector()
    parser = httptools.HttpResponseParser(collector)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as exc:
        raise BadMessage(f"not an HTTP/1.1 response: {exc}") from exc
    length, chunked, close, keep, named = _framing(collector.headers)
    http10 = parser.get_http_version() == "1.0"
    return Head(
        "",
        b"",
        parser.get_status_code(),
        http10,
        collector.headers,
        length,
        chunked,
        not close and (keep or not http10),
        named,
    )


class ChunkedDecoder:
    """Strict chunked decoding: CRLF only, bounded lines and trailers; extensions and trailers are dropped.

    With ``lines`` it reads so many lines at a time: then ``paused`` is set and ``rest`` is to be fed again.
    """

    __slots__ = ("_left", "_line", "_lines", "_state", "_trailer", "done", "max_trailer", "paused", "rest")

    def __init__(self, max_trailer: int = 16384, lines: int = 1 << 60) -> None:
        self._lines = lines
        self._state = 0  # 0 size line, 1 data, 2 CRLF after data, 3 trailers
        self._left = 0
        self._line = b""
        self._trailer = 0
        self.max_trailer = max_trailer
        self.done = False
        self.paused = False
        self.rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The decoded pieces of ``data``; after the last chunk ``done`` is set and ``rest`` is what follows."""
        out: list[bytes] = []
        pos, end, lines = 0, len(data), self._lines
        while pos < end and not self.done and lines > 0:
            if self._state == 1:
                piece = data[pos : pos + self._left]
                out.append(piece)
                pos += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = 2
                continue
            cut = data.find(b"\n", pos)
            line = self._line + (data[pos:] if cut < 0 else data[pos : cut + 1])
            if len(line) > (self.max_trailer if self._state == 3 else 1024):
                raise BadMessage("a chunk line or trailer is too long", 431)
            if cut < 0:
                self._line = line
                break
            self._line = b""
            pos = cut + 1
            lines -= 1
            self._take_line(line)
        self.paused = not self.done and lines <= 0
        self.rest = data[pos:] if self.done or self.paused else b""
        return out

    def _take_line(self, line: bytes) -> None:
        if line[-2:] != b"\r\n" or b"\r" in line[:-2]:
            raise BadMessage("chunk lines must end in CRLF")
        if self._state == 0:
            size = line[:-2].partition(b";")[0].rstrip(b" \t")
            if not size or len(size) > 12 or size.strip(b"0123456789abcdefABCDEF"):
                raise BadMessage("a chunk size is not a hexadecimal number")
            self._left = int(size, 16)
            self._state = 1 if self._left else 3
        elif self._state == 2:
            if line != b"\r\n":
                raise BadMessage("a chunk is longer than its size says")
            self._state = 0
        else:
            self._trailer += len(line)
            if self._trailer > self.max_trailer:
                raise BadMessage("the trailers are too long", 431)
            if line == b"\r\n":
                self.done = True
            elif line[:1] in b" \t" or b":" not in line:
                raise BadMessage("a trailer is not a header line")
