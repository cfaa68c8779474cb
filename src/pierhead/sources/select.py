"""Which files of a repository or a folder are the model that a reference means, in whatever format; pure.

GGUF comes first, then safetensors, ONNX, DDUF and GGML; a tag names a format, a quantization or a variant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.sources.choose import Choice, Entry, choices, choose, complete, human, is_projector, projector, tagged
from pierhead.sources.select_onnx import onnx_variants
from pierhead.sources.select_safetensors import safetensors_variants
from pierhead.sources.variant import Variant, folder_of, name_of, pick
from pierhead.store.classify import classify
from pierhead.store.media import format_of
from pierhead.store.model import Role

MAX_SMALL = 64 << 20  # bytes of a file beside the weights; a large vocabulary has a few tens of MB
FORMATS = ("gguf", "safetensors", "onnx", "dduf", "ggml")
_GGML = re.compile(r"(?i)(?:.*[-_.])?ggml[-_.](?P<name>.+)\.bin")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})[^/]*\.safetensors")
_MODULES = re.compile(r"\d+_\w+/[\w.]+\.json|additional_chat_templates/[^/]+\.jinja")  # of sentence transformers; more
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack")
# What training, other frameworks and web sites leave beside a model.
_ASIDE = re.compile(
    r"(?i)(.*/)?(\.[^/]*|optimizer.*|scheduler\.(pt|bin)|rng_state.*|train(er|ing)_.*"
    r"|(train|eval|test|convert|example|demo|run|app|infer|benchmark)[^/]*\.py|events\.out\..*|all_results\.json"
    r"|(eval|train)_results.*\.json|model\.safetensors\.index\.fp32\.json|.*\.(png|jpe?g|gif|webp|svg|mp4|mp3|wav|pdf"
    r"|ipynb|parquet|arrow|csv|jsonl|zip|gz|tar|sh))"
)
_ASIDE_FOLDERS = re.compile(
    r"(?i)(checkpoint-\d+|runs|logs?|wandb|original|metal|openvino|coreml|tflite|assets?|images?|figures?|examples?"
    r"|samples?|eval.*|onnx|\..*)"
)


@dataclass(frozen=True)
class Part:
    """One file of the chosen model: ``name`` is its path in the model's folder."""

    entry: Entry
    name: str
    role: Role
    format: str = ""


@dataclass(frozen=True)
class Selection:
    """The chosen model; ``label`` is the tag that chooses it again, empty where none is needed."""

    label: str
    parts: tuple[Part, ...]


def select(entries: Sequence[Entry], tag: str, where: str, path: str = "") -> Selection:
    """The model that ``tag`` and ``path`` (a file's) mean, or the default; NotFound and UsageError list the choices."""
    if path:
        return _by_path(entries, tag, where, path)
    wanted = "" if tag.lower() == "latest" else tag
    there = [format for format in FORMATS if _has(entries, format)]
    if not there:
        raise _nothing(entries, where)
    if not wanted:
        return _of_format(entries, there[0], "", where)
    for format in there:
        if _knows(entries, format, wanted):
            return _of_format(entries, format, wanted, where)
    format, _, variant = wanted.lower().partition("-")
    if format not in FORMATS:
        return _of_format(entries, there[0], wanted, where)
    if format not in there:
        raise NotFound(f"{where} has no model in the format {format}", hint=f"It has: {', '.join(there)}.")
    found = _of_format(entries, format, variant, where)
    return Selection(wanted.lower(), found.parts)


def _has(entries: Sequence[Entry], format: str) -> bool:
    return bool(choices(entries)) if format == "gguf" else bool(_VARIANTS[format](entries))


def _knows(entries: Sequence[Entry], format: str, tag: str) -> bool:
    if format == "gguf":
        return bool(tagged(choices(entries), tag))
    return any(tag.lower() in variant.names for variant in _VARIANTS[format](entries))


def _of_format(entries: Sequence[Entry], format: str, tag: str, where: str) -> Selection:
    if format == "gguf":
        return _gguf(entries, choose(entries, tag, where))
    chosen = pick(_VARIANTS[format](entries), tag, where)
    return _with_companions(entries, chosen, chosen.label if tag else "", where)


def _dduf_variants(entries: Sequence[Entry]) -> list[Variant]:
    found = [e for e in entries if format_of(e.path) == "dduf"]
    return [Variant(name_of(e.path)[: -len(".dduf")].lower(), (e,), sure=len(found) == 1) for e in found]


def _ggml_variants(entries: Sequence[Entry]) -> list[Variant]:
    """Whisper's: each size and quantization is one file, ``ggml-base.en-q5_1.bin``."""
    found = [(e, match["name"].lower()) for e in entries if format_of(e.path) == "ggml" and (match := _ggml(e))]
    return [Variant(name, (e,), sure=len(found) == 1) for e, name in sorted(found, key=lambda f: f[0].size)]


def _ggml(entry: Entry) -> re.Match[str] | None:
    return _GGML.fullmatch(name_of(entry.path))


