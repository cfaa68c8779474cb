"""The card of a model (README.md with YAML front matter), made from what its header tells; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from pierhead.refs import Reference
from pierhead.sources.choose import human
from pierhead.sources.outgoing import Outgoing
from pierhead.store.model import ModelRecord

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")
_BASE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+?)(?:[:/@].*)?")
_FULL = frozenset({"F16", "BF16", "F32", "F64", ""})
_WORDS = frozenset({"yes", "no", "on", "off", "true", "false", "null", "y", "n"})  # YAML takes them for other things


def model_card(record: ModelRecord, files: Sequence[Outgoing], target: Reference) -> str:
    """What a reader of the hub's page wants to know, and how to run the model."""
    about = record.metadata
    lines = ["---", *_front_matter(record, target), "---", "", f"# {target.repo.partition('/')[2]}", ""]
    lines += [_first_sentence(record, target), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in _facts(about, record) if value]
    lines += ["", "## Run it", "", "```sh", f'pier run {_reference(record, target)} "Hello"', "```", ""]
    lines += ["## Files", "", "| file | size | SHA-256 |", "|---|---|---|"]
    lines += [f"| `{_cell(f.path)}` | {human(f.size)} | `{f.sha256}` |" for f in files]
    lines += ["", f"Packaged with Pierhead as the OCI artifact `{record.digest}`.", ""]
    return "\n".join(lines)


def _front_matter(record: ModelRecord, target: Reference) -> list[str]:
    about = record.metadata
    names = {f.name for f in record.laid_out}
    license_id = str(about.get("license") or "").lower()
    pairs: dict[str, Any] = {}
    if _LICENSE.fullmatch(license_id):
        pairs["license"] = license_id
    base = base_model(record, target)
    if base:
        pairs["base_model"] = base
        if about.get("format") == "gguf" and str(about.get("quantization") or "") not in _FULL:
            pairs["base_model_relation"] = "quantized"
    pairs["library_name"] = _library(str(about.get("format")), names)
    pairs["pipeline_tag"] = _pipeline(record)
    tags = [about.get("format"), about.get("architecture"), about.get("quantization"), "pierhead"]
    pairs["tags"] = [str(tag).lower() for tag in tags if tag]
    return [line for key, value in pairs.items() for line in _yaml(key, value) if value]


def _yaml(key: str, value: Any) -> list[str]:
    """JSON's strings are YAML's, whatever is in them."""
    if isinstance(value, list):
        return [f"{key}:", *(f"  - {_quoted(str(v))}" for v in value)]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return [f"{key}: {_quoted(str(value))}"]


def _quoted(text: str) -> str:
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]*", text) and text.lower() not in _WORDS:
        return text
    return msgspec.json.encode("".join(c if c.isprintable() else " " for c in text)).decode()


def base_model(record: ModelRecord, target: Reference) -> str:
    """The repository that a model came from, where that is another one than it goes to."""
    found = _BASE.fullmatch(record.source)
    return found["repo"] if found and found["repo"] != target.repo else ""


def _library(format: str, names: set[str]) -> str:
    if "model_index.json" in names:
        return "diffusers"
    if "modules.json" in names:
        return "sentence-transformers"
    return {"gguf": "gguf", "safetensors": "transformers", "onnx": "onnx", "dduf": "diffusers"}.get(format, "")


def _pipeline(record: ModelRecord) -> str:
    about = record.metadata
    if any(f.role == "mmproj" for f in record.files):
        return "image-text-to-text"
    if any(f.name == "model_index.json" for f in record.laid_out):
        return "text-to-image"
    if about.get("pooling") or str(about.get("architecture") or "").endswith(("bert", "bert-moe")):
        return "feature-extraction"
    return "text-generation" if about.get("chat_template") or about.get("context_length") else ""


def _facts(about: dict[str, Any], record: ModelRecord) -> list[tuple[str, str]]:
    return [
        ("Architecture", str(about.get("architecture") or "")),
        ("Parameters", _count(about.get("parameters"))),
        ("Format", str(about.get("format") or "")),
        ("Quantization", str(about.get("quantization") or "")),
        ("Context", f"{about['context_length']:,} tokens" if about.get("context_length") else ""),
        ("Chat template", "yes" if about.get("chat_template") else ""),
        ("Size", human(record.size)),
        ("License", str(about.get("license") or "")),
    ]


def _first_sentence(record: ModelRecord, target: Reference) -> str:
    title = _cell(str(record.metadata.get("name") or record.name))
    base = base_model(record, target)
    if not base:
        return f"{title}."
    return f"{title}, from [{base}](https://huggingface.co/{base})."


def _reference(record: ModelRecord, target: Reference) -> str:
    at = f"@{target.revision}" if target.revision else ""
    gguf = record.metadata.get("format") == "gguf"
    quantization = str(record.metadata.get("quantization") or "")
    tag = f":{quantization}" if gguf and re.fullmatch(r"[\w.-]+", quantization) else ""
    return f"{target.kind}:{target.repo}{tag}{at}"


def _count(number: Any) -> str:
    if not isinstance(number, int) or number <= 0:
        return ""
    for size, word in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f} {word}"
    return str(number)


def _cell(text: str) -> str:
    """Foreign text in a table: one line, and no markup of its own."""
    clean = "".join(c if c.isprintable() else " " for c in text)[:300]
    return re.sub(r"([|<>\[\]`\\])", r"\\\1", clean) if any(c in clean for c in "|<>[]`\\") else clean
