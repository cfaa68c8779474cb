"""The directory of a DDUF file: a ZIP whose members are stored as they are, so that each is a range of the file."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pierhead.formats.reading import File, Reading, exactly, unusable

KIND = "DDUF"
MAX_DIRECTORY = 4 << 20
MAX_MEMBERS = 4096
_TAIL = 22 + 20 + 65535  # end record, ZIP64 locator and the longest comment
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_WIDE = 0xFFFFFFFF


class Member(NamedTuple):
    """One file inside: its bytes lie at ``start`` of the whole file, ``size`` of them."""

    name: str
    start: int
    size: int


def glance(beginning: bytes) -> None:
    """CorruptData where the first bytes of a file cannot be such an archive's."""
    if len(beginning) < _LOCAL.size or beginning[:4] != b"PK\x03\x04":
        unusable(KIND, f"it starts with {beginning[:4]!r}, not like a ZIP archive")
    if _LOCAL.unpack_from(beginning)[3] != 0:
        unusable(KIND, "its first member is compressed")


def read_directory(file: File) -> Reading[list[Member]]:
    """All members, in the order of the directory; their data may neither overlap nor be compressed."""
    size = file.size
    if size is None or size < _END.size:
        unusable(KIND, "its size is not known" if size is None else f"it has only {size} bytes")
    tail = yield from exactly(KIND, file, max(0, size - _TAIL), min(size, _TAIL))
    count, length, offset = yield from _end(file, size, tail)
    if count > MAX_MEMBERS or length > MAX_DIRECTORY or offset + length > size:
        unusable(KIND, f"its directory claims {count} members in {length} bytes at {offset}")
    raw = yield from exactly(KIND, file, offset, length)
    members: list[Member] = []
    at = 0
    for _ in range(count):
        member, at = yield from _member(file, raw, at, offset)
        members.append(member)
    end = 0
    for member in sorted(members, key=lambda m: m.start):
        if member.start < end:
            unusable(KIND, f"member {member.name!r} overlaps another")
        end = member.start + member.size
    if len({m.name for m in members}) != len(members):
        unusable(KIND, "two members have one name")
    return members


def _end(file: File, size: int, tail: bytes) -> Reading[tuple[int, int, int]]:
    """Number of members, length and place of the directory."""
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        unusable(KIND, "it has no directory at its end")
    _, disk, _, _, count, length, offset, _ = _END.unpack_from(tail, at)
    if disk not in (0, 0xFFFF):
        unusable(KIND, "it is one of several parts")
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size : at - _LOCATOR.size + 4] == b"PK\x06\x07":
        place = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)[2]
        if place + _END64.size > size:
            unusable(KIND, "its directory lies beyond its end")
        record = _END64.unpack((yield from exactly(KIND, file, place, _END64.size)))
        if record[0] != b"PK\x06\x06":
            unusable(KIND, "its directory is damaged")
        count, length, offset = record[7], record[8], record[9]
    return count, length, offset


def _member(file: File, raw: bytes, at: int, limit: int) -> Reading[tuple[Member, int]]:
    if at + _ENTRY.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
        unusable(KIND, "its directory is damaged")
    fields = _ENTRY.unpack_from(raw, at)
    flags, method, packed, size = fields[3], fields[4], fields[8], fields[9]
    name_length, extra_length, comment_length, offset = fields[10], fields[11], fields[12], fields[16]
    name = raw[at + _ENTRY.size : at + _ENTRY.size + name_length].decode("utf-8", "replace")
    extra = raw[at + _ENTRY.size + name_length : at + _ENTRY.size + name_length + extra_length]
    size, packed, offset = _wide(extra, size, packed, offset)
    if method != 0 or flags & 1 or packed != size:
        unusable(KIND, f"member {name[:80]!r} is compressed or encrypted")
    parts = name.split("/")
    if not name or len(parts) > 2 or "" in parts or ".." in parts or "\\" in name or len(name) > 512:
        unusable(KIND, f"member {name[:80]!r} has a name that is not allowed")
    if offset + _LOCAL.size > limit:
        unusable(KIND, f"member {name[:80]!r} lies beyond the end")
    local = _LOCAL.unpack((yield from exactly(KIND, file, offset, _LOCAL.size)))
    start = offset + _LOCAL.size + local[9] + local[10]
    if local[0] != b"PK\x03\x04" or start + size > limit:
        unusable(KIND, f"member {name[:80]!r} lies beyond the end")
    return Member(name, start, size), at + _ENTRY.size + name_length + extra_length + comment_length


def _wide(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The numbers that did not fit, from the ZIP64 field: only those that were left out are in it, in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = list(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            size = values.pop(0) if size == _WIDE and values else size
            packed = values.pop(0) if packed == _WIDE and values else packed
            offset = values.pop(0) if offset == _WIDE and values else offset
        at += 4 + length
    return size, packed, offset
