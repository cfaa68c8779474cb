"""One way in for all formats: which files make a model, and the summary of it, from disk or by range requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, UsageError
from pierhead.formats import dduf, onnx, openvino, pictures, python_model, safetensors, whisper
from pierhead.formats.folder import MAX_TEMPLATE, read_config, read_dduf, read_safetensors
from pierhead.formats.gguf import FIRST_STEP_REMOTE, MAX_STEP, Header, merge, next_length
from pierhead.formats.gguf_parser import HeaderParser, corrupt
from pierhead.formats.gguf_summary import summary as gguf_summary
from pierhead.formats.reading import Ask, Fetch, File, Reading, run, run_remote, text, unusable

__all__ = ["MAX_TEMPLATE", "check_file", "glance", "read_summary", "summarize", "summarize_remote"]

READABLE = ("gguf", "safetensors", "dduf", "onnx", "openvino", "ggml")
EARLY = 64 << 10  # bytes that tell a model from something else


def summarize(files: Sequence[File], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The summary of a model on this machine; ``paths`` says where each file is."""
    with _Opened(paths) as opened:
        return run(read_summary(files), opened.read)


def check_file(path: Path, format: str, name: str = "") -> None:
    """CorruptData unless the header of one file can be read; nothing for formats that are not read."""
    file = File(name or str(path), _size(path), "weights", format)
    with _Opened({file.name: path}) as opened:
        run(read_one(file), opened.read)


async def summarize_remote(files: Sequence[File], fetch: Fetch) -> dict[str, Any]:
    """The summary of a model elsewhere; only headers and small files are fetched."""
    return await run_remote(read_summary(files), fetch)


def read_summary(files: Sequence[File]) -> Reading[dict[str, Any]]:
    """The reader for all of it. The keys are those of ``gguf_summary.summary`` whatever the format.

    A chat template that is a file of its own counts before the one in the weights.
    """
    summary = yield from _weights(files)
    own = next((f for f in files if f.role == "template" and (f.size or 0) <= MAX_TEMPLATE), None)
    if own is not None:
        summary["chat_template"] = (yield from text(own, MAX_TEMPLATE)).decode("utf-8", "replace")
    return summary


def _weights(files: Sequence[File]) -> Reading[dict[str, Any]]:
    weights = sorted((f for f in files if f.role == "weights"), key=lambda f: f.name)
    program = next((f for f in files if f.format == python_model.FORMAT), None)
    if program is not None:
        return (yield from _python(program, weights))
    format = format_of_weights(weights)
    chosen = [f for f in weights if f.format == format]
    beside = {f.name: f for f in files if f.role not in ("weights", "mmproj", "lora", "draft")}
    if format == "gguf" and len(chosen) == len(weights):
        headers = yield from _gguf_headers(chosen)
        parts = [pictures.of_gguf(file.name, header) for file, header in zip(chosen, headers, strict=True)]
        return pictures.summary(parts, format) or gguf_summary(merge(headers))
    if format == "gguf":
        painter = yield from pictures.read(weights, _gguf)
        return painter or gguf_summary(merge((yield from _gguf_headers(chosen))))
    if format == "safetensors":
        return (yield from _named(chosen[0], read_safetensors(chosen, beside)))
    if format == "dduf":
        return (yield from _named(chosen[0], read_dduf(chosen[0])))
    about = yield from read_config(beside)
    if format == "onnx":
        return {**about, **(yield from _onnx(chosen, weights))}
    if format == "openvino":
        return {**about, **_bare("openvino"), **(yield from openvino.read_model(chosen, weights))}
    if format == "ggml":
        return {**about, **_bare("ggml"), **(yield from _whisper(chosen))}
    size = sum(f.size or 0 for f in weights)
    return {**about, **_bare(format or "custom"), "weights_bytes": size, "layers": 0}


def format_of_weights(weights: Sequence[File]) -> str:
    """The format of a model: of several the first that can be read."""
    found = {f.format for f in weights}
    return next((known for known in READABLE if known in found), next(iter(sorted(found - {"", "data"})), ""))


def read_one(file: File) -> Reading[None]:
    """Read the header of one file and forget it."""
    if file.format == "gguf":
        yield from _named(file, _gguf(file))
    elif file.format == "safetensors":
        yield from _named(file, safetensors.read_header(file))
    elif file.format == "onnx":
        yield from _named(file, onnx.read_model(file))
    elif file.format == "dduf":
        yield from _named(file, read_dduf(file))
    elif file.format == "ggml":
        yield from _named(file, whisper.read_header(file))


def glance(beginning: bytes, file: File, packing: str = "raw") -> None:
    """Refuse, by its first bytes (``EARLY`` of them), what is not of the format that it should be of."""
    if packing == "tar":
        if beginning[257:262] != b"ustar":
            unusable("tar", "it does not start like one")
    elif packing != "raw":
        magic = b"\x1f\x8b" if packing.endswith("gzip") else b"\x28\xb5\x2f\xfd"
        if not beginning.startswith(magic):
            unusable(packing, f"it starts with {beginning[:4]!r}")
    elif file.format == "gguf":
        parser = HeaderParser(file.size)
        parser.feed(beginning)
        if parser.header is None and len(beginning) < EARLY:
            corrupt("it ends inside its header")
    elif file.format == "safetensors":
        safetensors.glance(beginning, file.size)
    elif file.format in _GLANCES:
        _GLANCES[file.format](beginning)


