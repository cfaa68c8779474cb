"""Writers of tar archives, honest and hostile."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Sequence

import zstandard

Entry = tuple[str, bytes] | tarfile.TarInfo


def tar(entries: Sequence[Entry], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of files (name, bytes) and of headers alone."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry, io.BytesIO(bytes(entry.size)) if entry.isreg() else None)
            else:
                about = tarfile.TarInfo(entry[0])
                about.size = len(entry[1])
                archive.addfile(about, io.BytesIO(entry[1]))
    return out.getvalue()


def header(name: str, kind: bytes = b"0", size: int = 0, link: str = "", **more: object) -> tarfile.TarInfo:
    about = tarfile.TarInfo(name)
    about.type, about.size, about.linkname = kind, size, link
    for key, value in more.items():
        setattr(about, key, value)
    return about


def pack(data: bytes, packing: str) -> bytes:
    if packing == "tar+gzip":
        return gzip.compress(data, mtime=0)
    return zstandard.compress(data) if packing == "tar+zstd" else data


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header block with a right sum, whatever else it claims."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size.ljust(12, b"\0")[:12]
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
