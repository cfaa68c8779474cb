"""Read the header of a GGUF file, local or remote; the weights themselves are never read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, UsageError
from pierhead.formats.gguf_parser import MAX_HEADER, Header, HeaderParser, Tensor, Value, corrupt
from pierhead.formats.gguf_summary import summary

__all__ = ["Fetch", "Header", "Tensor", "Value", "merge", "read_file", "read_files", "read_remote", "summary"]

Fetch = Callable[[int, int], Awaitable[bytes]]
"""``await fetch(offset, length)`` gives up to ``length`` bytes; fewer only at the end of the file."""

FIRST_STEP = 1 << 20
FIRST_STEP_REMOTE = 256 << 10
MAX_STEP = 16 << 20


def read_file(path: Path) -> Header:
    """Header of the file at ``path``; ``CorruptData`` also where tensor data lies beyond its end."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never end
            raise UsageError(f"{path} is not a file", hint="Name a .gguf file.")
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(0)
            parser = HeaderParser(size)
            step = FIRST_STEP
            while parser.header is None:
                _feed(parser, file.read(next_length(parser, step, size)), size)
                step = min(step * 2, MAX_STEP)
            return parser.header
    except FileNotFoundError as error:
        raise NotFound(f"no such file: {path}", hint="Check the path.") from error
    except PermissionError as error:
        raise AccessDenied(f"may not read {path}", hint=f"Type `sudo chmod a+r {path}`.") from error
    except OSError as error:
        raise PierError(f"cannot read {path}: {error.strerror or error}") from error
    except CorruptData as error:
        raise _named(error, str(path)) from None


async def read_remote(fetch: Fetch, size: int | None) -> Header:
    """Header by range requests that double from 256 KiB, each of 16 MiB at most, together at most 64 MiB."""
    parser = HeaderParser(size)
    step = FIRST_STEP_REMOTE
    while parser.header is None:
        wanted = next_length(parser, step, size)
        _feed(parser, (await fetch(parser.received, wanted))[:wanted], size)
        step = min(step * 2, MAX_STEP)
    return parser.header


def read_files(paths: Sequence[Path]) -> Header:
    """Header of a model in one or more files (split GGUF), in any order."""
    return merge([read_file(path) for path in paths])


def merge(headers: Sequence[Header]) -> Header:
    """One header from those of all shards of a split model: the first shard's metadata, everyone's tensors."""
    if len(headers) == 1 and _split(headers[0], "count", 1) <= 1:
        return headers[0]
    if not headers:
        raise CorruptData("a model of no files", hint="Name at least one .gguf file.")
    ordered = sorted(headers, key=lambda header: _split(header, "no", 0))
    count = _split(ordered[0], "count", 1)
    numbers = [_split(header, "no", 0) for header in ordered]
    agreed = all(_split(header, "count", 1) == count for header in ordered)
    if not agreed or count != len(ordered) or numbers != list(range(len(ordered))):
        present = ", ".join(str(number + 1) for number in numbers)
        corrupt(f"parts {present} of {count} do not make one split model", "give all parts of the same model")
    tensors = tuple(tensor for header in ordered for tensor in header.tensors)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        corrupt("a tensor appears in two of its parts")
    expected = _split(ordered[0], "tensors.count", len(tensors))
    if expected != len(tensors):
        corrupt(f"its parts hold {len(tensors)} tensors, {expected} were promised")
    sizes = [header.size for header in ordered]
    size = None if None in sizes else sum(size for size in sizes if size is not None)
    return replace(ordered[0], tensors=tensors, size=size, shards=count)


def _split(header: Header, key: str, default: int) -> int:
    value = header.metadata.get(f"split.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        corrupt(f"metadata 'split.{key}' is {value!r}, not a count")
    return value


def next_length(parser: HeaderParser, step: int, size: int | None) -> int:
    """Bytes to read next: what is needed at least, in a good stride, inside the file and the limit."""
    end = min(MAX_HEADER, MAX_HEADER if size is None else size)
    return max(0, min(max(parser.need - parser.received, step), MAX_STEP, end - parser.received))


def _feed(parser: HeaderParser, data: bytes, size: int | None) -> None:
    if not data:
        total = "" if size is None else f" of {size}"
        corrupt(f"it ends inside its header, after {parser.received} bytes{total} (at least {parser.need} expected)")
    parser.feed(data)


def _named(error: CorruptData, name: str) -> CorruptData:
    return CorruptData(f"{name}: {error.message}", hint=error.hint, data={**error.data, "file": name})
