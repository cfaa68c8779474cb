"""Ollama's model documents: the name, the manifest, its small layers, and what they are to us; pure.

Source: the Go code of Ollama (packages manifest, types/model, server, api).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from pierhead.errors import BadReference, CorruptData, UsageError
from pierhead.refs import Reference
from pierhead.sources.foreign import decode, text
from pierhead.store.blobs import DIGEST
from pierhead.store.model import Role

HOST = "registry.ollama.ai"
TYPE = "application/vnd.ollama.image."
MAX_MANIFEST = 4 << 20
MAX_LAYERS = 1024
MAX_SMALL = 256 << 10  # a template, parameters, messages: what is read into memory and kept beside the model

# Part of the type → role and file name; more of one kind are numbered.
_FILES: dict[str, tuple[Role, str]] = {
    "model": ("weights", "model.gguf"),
    "projector": ("mmproj", "mmproj.gguf"),
    "adapter": ("lora", "adapter.gguf"),
    "draft": ("draft", "draft.gguf"),
    "license": ("license", "LICENSE"),
}
_DOCUMENTS = {
    "template": "template",
    "prompt": "template",
    "system": "system",
    "params": "params",
    "messages": "messages",
}
# Ollama's parameters by what the engine calls them, and their type; others are for one machine, or of the past.
_OPTIONS: dict[str, tuple[str, type]] = {
    "temperature": ("sampling.temp", float),
    "top_k": ("sampling.top_k", int),
    "top_p": ("sampling.top_p", float),
    "min_p": ("sampling.min_p", float),
    "typical_p": ("sampling.typ_p", float),
    "repeat_penalty": ("sampling.penalty_repeat", float),
    "repeat_last_n": ("sampling.penalty_last_n", int),
    "presence_penalty": ("sampling.penalty_present", float),
    "frequency_penalty": ("sampling.penalty_freq", float),
    "mirostat": ("sampling.mirostat", int),
    "mirostat_tau": ("sampling.mirostat_tau", float),
    "mirostat_eta": ("sampling.mirostat_eta", float),
    "seed": ("sampling.seed", int),
    "num_predict": ("n_predict", int),
    "num_keep": ("n_keep", int),
    "stop": ("antiprompt", list),
}
MAX_STOPS = 64
_PART = re.compile(r"\w[\w.-]{0,79}", re.ASCII)
_SPACE = re.compile(r"\w[\w-]{0,79}", re.ASCII)
_HOST = re.compile(r"\w[\w.:-]{0,349}", re.ASCII)


@dataclass(frozen=True)
class OllamaName:
    """A full name, as Ollama's folders and registry spell it."""

    host: str
    space: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        parts = (_HOST, self.host), (_SPACE, self.space), (_PART, self.model), (_PART, self.tag)
        if not all(pattern.fullmatch(text) and ".." not in text for pattern, text in parts):
            raise BadReference(f"not a name of Ollama's: {self.short[:120]!r}", hint="Write ollama://name:tag.")

    @property
    def short(self) -> str:
        """The name as Ollama lists it."""
        place = "" if self.host == HOST else f"{self.host}/"
        space = "" if not place and self.space == "library" else f"{self.space}/"
        return f"{place}{space}{self.model}:{self.tag}"

    @property
    def repository(self) -> str:
        return f"{self.space}/{self.model}"

    @property
    def ours(self) -> str:
        """What the model is called in our store."""
        return self.short.removesuffix(":latest")


def ollama_name(reference: Reference) -> OllamaName:
    """The full name that an ``ollama:`` reference means."""
    *front, model = reference.repo.split("/")
    host = front[0] if len(front) > 1 else HOST
    space = front[-1] if front else "library"
    return OllamaName(host, space, model, reference.tag or "latest")


class OllamaLayer(msgspec.Struct, rename="camel"):
    """A layer; ``name`` is a tensor's or a file's where a model is stored in such pieces."""

    media_type: str = ""
    digest: str = ""
    size: int = 0
    name: str = ""

    @property
    def kind(self) -> str:
        """The part of the type that tells layers apart; empty for types that are not Ollama's."""
        return self.media_type.removeprefix(TYPE) if self.media_type.startswith(TYPE) else ""


class OllamaManifest(msgspec.Struct, rename="camel"):
    """A manifest in Docker's schema 2, with Ollama's layers."""

    layers: list[OllamaLayer]
    config: OllamaLayer = msgspec.field(default_factory=OllamaLayer)


class _Config(msgspec.Struct):
    model_format: str = ""
    remote_host: str = ""
    renderer: str = ""
    parser: str = ""


@dataclass(frozen=True)
class Part:
    """A layer that becomes a file of the model."""

    name: str
    role: Role
    digest: str
    size: int


@dataclass(frozen=True)
class Parts:
    """What a manifest holds: files, and the small documents by what they are."""

    files: tuple[Part, ...]
    documents: Mapping[str, OllamaLayer]

    @property
    def everything(self) -> list[tuple[str, int]]:
        """Digest and size of each blob that is needed."""
        return [(p.digest, p.size) for p in self.files] + [(d.digest, d.size) for d in self.documents.values()]


