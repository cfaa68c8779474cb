"""Package a model: take its files into the store, read their headers, write its documents, give it a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.events import Listener, Note, PullProgress, ignore
from pierhead.formats.gguf import read_file
from pierhead.formats.summarize import READABLE, check_file
from pierhead.package.archive import packed
from pierhead.package.inputs import Input, Inputs
from pierhead.package.modelfile import is_go_template
from pierhead.package.recipe import Recipe, chosen, joined, merged
from pierhead.sources.check import check
from pierhead.store.describe import summary_of
from pierhead.store.documents import About, digest_of, write
from pierhead.store.files import os_errors
from pierhead.store.layers import config_of
from pierhead.store.layout import Store
from pierhead.store.manifest import Manifest
from pierhead.store.media import HEAVY, PYTHON, UNSAFE
from pierhead.store.model import Blob, ModelFile, ModelRecord

MAX_TEMPLATE = 1 << 20
_BASE_DIGEST = "org.opencontainers.image.base.digest"
_BASE_NAME = "org.opencontainers.image.base.name"


def package(store: Store, recipe: Recipe, listener: Listener = ignore) -> ModelRecord:
    """Make the model of a recipe; its record.

    Of a base in the store no byte of weights is read, copied or hashed. Packaging the same again gives the model that
    is there. CorruptData and UsageError say which file cannot be used.
    """
    base = recipe.base if isinstance(recipe.base, ModelRecord) else None
    with store.lease():
        unsafe = _gate(recipe, listener)
        if isinstance(recipe.base, Inputs):
            summary = _summary(recipe.base)
            files: tuple[ModelFile, ...] = tuple(_take(store, file, recipe, listener) for file in recipe.base.files)
            if recipe.base.left_out:
                names = ", ".join(recipe.base.left_out[:5])
                listener(Note(message=f"left out, as the same weights are there as safetensors: {names}"))
        else:
            summary, files = dict(recipe.base.metadata), recipe.base.files
        _check_extras(recipe.extras, summary)
        extras = tuple(_take(store, file, recipe, listener) for file in recipe.extras)
        files = joined(files, extras)
        summary |= _own_template(recipe.extras)
        folder = isinstance(recipe.base, Inputs) and recipe.base.folder
        format = chosen(recipe.format, files, base.config_type if base else "", folder=folder)
        unpacked = base.unpacked if base else ()
        if format == "docker-v0.1":
            files, unpacked = _legacy(store, files, unpacked, summary)
        beside = {
            "summary": msgspec.to_builtins(summary),
            "unpacked": msgspec.to_builtins(unpacked),
            "source": base.source if base else "",
        }
        about = _about(store, recipe, summary, files, base, unsafe)
        present = _present(store, recipe.name)
        if present is not None:
            again = write(format, files, dataclasses.replace(about, created=present.created))
            if digest_of(again.manifest) == present.digest:
                return present
        made = write(format, files, about)
        return store.commit_artifact(recipe.name, made.manifest, made.config, beside, by="package", aside=recipe.aside)


def _summary(inputs: Inputs) -> dict[str, Any]:
    """The summary of files before they are taken in, so that a bad one is refused before it is hashed."""
    paths = {file.name: file.path for file in inputs.files}
    with os_errors("cannot read the model's files"):
        files = [ModelFile(f.name, f.path.stat().st_size, f.role, format=f.format) for f in inputs.files]
    for file in inputs.files:
        if file.role in HEAVY - {"weights"}:
            _check_added(file, None)
    return msgspec.to_builtins(summary_of(files, paths))


def _take(store: Store, file: Input, recipe: Recipe, listener: Listener) -> ModelFile:
    size = file.path.stat().st_size
    listener(PullProgress(name=recipe.name, file=file.name, done=0, total=size))
    if file.digest and store.blobs.claim(file.digest):
        blob = Blob(file.digest, size)
    else:
        blob = store.adopt_file(file.path, link=recipe.link and file.role in HEAVY)
    listener(PullProgress(name=recipe.name, file=file.name, done=blob.size, total=blob.size))
    if blob.note:
        listener(Note(message=blob.note))
    return ModelFile(file.name, blob.size, file.role, blob.digest, file.format, scale=file.scale)


def _gate(recipe: Recipe, listener: Listener) -> str:
    """Refuse files that run code, unless that is allowed; the text that remembers what was."""
    files = (*(recipe.base.files if isinstance(recipe.base, Inputs) else ()), *recipe.extras)
    found, allowed = check(
        [(f.name, f.path) for f in files],
        allow=recipe.allow_unsafe,
        again="the same command with --allow-unsafe",
        vouched=True,
    )
    code = {f.name for f in files if f.role == "code"} if any(f.format == PYTHON for f in files) else set[str]()
    for finding in found:
        if finding.file in code:  # that is what is packaged
            continue
        listener(Note(message=f"{finding.file}: {finding.reason}", level="warning"))
    return allowed


# --- what is added ------------------------------------------------------------------------------------------------


def _check_extras(extras: Sequence[Input], summary: Mapping[str, Any]) -> None:
    for file in extras:
        if file.role in ("lora", "mmproj"):
            if summary.get("format") != "gguf":
                raise UsageError(
                    f"{file.path} cannot be added: the model's weights are {summary.get('format')}, not GGUF",
                    hint="LoRAs and projectors are added to GGUF models; put other ones into the model's folder.",
                )
            _check_added(file, str(summary.get("architecture")))
        elif file.role == "template":
            _check_template(file.path)


def _check_added(file: Input, architecture: str | None) -> None:
    """A LoRA or projector must be one, and of the model's own architecture."""
    if file.format not in READABLE:
        return
    check_file(file.path, file.format)
    if file.format != "gguf" or file.role == "draft":
        return
    about = read_file(file.path).metadata
    kind, family = about.get("general.type"), about.get("general.architecture")
    if file.role == "mmproj" and family != "clip" and kind != "mmproj":
        raise CorruptData(f"{file.path} is not a projector: its header says {family}", hint="Name an mmproj file.")
    if file.role != "lora":
        return
    if kind != "adapter" or about.get("adapter.type", "lora") != "lora":
        raise CorruptData(
            f"{file.path} is not a LoRA: its header says {kind or family}",
            hint="Make one from safetensors with llama.cpp's convert_lora_to_gguf.py.",
        )
    if architecture is not None and family != architecture:
        raise UsageError(
            f"{file.path} is a LoRA for {family}, the model is {architecture}", hint="Name one that fits the model."
        )