_VARIANTS: dict[str, Callable[[Sequence[Entry]], list[Variant]]] = {
    "safetensors": safetensors_variants,
    "onnx": onnx_variants,
    "dduf": _dduf_variants,
    "ggml": _ggml_variants,
}


def _gguf(entries: Sequence[Entry], model: Choice) -> Selection:
    """GGUF holds all that a model needs: beside it only a projector and the licence are of use."""
    parts = [Part(e, name_of(e.path), "weights", "gguf") for e in model.entries]
    if (eye := projector(entries, model)) is not None:
        parts.append(Part(eye, name_of(eye.path), "mmproj", "gguf"))
    for entry in entries:
        if "/" not in entry.path and entry.size <= MAX_SMALL and classify(entry.path)[0] == "license":
            parts.append(Part(entry, entry.path, "license"))
    return Selection(model.label, tuple(parts))


def _by_path(entries: Sequence[Entry], tag: str, where: str, path: str) -> Selection:
    """The model that a file belongs to: with its other shards, its projector, its small files."""
    if not any(e.path == path for e in entries):
        raise NotFound(f"{where} has no file {path}", hint="Upper and lower case count.")
    if tag:
        raise UsageError("a file and a tag were given", hint="Name either the file or a quantization.")
    for model in choices(entries):
        if any(e.path == path for e in model.entries):
            return _gguf(entries, complete(model, where))
    for variant in (v for variants in _VARIANTS.values() for v in variants(entries)):
        if any(e.path == path for e in variant.weights):
            return _with_companions(entries, variant, variant.label, where)
    raise UsageError(
        f"{path} of {where} is not a model's weights",
        hint="Name a .gguf, .safetensors, .onnx, .dduf or ggml-….bin file.",
    )


# --- what belongs to the weights --------------------------------------------------------------------------------------


def _with_companions(entries: Sequence[Entry], chosen: Variant, label: str, where: str) -> Selection:
    weights = {e.path for e in chosen.weights}
    _check(weights, where)
    parts = [Part(e, e.path, "weights", format_of(e.path) or "data") for e in chosen.weights]
    folders = {"", *(folder_of(path) for path in weights)}
    for entry in sorted(entries, key=lambda e: e.path):
        if entry.path not in weights and (role := _companion(entry, folders, chosen)) is not None:
            parts.append(Part(entry, entry.path, role))
    return Selection(label, tuple(parts))


def _check(weights: set[str], where: str) -> None:
    """Refuse what could not be used, before gigabytes of it are fetched."""
    if all(name_of(path) == "adapter_model.safetensors" for path in weights):
        raise UsageError(
            f"{where} holds an adapter (LoRA), not a model", hint="Pull the model that it was made for; see its page."
        )
    for path in weights:
        found = _SHARD.fullmatch(path)
        count = int(found[3]) if found else 0
        here = {p for p in weights if found and p.startswith(f"{found[1]}-") and found[3] in p}
        if found and len(here) != count:
            raise CorruptData(
                f"{where} has {len(here)} of the {count} parts of {found[1]}",
                hint="Its upload may not be finished: try again later, or choose another tag.",
            )


def _companion(entry: Entry, folders: set[str], chosen: Variant) -> Role | None:
    """The role of a file that a model needs beside its weights; None for all else."""
    folder = folder_of(entry.path)
    near = (
        folder in folders
        or _MODULES.fullmatch(entry.path)
        or (chosen.pipeline and not _ASIDE_FOLDERS.fullmatch(folder.partition("/")[0]))
    )
    if not near or entry.size > MAX_SMALL or _ASIDE.fullmatch(entry.path) or entry.path.lower().endswith(_PICKLES):
        return None
    if entry.path.endswith(".index.json") and entry.path not in chosen.indexes:
        return None
    role, format = classify(entry.path)
    if format or role in ("dataset", "other"):
        return None
    return role if role != "doc" or (name_of(entry.path).lower() == "readme.md" and not folder) else None


# --- refusals ---------------------------------------------------------------------------------------------------------


def _nothing(entries: Sequence[Entry], where: str) -> NotFound | UsageError:
    pickles = [e for e in entries if e.path.lower().endswith(_PICKLES)]
    if pickles:
        listed = ", ".join(f"{e.path} ({human(e.size)})" for e in sorted(pickles, key=lambda e: -e.size)[:3])
        return UsageError(
            f"{where} holds its weights only as pickles or in formats of old, which can run code when they are loaded: "
            f"{listed}",
            hint="Look for the same model with .safetensors or .gguf files, in another repository or branch.",
        )
    if any(is_projector(e.path) for e in entries):
        return NotFound(f"{where} holds a projector but no model", hint="Pull the repository of its model.")
    return NotFound(
        f"{where} holds no model: no GGUF, safetensors, ONNX, DDUF or ggml-….bin file",
        hint="Search for a repository of the same model whose name ends in -GGUF.",
    )