def read_manifest(data: bytes, where: str) -> OllamaManifest:
    """A manifest whose parts have proper digests and sizes; CorruptData for any other."""
    found = decode(data, OllamaManifest, f"the manifest of {where}")
    if len(found.layers) > MAX_LAYERS and not any(x.kind == "tensor" for x in found.layers):
        raise CorruptData(f"{where} has more than {MAX_LAYERS} layers")
    for one in (*found.layers, *([found.config] if found.config.digest else [])):
        if not DIGEST.fullmatch(one.digest) or not 0 <= one.size < 1 << 63:
            raise CorruptData(f"{where} has a manifest with a part that is not named by a sha256 digest and a size")
    return found


def check_config(data: bytes, where: str) -> str:
    """Refuse what has no weights to run here; the name of the built-in renderer where the model wants one."""
    config = decode(data, _Config, f"the config of {where}")
    if config.remote_host:
        raise UsageError(
            f"{where} runs in Ollama's cloud: it has no weights that could be pulled", hint="Choose another tag."
        )
    if config.model_format not in ("", "gguf"):
        raise UsageError(
            f"{where} is stored as {config.model_format[:40]}, which only Ollama's own engine reads", hint=_GGUF
        )
    return (config.renderer or config.parser)[:80]


_GGUF = "Choose a tag whose weights are GGUF, or the model's repository: hf:org/repo."


def parts_of(manifest: OllamaManifest, where: str) -> Parts:
    """What each layer is; UsageError for kinds that cannot be used."""
    files: list[Part] = []
    documents: dict[str, OllamaLayer] = {}
    odd: set[str] = set()
    for layer in manifest.layers:
        if layer.kind in _FILES:
            files.append(_part(layer, files))
        elif layer.kind in _DOCUMENTS:
            documents[_DOCUMENTS[layer.kind]] = layer  # of several the last counts, as for Ollama
        elif layer.kind != "embed":  # stored answers of long ago: Ollama leaves them out too
            odd.add(layer.media_type)
    if TYPE + "tensor" in odd:
        raise UsageError(f"{where} is stored tensor by tensor, which only Ollama's own engine reads", hint=_GGUF)
    if odd:
        listed = ", ".join(sorted(odd))[:300]
        raise UsageError(f"{where} has layers of a kind that cannot be used: {listed}", hint=_GGUF)
    weights = sum(part.role == "weights" for part in files)
    if weights != 1:
        said = "holds no model's weights" if not weights else "holds several models' weights"
        raise UsageError(f"{where} {said}", hint=_GGUF)
    return Parts(tuple(files), documents)


def _part(layer: OllamaLayer, before: Sequence[Part]) -> Part:
    role, name = _FILES[layer.kind]
    number = sum(part.role == role for part in before)
    if number:
        stem, dot, ending = name.partition(".")
        name = f"{stem}-{number + 1}{dot}{ending}"
    return Part(name, role, layer.digest, layer.size)


@dataclass(frozen=True)
class Settings:
    """What comes with the weights: a context size in tokens (0: not said), the engine's options, how chats begin.

    ``left_out`` are parameters that are not carried over.
    """

    context: int = 0
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    system: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What there is of it, JSON-safe."""
        found: dict[str, Any] = {"context": self.context, "options": dict(self.options), "system": self.system}
        found["messages"] = [dict(message) for message in self.messages]
        return {key: value for key, value in found.items() if value}


def settings_of(documents: Mapping[str, bytes], where: str) -> Settings:
    """The settings in a model's parameters, system prompt and messages; CorruptData for what is not theirs."""
    params: dict[str, Any] = {}
    if documents.get("params"):
        params = decode(documents["params"], dict[str, Any], f"the parameters of {where}")
    messages: list[_Message] = []
    if documents.get("messages"):
        messages = decode(documents["messages"], list[_Message], f"the messages of {where}")
    options, left_out = _options(params)
    context = params.get("num_ctx")
    return Settings(
        context if type(context) is int and 0 < context < 1 << 31 else 0,
        options,
        text(documents.get("system", b""), f"the system prompt of {where}"),
        tuple({"role": m.role, "content": m.content} for m in messages),
        left_out,
    )


class _Message(msgspec.Struct):
    role: str
    content: str = ""


def _options(params: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The parameters as the engine's options, and the names of those that have no place there."""
    options: dict[str, Any] = {}
    left_out: list[str] = []
    for key, value in sorted(params.items()):
        name, kind = _OPTIONS.get(key, ("", type(None)))
        if name and (fit := _fitting(value, kind)) is not None:
            options[name] = fit
        elif key != "num_ctx":
            left_out.append(key[:40])
    return options, tuple(left_out[:20])


def _fitting(value: Any, kind: type) -> Any:
    """The value where it is of the kind; None for others."""
    if kind is list:
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        return items if len(items) <= MAX_STOPS and all(isinstance(i, str) and i for i in items) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
        return None
    return kind(value)
