"""Whether loading a model's files would run code of their author: pickles, archives, templates, configs; runs nothing.

What a file is is told by its bytes first and by its name second. Sizes, depth, members and time are bounded; what goes
beyond them is said, never passed over.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import gzip
import io
import lzma
import re
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from pierhead.formats import documents, pickles
from pierhead.formats.findings import Finding, Severity, short

MAX_MEMBERS = 20_000
MAX_DEPTH = 3
MAX_UNPACKED = 256 << 20  # bytes of one packed member that are looked at
MAX_SECONDS = 60.0
MAX_NPY_HEADER = 1 << 20
PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill", ".p"})
_TORCH_BIN = re.compile(r"(pytorch_model|adapter_model|diffusion_pytorch|training_args|optimizer|scheduler|rng_state)")
_INERT = frozenset({".gguf", ".safetensors", ".md", ".png", ".jpg"})
_NUMBERS = frozenset({".bin", ".data", ".model", ".dat"})  # or pickles, for all that their names tell
_PACKED = frozenset({".gz", ".bz2", ".xz", ".zst"})
_TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")
Opener = Callable[[Any], contextlib.AbstractContextManager[Any]]
_PACKERS: dict[bytes, Opener] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: _zstd(file),
}


_CONTAINERS = (b"PK\x03\x04", b"\x80", b"\x93NUMPY", *_PACKERS)


def _worth(name: str) -> bool:
    """Whether a packed member may be more than numbers or prose."""
    suffix = PurePosixPath(name.lower()).suffix
    return suffix in PICKLES or suffix in {".bin", ".tar", ".tgz", ".zip", ".npz"} or documents.readable(name)


class TooMuch(Exception):  # control flow: a bound was reached
    """More than is looked at."""


def scan_file(path: Path, name: str = "") -> list[Finding]:
    """What is to be said about one file; ``name`` is its path inside the model. Blocks."""
    name = name or path.name
    looking = _Look(time.monotonic() + MAX_SECONDS)
    with path.open("rb") as file:
        looking.file(file, path.stat().st_size, name, 0)
    if PurePosixPath(name).suffix.lower() == ".gguf" or _starts(path, b"GGUF"):
        looking.found += documents.gguf_templates(path, name)
    return looking.found


def scan_folder(folder: Path) -> list[Finding]:
    """All files below a folder; links that leave it are said and not followed."""
    found: list[Finding] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            found.append(Finding(name, "warning", "a link to something outside the folder; it was not looked at"))
        elif path.is_file():
            found += scan_file(path, name)
    return found


def scan_files(files: Iterable[tuple[str, Path]]) -> list[Finding]:
    """The files of a model by name."""
    return [finding for name, path in files for finding in scan_file(path, name)]


def _starts(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


class _Look:
    def __init__(self, until: float) -> None:
        self.found: list[Finding] = []
        self._until = until

    def file(self, file: BinaryIO, size: int, name: str, depth: int) -> None:
        """One file, or member of an archive, that can be read at any place."""
        beginning = file.read(8)
        file.seek(0)
        suffix = PurePosixPath(name).suffix.lower()
        if time.monotonic() > self._until:
            self._say(name, "unsafe", "looking through the archive takes too long")
        elif beginning.startswith(b"GGUF") or (suffix in _INERT and not beginning.startswith((b"PK\x03\x04", b"\x80"))):
            pass  # no code in these; a template is looked at by itself
        elif beginning.startswith(b"PK\x03\x04") or (suffix in {".zip", ".npz", ".keras", ".mar"} and size):
            self._archive(name, depth, lambda: self._zip(file, name, depth))
        elif beginning.startswith(b"\x93NUMPY"):
            self._numpy(file, size, name)
        elif (opener := next((o for magic, o in _PACKERS.items() if beginning.startswith(magic)), None)) is not None:
            self._archive(name, depth, lambda: self._packed(file, name, depth, opener))
        elif (
            suffix in PICKLES and beginning.startswith(b"x") and len(beginning) > 1 and beginning[1] in b"\x01\x9c\xda"
        ):
            self._archive(name, depth, lambda: self._packed(file, name, depth, _zlib))
        elif _TAR.search(name.lower()) or _is_tar(file):
            self._archive(name, depth, lambda: self._tar(file, name, depth))
        else:
            self._single(file, size, name, suffix, beginning)

    def _single(self, file: BinaryIO, size: int, name: str, suffix: str, beginning: bytes) -> None:
        file.seek(0)
        named = suffix in PICKLES or (suffix == ".bin" and _TORCH_BIN.match(PurePosixPath(name).name) is not None)
        if named or beginning[:1] == b"\x80" or not suffix or suffix in _NUMBERS:
            # a protocol number follows; in raw numbers the byte alone means nothing
            sure = named or (beginning[:1] == b"\x80" and beginning[1:2] in b"\x02\x03\x04\x05" and suffix != ".bin")
            self._pickle(file, size, name, certain=sure)
            file.seek(0)
        if not suffix or not (named or beginning[:1] == b"\x80" or suffix in _NUMBERS):
            self.found += documents.scan(file, size, name)

    def _say(self, name: str, severity: Severity, reason: str) -> None:
        self.found.append(Finding(short(name, 300), severity, reason))

    def _pickle(self, file: BinaryIO, size: int, name: str, *, certain: bool) -> None:
        reasons = pickles.scan(file, size, certain=certain)
        if reasons:
            self._say(name, "unsafe", "a pickle that runs code when it is loaded: " + ", ".join(reasons))

    # --- archives -------------------------------------------------------------------------------------------------

    def _archive(self, name: str, depth: int, look: Callable[[], None]) -> None:
        if depth >= MAX_DEPTH:
            self._say(name, "unsafe", f"archives inside archives, more than {MAX_DEPTH} deep")
            return
        try:
            look()
        except TooMuch as exc:
            self._say(name, "unsafe", str(exc))
        except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as exc:
            self._say(name, "unsafe", f"an archive that cannot be read ({short(str(exc), 80)})")
        except (NotImplementedError, RuntimeError, ValueError, UnicodeError, OverflowError) as exc:
            self._say(name, "unsafe", f"an archive that cannot be read ({short(str(exc), 80)})")

    def _zip(self, file: BinaryIO, name: str, depth: int) -> None:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise TooMuch(f"an archive of more than {MAX_MEMBERS:,} members")
            names = [m.filename for m in members]
            if len(set(names)) != len(names):
                self._say(name, "unsafe", "two members of one name: programs may read another one than was looked at")
            for member in members:
                self._zip_member(archive, member, name, depth)

    def _zip_member(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, depth: int) -> None:
        inner = f"{name}!{member.filename}"
        self._path(inner, member.filename)
        parts = PurePosixPath(member.filename).parts
        if member.is_dir() or (len(parts) > 1 and parts[-2] in ("data", "constants") and parts[-1].isdigit()):
            return  # a torch archive's storages: numbers, read as such
        if len(parts) > 2 and parts[1] == "code" and parts[-1].endswith(".py"):
            self._say(inner, "warning", "a TorchScript program, which the model runs")
            return
        with archive.open(member) as packed:
            self._member(packed, inner, depth)

    def _tar(self, file: BinaryIO, name: str, depth: int) -> None:
        file.seek(0)
        with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:") as archive:
            for number, member in enumerate(archive):
                if number >= MAX_MEMBERS:
                    raise TooMuch(f"an archive of more than {MAX_MEMBERS:,} members")
                inner = f"{name}!{member.name}"
                self._path(inner, member.name)
                if member.islnk() or member.issym():
                    self._path(inner, str(PurePosixPath(member.name).parent / member.linkname))
                elif member.isfile():
                    packed = archive.extractfile(member)
                    if packed is not None:  # a part of the file itself, which can be read at any place
                        self.file(cast("BinaryIO", packed), member.size, inner, depth + 1)
                elif not member.isdir():
                    self._say(inner, "unsafe", "a device or pipe in an archive")

    def _path(self, inner: str, path: str) -> None:
        if path.startswith(("/", "\\")) or ".." in PurePosixPath(path.replace("\\", "/")).parts:
            self._say(inner, "unsafe", "its path leaves the folder that it would be unpacked to")

    def _packed(self, file: BinaryIO, name: str, depth: int, opener: Opener) -> None:
        file.seek(0)
        with opener(file) as packed:
            inner = PurePosixPath(name)
            self._member(
                packed, str(inner.with_suffix("") if inner.suffix in (".gz", ".bz2", ".xz", ".zst") else inner), depth
            )

    def _member(self, packed: IO[bytes], name: str, depth: int) -> None:
        """The beginning and the name tell whether the rest is worth unpacking."""
        data = packed.read(1 << 16)
        if data.startswith(b"\x93NUMPY") and b"O" not in data[:256]:
            self._numpy(io.BytesIO(data), len(data), name)  # numbers follow: they need not be unpacked
            return
        if not data.startswith(_CONTAINERS) and not _worth(name):
            return
        whole = bytearray(data)
        while chunk := packed.read(1 << 20):
            whole += chunk
            if len(whole) > MAX_UNPACKED:
                raise TooMuch(f"{short(name)} unpacks to more than {MAX_UNPACKED >> 20} MiB")
            if time.monotonic() > self._until:
                raise TooMuch("looking through the archive takes too long")
        self.file(io.BytesIO(whole), len(whole), name, depth + 1)

    # --- numpy ----------------------------------------------------------------------------------------------------

    def _numpy(self, file: BinaryIO, size: int, name: str) -> None:
        """An array of Python objects is a pickle behind a header."""
        head = file.read(12)
        if len(head) < 12:
            self._say(name, "unsafe", "an array whose header cannot be read")
            return
        wide = head[6] >= 2
        length = int.from_bytes(head[8:12] if wide else head[8:10], "little")
        start = 12 if wide else 10
        if length > MAX_NPY_HEADER:
            self._say(name, "unsafe", "an array whose header is too long")
            return
        file.seek(start)
        try:
            header = ast.literal_eval(file.read(length).decode("latin-1"))
            objects = "O" in str(header["descr"])
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
            self._say(name, "unsafe", "an array whose header cannot be read")
            return
        if objects:
            self._pickle(file, size - start - length, name, certain=True)


@contextlib.contextmanager
def _zstd(file: BinaryIO) -> Generator[IO[bytes]]:
    import zstandard

    try:
        with zstandard.ZstdDecompressor(max_window_size=MAX_UNPACKED).stream_reader(file, closefd=False) as reader:
            yield cast("IO[bytes]", reader)
    except zstandard.ZstdError as exc:
        raise OSError(str(exc)) from exc


@contextlib.contextmanager
def _zlib(file: BinaryIO) -> Generator[IO[bytes]]:
    """A bare zlib stream (joblib writes these), as a file, unpacked as far as is looked at."""
    made = zlib.decompressobj()
    unpacked = io.BytesIO()
    while (chunk := file.read(1 << 20)) and not made.eof:
        data = chunk
        while data and not made.eof:
            unpacked.write(made.decompress(data, 1 << 20))
            data = made.unconsumed_tail
            if unpacked.tell() > MAX_UNPACKED:
                raise TooMuch(f"it unpacks to more than {MAX_UNPACKED >> 20} MiB")
    unpacked.seek(0)
    yield unpacked


def _is_tar(file: BinaryIO) -> bool:
    file.seek(257)
    magic = file.read(5)
    file.seek(0)
    return magic == b"ustar"
