"""The readable files of a model: templates, configs, Python, and the headers of ONNX and Keras; runs nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from pierhead.errors import PierError
from pierhead.formats import gguf, python_model, templates
from pierhead.formats.findings import Finding, short
from pierhead.formats.protobuf import Bad, fields

MAX_DOCUMENT = 64 << 20  # tokenizer.json of large vocabularies
MAX_ONNX = 16 << 20
_LAMBDA = re.compile(rb"\"class_name\"\s*:\s*\"Lambda\"")
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"})
_VENDOR_DOMAINS = ("com.microsoft", "org.pytorch.aten", "ai.onnx.contrib", "com.ms.internal")


def readable(name: str) -> bool:
    """Whether ``scan`` has a word on such a file."""
    pure = PurePosixPath(name.lower())
    return pure.suffix in _READERS or pure.name in ("modelfile", "template", "params")


def scan(file: BinaryIO, size: int, name: str) -> list[Finding]:
    """What is to be said about one file, told by its name."""
    pure = PurePosixPath(name.lower())
    reader = _READERS.get(pure.suffix) or (_modelfile if pure.name in ("modelfile", "template") else None)
    if reader is None:
        return []
    limit = MAX_ONNX if pure.suffix in (".onnx", ".h5", ".hdf5") else MAX_DOCUMENT
    file.seek(0)
    data = file.read(limit)
    if size > limit and pure.suffix in (".json", ".jinja", ".jinja2", ".j2"):
        return [Finding(short(name, 300), "unsafe", f"a text of more than {limit >> 20} MiB, which is not read")]
    return reader(data, short(name, 300))


def gguf_templates(path: Path, name: str) -> list[Finding]:
    """The chat templates inside a GGUF file; a file that cannot be read is other code's to refuse."""
    try:
        metadata = gguf.read_file(path).metadata
    except PierError:
        return []
    found: list[Finding] = []
    for key, value in metadata.items():
        if key.startswith("tokenizer.chat_template") and isinstance(value, str):
            found += template(value, f"{name}!{short(key, 80)}")
    return found


def template(text: str, name: str) -> list[Finding]:
    """One chat template."""
    return [Finding(name, severity, reason) for severity, reason in templates.check(text)]


# --- by kind ----------------------------------------------------------------------------------------------------------


def _jinja(data: bytes, name: str) -> list[Finding]:
    return template(data.decode("utf-8", "replace"), name)


def _python(data: bytes, name: str) -> list[Finding]:
    return [Finding(name, "warning", "a Python program; engines run it only when told to trust remote code")]


def _json(data: bytes, name: str) -> list[Finding]:
    base = PurePosixPath(name.lower().rpartition("!")[2]).name
    if base == python_model.NAME:
        return [Finding(name, "unsafe", "it is a Python model: its author's code is run to serve it")]
    told = any(word in data for word in (b"auto_map", b"chat_template", b"Lambda"))
    if not told and b"\\u" not in data:  # a word may be spelt with escapes
        return []
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError):
        return [Finding(name, "warning", "JSON that cannot be read")] if base.endswith("config.json") else []
    found: list[Finding] = []
    if isinstance(document, dict):
        known = cast("dict[str, Any]", document)
        if known.get("auto_map"):
            found.append(
                Finding(name, "warning", "auto_map: it names Python classes of its author (trust_remote_code)")
            )
        for text in _templates_of(known.get("chat_template")):
            found += template(text, name)
    return found + _keras(data, name)


def _templates_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(cast("dict[str, Any]", value).values())
    if isinstance(value, list):
        entries = cast("list[Any]", value)
        named = [cast("dict[str, Any]", e).get("template") if isinstance(e, dict) else e for e in entries]
        return [text for text in named if isinstance(text, str)]
    return []


def _keras(data: bytes, name: str) -> list[Finding]:
    if _LAMBDA.search(data):
        return [Finding(name, "warning", "a Keras Lambda layer: Python code inside the model")]
    return []


def _modelfile(data: bytes, name: str) -> list[Finding]:
    """The templates of an Ollama Modelfile; a bare one is a template itself."""
    text = data.decode("utf-8", "replace")
    blocks = re.findall(r'(?ims)^\s*TEMPLATE\s+"""(.*?)"""', text)
    blocks += re.findall(r'(?im)^\s*TEMPLATE\s+(?!""")(.+)$', text)
    if not blocks and PurePosixPath(name.lower().rpartition("!")[2]).name == "template":
        blocks = [text]
    return [finding for block in blocks for finding in template(block, name)]


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _onnx(data: bytes, name: str) -> list[Finding]:
    """Operators that are not standard ones, and external data outside the model's folder."""
    domains: set[str] = set()
    places: set[str] = set()
    try:
        for number, value in fields(data):
            if number == 7 and isinstance(value, memoryview):
                _graph(value, domains, places, 0)
    except Bad:
        pass  # cut at the limit, or damaged: what was seen counts
    found: list[Finding] = []
    odd = sorted(d for d in domains if d not in _KNOWN_DOMAINS and not d.startswith(_VENDOR_DOMAINS))
    if odd:
        found.append(
            Finding(name, "warning", f"operators of its own, which need a native library: {', '.join(odd[:5])}")
        )
    out = sorted(p for p in places if p.startswith(("/", "\\")) or ".." in PurePosixPath(p.replace("\\", "/")).parts)
    if out:
        found.append(Finding(name, "warning", f"external data outside the model's folder: {short(out[0])}"))
    return found


def _graph(data: memoryview, domains: set[str], places: set[str], depth: int) -> None:
    """GraphProto: nodes (1) and initializers (5)."""
    if depth > 16:
        raise Bad
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            _node(value, domains, places, depth)
        elif number == 5:
            _tensor(value, places)


def _node(data: memoryview, domains: set[str], places: set[str], depth: int) -> None:
    """NodeProto: domain (7) and attributes (5), whose graphs are field 6 and tensors field 5."""
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 7:
            domains.add(short(bytes(value[:200]).decode("utf-8", "replace")))
        elif number == 5:
            for inner, part in fields(value):
                if inner == 6 and isinstance(part, memoryview):
                    _graph(part, domains, places, depth + 1)
                elif inner == 5 and isinstance(part, memoryview):
                    _tensor(part, places)


def _tensor(data: memoryview, places: set[str]) -> None:
    """TensorProto: external_data (13), pairs of key (1) and value (2)."""
    for number, value in fields(data):
        if number == 13 and isinstance(value, memoryview):
            pair = {
                n: bytes(v[:4096]).decode("utf-8", "replace") for n, v in fields(value) if isinstance(v, memoryview)
            }
            if pair.get(1) == "location" and len(places) < 1000:
                places.add(pair.get(2, ""))


_READERS = {
    ".jinja": _jinja,
    ".jinja2": _jinja,
    ".j2": _jinja,
    ".py": _python,
    ".json": _json,
    ".onnx": _onnx,
    ".h5": _keras,
    ".hdf5": _keras,
}
