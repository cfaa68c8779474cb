"""What somebody wants packaged: the files of a path on this machine, with their names, roles and formats; reads no
contents."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pierhead.errors import NotFound, UsageError
from pierhead.sources.choose import Entry, choices, choose, is_projector, projector
from pierhead.store.classify import classify
from pierhead.store.layers import check_filepath
from pierhead.store.model import Role

MAX_FILES = 10_000
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.(gguf|safetensors)", re.IGNORECASE)
# Parts that a model which makes pictures has in files of their own: text encoders and what turns its work into pixels.
_PAINTER_S = re.compile(
    r"(clip[_-]?[lg]|t5[_-]?xxl|t5[_-]v1|taesd|taef|tae|ae|vae|.*[_.-]vae)([._-].*)?\.gguf", re.IGNORECASE
)
_IGNORED = frozenset({"__pycache__", "node_modules"})
# Formats that repositories carry the same weights in a second time; where safetensors are there, they are left out.
_OTHER_COPIES = frozenset({"pytorch", "keras", "numpy", "pickle"})


@dataclass(frozen=True)
class Input:
    """One file to take in: where it is, and what it will be in the model's folder."""

    path: Path
    name: str
    role: Role
    format: str = ""
    scale: float = 1.0
    digest: str = ""  # of a file that is a blob of the store already


@dataclass(frozen=True)
class Inputs:
    """The files of a model; ``folder`` says that paths below it matter, ``left_out`` what a note should name."""

    files: tuple[Input, ...]
    folder: bool = False
    left_out: tuple[str, ...] = ()


def detect(path: Path) -> Inputs:
    """A file or folder of any kind that can be packaged."""
    if path.is_dir():
        endings = {p.suffix.lower() for p in path.iterdir() if p.is_file()}
        if ".safetensors" not in endings and ".gguf" in endings:
            return gguf(path)
        return folder(path)
    if not path.exists():
        raise NotFound(f"no such file or folder: {path}", hint="Check the path.")
    kind = classify(path.name)[1]
    if kind == "gguf":
        return gguf(path)
    if kind == "onnx":
        return onnx(path)
    if kind == "safetensors":
        return Inputs(tuple(_input(p, p.name) for p in _shards(path)))
    if kind in ("dduf", "ggml"):
        return Inputs((_input(path, path.name),))
    raise UsageError(
        f"{path} is not a model that can be packaged",
        hint="Name a .gguf, .safetensors, .onnx, .dduf or ggml-….bin file, a folder, or a Modelfile with -f.",
    )


def gguf(path: Path) -> Inputs:
    """A GGUF file with the other parts beside it, or a folder that holds one model and perhaps its projector.

    A folder may hold a model that makes pictures, whose parts are models by themselves.
    """
    if not path.is_dir():
        _need(path, "gguf", ".gguf")
        return Inputs(tuple(_input(p, p.name) for p in _shards(path)))
    entries = [Entry(p.name, p.stat().st_size) for p in path.iterdir() if p.suffix.lower() == ".gguf" and p.is_file()]
    found = choices(entries)
    if len(found) > 1 and any(_PAINTER_S.match(c.entries[0].path) for c in found):
        return folder(path, "gguf")
    if len(found) > 1:
        names = ", ".join(sorted(c.entries[0].path for c in found)[:20])
        raise UsageError(f"{path} holds several models: {names}", hint="Name one of the files.")
    model = choose(entries, "", str(path))
    files = [_input(path / e.path, e.path) for e in model.entries]
    if (eye := projector(entries, model)) is not None:
        files.append(_input(path / eye.path, eye.path))
    return Inputs(tuple(files))


def onnx(path: Path) -> Inputs:
    """An ONNX file with its weights beside it, or a folder."""
    if path.is_dir():
        return folder(path, "onnx")
    _need(path, "onnx", ".onnx")
    data = [p for p in sorted(path.parent.glob(f"{path.name}*")) if p != path and p.is_file()]
    data += [p for p in sorted(path.parent.glob("*.data")) if p.is_file() and p.stem in (path.stem, path.name)]
    files = [_input(path, path.name), *(Input(p, p.name, "weights", "data") for p in dict.fromkeys(data))]
    return Inputs(tuple(files))


