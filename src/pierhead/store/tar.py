"""Reading tar archives of strangers: regular files and folders only, every header bounded; writes no files.

Python's own ``tarfile`` reads extended headers of any size into memory and knows sparse files, links and devices; none
of that belongs in a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator
from typing import IO, NamedTuple, NoReturn, Protocol, cast

from pierhead.errors import CorruptData
from pierhead.store.layers import check_filepath

BLOCK = 512
CHUNK = 1 << 20
MAX_EXTENDED = 64 << 10  # bytes of one extended header
MAX_MEMBERS = 20_000
RATIO = 100  # how much larger than its compressed form an archive may be …
FREE = 64 << 20  # … beyond this much
_SIZE_LIMIT = 1 << 50


class Stream(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes: ...


class Member(NamedTuple):
    """A file (or a folder) of an archive; its data must be read before the next one is asked for."""

    path: str
    size: int
    is_folder: bool
    executable: bool


def refuse(message: str) -> NoReturn:
    """CorruptData about an archive."""
    raise CorruptData(f"an archive in the model cannot be unpacked: {message}", hint="Ask who packaged the model.")


class Archive:
    """The members of one archive, in order; a context for nothing: it owns no resources."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left = 0  # bytes of the current member that are not read yet
        self._padding = 0
        self._count = 0

    def __iter__(self) -> Iterator[Member]:
        path, size = "", -1  # what an extended header said about the next member
        while True:
            self._skip()
            head = self._exactly(BLOCK, at_end=True)
            if not head or not head.strip(b"\0"):
                return
            _check(head, first=not self._count)
            kind, stated = head[156:157], _number(head[124:136])
            self._count += 1
            if self._count > MAX_MEMBERS:
                refuse(f"it has more than {MAX_MEMBERS} members")
            if kind in b"xgLK":
                found = self._extended(kind, stated)
                path, size = found.path or path, found.size if found.size >= 0 else size
                continue
            member = _member(head, kind, path, stated if size < 0 else size)
            path, size = "", -1
            self._left = 0 if member.is_folder else member.size
            self._padding = -self._left % BLOCK
            yield member

    def data(self) -> Generator[bytes]:
        """The bytes of the current member."""
        while self._left:
            chunk = self._stream.read(min(CHUNK, self._left))
            if not chunk:
                refuse("it ends inside a member")
            self._left -= len(chunk)
            yield chunk

    def _skip(self) -> None:
        for _ in self.data():
            pass
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0

    def _extended(self, kind: bytes, size: int) -> _Extended:
        if size > MAX_EXTENDED:
            refuse(f"an extended header claims {size} bytes")
        raw = self._exactly(size + -size % BLOCK)[:size]
        if kind == b"L":
            return _Extended(_text(raw.split(b"\0")[0]), -1)
        return _Extended("", -1) if kind == b"K" else _records(raw, kind)

    def _exactly(self, count: int, *, at_end: bool = False) -> bytes:
        found = bytearray()
        while len(found) < count:
            chunk = self._stream.read(count - len(found))
            if not chunk:
                if at_end and not found:
                    return b""
                refuse("it ends too early")
            found += chunk
        return bytes(found)


class _Extended(NamedTuple):
    path: str
    size: int