_GLANCES: dict[str, Callable[[bytes], None]] = {
    "onnx": onnx.glance,
    "dduf": dduf.glance,
    "openvino": openvino.glance,
    "ggml": whisper.glance,
}


# --- formats ------------------------------------------------------------------------------------------------------


def _gguf_headers(files: Sequence[File]) -> Reading[list[Header]]:
    headers: list[Header] = []
    for file in files:
        headers.append((yield from _named(file, _gguf(file))))
    return headers


def _gguf(file: File) -> Reading[Header]:
    parser = HeaderParser(file.size)
    step = FIRST_STEP_REMOTE
    while parser.header is None:
        data = yield Ask(file.name, parser.received, next_length(parser, step, file.size))
        if not data:
            corrupt(f"it ends inside its header, after {parser.received} bytes (at least {parser.need} expected)")
        parser.feed(data)
        step = min(step * 2, MAX_STEP)
    return parser.header


def _onnx(graphs: Sequence[File], weights: Sequence[File]) -> Reading[dict[str, Any]]:
    """A model of one or more graphs (an encoder and a decoder); their weights may lie in files beside them."""
    there = {f.name for f in weights}
    models: dict[str, onnx.Model] = {}
    for file in graphs:
        model = yield from _named(file, onnx.read_model(file))
        folder = file.name.rpartition("/")[0]
        for location in model.external:
            if (f"{folder}/{location}" if folder else location) not in there:
                unusable("ONNX", f"{file.name} keeps weights in {location}, which is missing", "Get that file as well.")
        models[file.name] = model
    first = next(iter(models.values()))
    share: dict[str, int] = {}
    for model in models.values():
        for word, size in model.nbytes.items():
            share[word] = share.get(word, 0) + size
    found = {
        **_bare("onnx"),
        "version": first.ir_version,
        "producer": first.producer,
        "opset": first.opset,
        "inputs": first.inputs,
        "outputs": first.outputs,
        "parameters": sum(sum(model.elements.values()) for model in models.values()),
        "quantization": max(share, key=lambda word: share[word], default="unknown"),
        "dtypes": share,
        "weights_bytes": sum(share.values()),
        "tensor_count": sum(model.tensors for model in models.values()),
    }
    if len(models) > 1:
        found["graphs"] = {
            name: {
                "inputs": m.inputs,
                "outputs": m.outputs,
                "weights_bytes": sum(m.nbytes.values()),
                "dtypes": m.nbytes,
            }
            for name, m in models.items()
        }
    return found


def _whisper(files: Sequence[File]) -> Reading[dict[str, Any]]:
    """A model of one file; of several sizes or quantizations in one folder the first."""
    headers: dict[str, whisper.Header] = {}
    for file in files:
        headers[file.name] = yield from _named(file, whisper.read_header(file))
    found = whisper.summary(headers[files[0].name], files[0].size or 0)
    if len(headers) > 1:
        found["variants"] = {
            file.name: whisper.summary(headers[file.name], file.size or 0)["whisper"] for file in files
        }
    return found


def _python(program: File, weights: Sequence[File]) -> Reading[dict[str, Any]]:
    """A class of somebody's own; what its weights are is its own matter."""
    found = python_model.decode((yield from text(program, python_model.MAX_SIZE)))
    size = sum(f.size or 0 for f in weights)
    about = {"name": found.cls, "architecture": "python", "python": msgspec.to_builtins(found)}
    return {**_bare(python_model.FORMAT), **about, "weights_bytes": size, "layers": 0}


def _bare(format: str) -> dict[str, Any]:
    """The keys that every summary has, where a format tells little."""
    return {
        "format": format,
        "version": None,
        "name": None,
        "license": None,
        "size_label": None,
        "type": "model",
        "parameters": 0,
        "quantization": None,
        "weights_bytes": 0,
        "tensor_count": 0,
        "split_count": 1,
        "shards_read": 1,
        "state": {},
        "per_layer": [],
        "other": {},
    }


def _named(file: File, reading: Reading[Any]) -> Reading[Any]:
    """The same reader, whose complaints name the file."""
    try:
        return (yield from reading)
    except CorruptData as error:
        if error.message.startswith(f"{file.name}: "):
            raise
        data = {**error.data, "file": file.name}
        raise CorruptData(f"{file.name}: {error.message}", hint=error.hint, data=data) from None


# --- files on this machine ----------------------------------------------------------------------------------------


class _Opened:
    """Local files behind their names, each opened when it is first asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths
        self._open: dict[str, int] = {}

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, name: str, offset: int, length: int) -> bytes:
        path = self._paths[name]
        try:
            if name not in self._open:
                _size(path)
                if len(self._open) >= 64:
                    self.__exit__()
                    self._open.clear()
                self._open[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._open[name], length, offset)
        except OSError as error:
            raise _mapped(error, path) from error


def _size(path: Path) -> int:
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never end
            raise UsageError(f"{path} is not a file", hint="Name a model's file.")
        return path.stat().st_size
    except OSError as error:
        raise _mapped(error, path) from error


def _mapped(error: OSError, path: Path) -> PierError:
    if isinstance(error, FileNotFoundError):
        return NotFound(f"no such file: {path}", hint="Check the path.")
    if isinstance(error, PermissionError):
        return AccessDenied(f"may not read {path}", hint=f"Type `sudo chmod a+r {path}`.")
    return PierError(f"cannot read {path}: {error.strerror or error}")