def _check_template(path: Path) -> None:
    with os_errors(f"cannot read {path}"):
        data = path.read_bytes() if path.stat().st_size <= MAX_TEMPLATE else b""
    if not data.strip():
        raise UsageError(f"{path} is empty, or larger than a chat template may be", hint="Name a Jinja file.")
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not UTF-8 text", hint="Name a Jinja file.") from exc
    if is_go_template(text):
        raise UsageError(f"{path} is a template of Go, as Ollama has them, and not Jinja", hint="Name a Jinja file.")


def _own_template(extras: Sequence[Input]) -> dict[str, str]:
    own = [file for file in extras if file.role == "template"]
    return {"chat_template": own[-1].path.read_text("utf-8")} if own else {}


# --- documents ----------------------------------------------------------------------------------------------------


def _legacy(
    store: Store, files: tuple[ModelFile, ...], unpacked: tuple[ModelFile, ...], summary: Mapping[str, Any]
) -> tuple[tuple[ModelFile, ...], tuple[ModelFile, ...]]:
    if summary.get("format") not in ("gguf", "safetensors", "dduf"):
        raise UsageError(
            f"Docker's v0.1 has no place for a model in {summary.get('format')}", hint="Use --format docker or cncf."
        )
    files, members = packed(store, files)
    return files, (*unpacked, *members)


def _about(
    store: Store,
    recipe: Recipe,
    summary: Mapping[str, Any],
    files: Sequence[ModelFile],
    base: ModelRecord | None,
    unsafe: str,
) -> About:
    annotations, header, diff_ids = dict(recipe.annotations), dict[str, str](), dict[str, str]()
    packaged = recipe.packaged
    if base is None:
        header = store.header_text(files)
    else:
        annotations = {_BASE_NAME: base.name, _BASE_DIGEST: base.digest, **annotations}
        unsafe = "; ".join(text for text in (base.annotations.get(UNSAFE, ""), unsafe) if text)
        packaged = merged(base.packaged, packaged)
        config, header = _base_config(store, base)
        diff_ids = _diff_ids(config, base)
    if unsafe:
        annotations[UNSAFE] = unsafe
    return About(summary, recipe.created, packaged, annotations, header, recipe.name, diff_ids)


def _base_config(store: Store, base: ModelRecord) -> tuple[dict[str, Any], dict[str, str]]:
    """The base's config, and the metadata that Docker's tells of the weights: their header is not read again."""
    document = msgspec.json.decode(_manifest(store, base), type=Manifest)
    config = config_of(store.blob_path(document.config.digest).read_bytes())
    about: Any = config.get("config")
    told: Any = cast("dict[str, Any]", about).get(str(base.metadata.get("format"))) if isinstance(about, dict) else None
    pairs = cast("dict[str, Any]", told).items() if isinstance(told, dict) else ()
    return config, {key: value for key, value in pairs if isinstance(value, str)}


def _diff_ids(config: dict[str, Any], base: ModelRecord) -> dict[str, str]:
    """The digests of layers as they are uncompressed, by their own."""
    for key, inner in (("rootfs", "diff_ids"), ("modelfs", "diffIds")):
        section: Any = config.get(key)
        listed: Any = cast("dict[str, Any]", section).get(inner) if isinstance(section, dict) else None
        if isinstance(listed, list) and len(cast("list[object]", listed)) == len(base.files):
            pairs = zip(base.files, cast("list[object]", listed), strict=True)
            return {f.digest: str(found) for f, found in pairs if f.packing != "raw"}
    return {}


def _present(store: Store, name: str) -> ModelRecord | None:
    try:
        found = store.get(name)
    except (NotFound, CorruptData):
        return None
    return found if found.name == name else None


def _manifest(store: Store, record: ModelRecord) -> bytes:
    data = store.blob_path(record.digest).read_bytes()
    if digest_of(data) != record.digest:
        raise CorruptData(f"the manifest of '{record.name}' is damaged", hint=f"Type `pier pull {record.name}`.")
    return data