def safetensors(path: Path) -> Inputs:
    """A folder with safetensors and what belongs to them."""
    if not path.is_dir():
        raise NotFound(f"{path} is not a folder", hint="Name the folder that holds the .safetensors files.")
    return folder(path, "safetensors")


def folder(path: Path, format: str = "") -> Inputs:
    """Every file below a folder but hidden ones; ``format`` is what its weights must be of."""
    if not path.is_dir():
        raise NotFound(f"{path} is not a folder", hint="Check the path.")
    files = [_input(p, p.relative_to(path).as_posix()) for p in _walk(path)]
    formats = {f.format for f in files if f.role == "weights"}
    if format and format not in formats:
        raise UsageError(f"{path} holds no {format} file", hint="Name another folder, or package it with --dir.")
    left_out: list[str] = []
    if "safetensors" in formats:
        left_out = [f.name for f in files if f.format in _OTHER_COPIES]
        files = [f for f in files if f.format not in _OTHER_COPIES]
    if "onnx" in formats:
        files = [_data(f) for f in files]
    if not files:
        raise UsageError(f"{path} holds no file", hint="Name the folder that holds the model's files.")
    return Inputs(tuple(files), folder=True, left_out=tuple(left_out))


def custom(path: Path) -> Inputs:
    """A folder as it is, with nothing left out but hidden files."""
    if not path.is_dir():
        raise NotFound(f"{path} is not a folder", hint="Check the path.")
    files = [_input(p, p.relative_to(path).as_posix()) for p in _walk(path)]
    if not files:
        raise UsageError(f"{path} holds no file", hint="Name the folder that holds the model's files.")
    return Inputs(tuple(files), folder=True)


def single(path: Path, role: Role, *, name: str = "", format: str = "", scale: float = 1.0) -> Input:
    """A file that is added to a model; NotFound when it is not there."""
    if not path.is_file():
        raise NotFound(f"no such file: {path}", hint="Check the path.")
    return Input(path, check_filepath(name or path.name), role, format, scale)


def _input(path: Path, name: str) -> Input:
    role, format = classify(name)
    return Input(path, check_filepath(name), role, format)


def _data(file: Input) -> Input:
    """Beside ONNX graphs, files without a meaning of their own hold their weights."""
    bare = file.role == "other" or file.format == "pytorch"
    return Input(file.path, file.name, "weights", "data") if bare else file


def _need(path: Path, kind: str, ending: str) -> None:
    if not path.is_file():
        raise NotFound(f"no such file: {path}", hint="Check the path.")
    if classify(path.name)[1] != kind:
        raise UsageError(f"{path} is not a {ending} file", hint=f"Name a {ending} file.")


def _shards(path: Path) -> list[Path]:
    """The file, with the other parts of the model beside it; CorruptData when one is missing."""
    found = _SHARD.fullmatch(path.name)
    if found is None or is_projector(path.name):
        return [path]
    parts: list[Path] = []
    for number in range(1, int(found[2]) + 1):
        part = path.with_name(f"{found[1]}-{number:05d}-of-{found[2]}.{found[3]}")
        if not part.is_file():
            raise NotFound(f"{part} is missing: the model has {int(found[2])} parts", hint="Get all parts of it.")
        parts.append(part)
    return parts


def _walk(top: Path) -> list[Path]:
    """The files below a folder, sorted; links only where they stay inside it, or in a hub's cache of blobs."""
    found: list[Path] = []
    for here, folders, names in os.walk(top):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _IGNORED)
        for name in folders:
            if (Path(here) / name).is_symlink():
                raise UsageError(f"{Path(here) / name} is a link to a folder", hint="Replace it by the folder itself.")
        for name in names:
            path = Path(here) / name
            if name.startswith(".") or name.endswith(".pyc"):
                continue
            if not path.is_file():
                raise UsageError(f"{path} is not a file", hint="Remove it, then try again.")
            if path.is_symlink():
                _check_link(path, top)
            found.append(path)
            if len(found) > MAX_FILES:
                raise UsageError(f"{top} holds more than {MAX_FILES} files", hint="Name the model's own folder.")
    return sorted(found)


def _check_link(path: Path, top: Path) -> None:
    """A link could take a secret along; those of a hub's cache lead to its own blobs."""
    real, root = path.resolve(), top.resolve()
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(cache)):
        raise UsageError(f"{path} is a link that leads out of the folder", hint="Replace it by the file itself.")