def _records(raw: bytes, kind: bytes) -> _Extended:
    """The records of a PAX header: ``length key=value``."""
    path, size, at = "", -1, 0
    while at < len(raw) and raw[at : at + 1] != b"\0":
        space = raw.find(b" ", at, at + 8)
        length = int(raw[at:space]) if space > 0 and raw[at:space].isdigit() else 0
        record = raw[space + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if length < 5 or at + length > len(raw) or record[-1:] != b"\n" or not equals:
            refuse("an extended header is damaged")
        if key.startswith(b"GNU.sparse") or (kind == b"g" and key in (b"path", b"size", b"linkpath")):
            refuse(f"it uses {_text(key)[:40]}, which has no place in a model")
        if key == b"path":
            path = _text(value)
        elif key == b"size":
            size = int(value) if value.isdigit() and len(value) < 18 else refuse("a member has no size")
        at += length
    return _Extended(path, size)


def _member(head: bytes, kind: bytes, path: str, size: int) -> Member:
    if not path:
        path = _text(head[:100].split(b"\0")[0])
        prefix = _text(head[345:500].split(b"\0")[0]) if head[257:262] == b"ustar" and head[262:263] == b"\0" else ""
        path = f"{prefix}/{path}" if prefix else path
    plain = "/".join(part for part in path.split("/") if part != ".") if not path.startswith("/") else path
    plain = plain.rstrip("/") if kind == b"5" else plain
    if kind not in (b"0", b"\0", b"7", b"5"):
        what = {b"1": "a hard link", b"2": "a link", b"S": "a sparse file"}.get(kind, "neither a file nor a folder")
        refuse(f"{path[:100]!r} is {what}")
    if not 0 <= size <= _SIZE_LIMIT:
        refuse(f"{path[:100]!r} claims {size} bytes")
    if kind == b"5" and plain in ("", "."):
        return Member("", 0, True, False)
    if kind != b"5" and plain.endswith("/"):
        refuse(f"{path[:100]!r} is a file with the name of a folder")
    if "//" in plain:
        refuse(f"{path[:100]!r} has an empty part")
    return Member(check_filepath(plain), size, kind == b"5", bool(_number(head[100:108]) & 0o100))


def _check(head: bytes, *, first: bool) -> None:
    """The header's own sum: bytes that are no header are noticed."""
    total = sum(head) - sum(head[148:156]) + 8 * 32
    field = head[148:156].strip(b"\0 ")
    if first and not (field.isdigit() and _number(field) == total):
        refuse("it is no tar archive")
    if _number(head[148:156]) != total:
        refuse("a header is damaged")


def _number(field: bytes) -> int:
    """Octal digits, or the binary form that large numbers have."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.strip(b"\0 ")
    if not text:
        return 0
    if not all(0x30 <= c <= 0x37 for c in text):
        refuse("a header has a number that is none")
    return int(text, 8)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        refuse(f"a name is not UTF-8: {raw[:60]!r}")


# --- compression --------------------------------------------------------------------------------------------------


def opened(file: IO[bytes], packing: str, size: int) -> Stream:
    """The tar stream in a file that is packed as ``tar``, ``tar+gzip`` or ``tar+zstd``; ``size`` is the file's."""
    if packing == "tar":
        return file
    return _Bounded(_gunzip(file) if packing == "tar+gzip" else _unzstd(file), lambda: size)


def opened_stream(file: Stream) -> Stream:
    """The tar stream in what comes from a pipe or a file, decompressed where it is compressed."""
    source = _Counted(file)
    if source.head.startswith(b"\x1f\x8b"):
        return _Bounded(_gunzip(source), lambda: source.count)
    if source.head.startswith(b"\x28\xb5\x2f\xfd"):
        return _Bounded(_unzstd(source), lambda: source.count)
    if source.head.startswith((b"BZh", b"\xfd7zXZ")):
        refuse("it is compressed by bzip2 or xz; decompress it first")
    return source


class _Counted:
    """Bytes as they come, the first of them looked at beforehand; ``count`` were given out."""

    def __init__(self, file: Stream) -> None:
        self._file = file
        self.count = 0
        self.head = b""
        while len(self.head) < 6 and (more := file.read(6 - len(self.head))):
            self.head += more
        self._rest = self.head

    def read(self, size: int, /) -> bytes:
        if self._rest:
            found, self._rest = self._rest[:size], self._rest[size:]
        else:
            found = self._file.read(size)
        self.count += len(found)
        return found


class _Bounded:
    """Decompressed bytes, until they are more than so many compressed ones (``taken``) can honestly hold."""

    def __init__(self, chunks: Generator[bytes], taken: Callable[[], int]) -> None:
        self._chunks = chunks
        self._taken = taken
        self._given = 0
        self._buffer = b""

    def read(self, size: int, /) -> bytes:
        if not self._buffer:
            self._buffer = next(self._chunks, b"")
            self._given += len(self._buffer)
            if self._given > self._taken() * RATIO + FREE:
                refuse("it grows beyond all measure when it is decompressed")
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found


def _gunzip(file: Stream) -> Generator[bytes]:
    try:
        inflate = zlib.decompressobj(31)
        while data := file.read(CHUNK):
            while data:
                if inflate.eof:  # several streams, one after another
                    inflate = zlib.decompressobj(31)
                yield from _some(inflate.decompress(data, CHUNK))
                while inflate.unconsumed_tail:
                    yield from _some(inflate.decompress(inflate.unconsumed_tail, CHUNK))
                data = inflate.unused_data
        if not inflate.eof:
            refuse("its compressed data ends too early")
    except zlib.error as exc:
        refuse(f"its compressed data is damaged ({exc})")


def _unzstd(file: Stream) -> Generator[bytes]:
    import zstandard

    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
            cast("IO[bytes]", file), read_across_frames=True
        )
        while chunk := reader.read(CHUNK):
            yield chunk
    except zstandard.ZstdError as exc:
        refuse(f"its compressed data is damaged ({exc})")


def _some(data: bytes) -> Generator[bytes]:
    if data:
        yield data
