"""``/api/create``: a request of Ollama's as a recipe of ours, and the model that is made of it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, cast

import msgspec

from pierhead.errors import NotFound, UsageError
from pierhead.events import Listener, Note
from pierhead.fleet.info import iso
from pierhead.formats.gguf import read_file
from pierhead.package.build import package
from pierhead.package.inputs import Input, Inputs
from pierhead.package.modelfile import MAX_SIZE, PARAMETERS, is_go_template
from pierhead.package.recipe import Recipe
from pierhead.sources.go_template import to_jinja
from pierhead.store.classify import classify
from pierhead.store.layers import check_filepath
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord, Packaged, Role

_ROLES = ("system", "user", "assistant")


class CreateRequest(msgspec.Struct, kw_only=True, rename={"from_": "from"}):
    """What the client sends; ``files`` and ``adapters`` are digests of blobs by file name."""

    model: str = ""
    name: str = ""
    stream: bool | None = None
    from_: str = ""
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    system: str | None = None
    license: str | list[str] | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None
    quantize: str | None = None
    quantization: str | None = None
    remote_host: str | None = None
    draft_files: dict[str, str] | None = None
    renderer: str | None = None
    parser: str | None = None

    @property
    def wanted(self) -> str:
        """The name that the model gets."""
        found = (self.model or self.name).removesuffix(":latest")
        if not found:
            raise UsageError("model is required")
        return found

    def check(self) -> None:
        """UsageError for what is missing, or cannot be done."""
        self.wanted  # noqa: B018
        if not self.from_ and not self.files:
            raise UsageError("neither 'from' or 'files' was specified")
        if self.from_ and self.files:
            raise UsageError("'from' and 'files' exclude each other", hint="Add a LoRA to a model with 'adapters'.")
        if self.quantize or self.quantization:
            raise UsageError(
                "quantize is not supported: Pierhead keeps weights as they are",
                hint="Quantize the GGUF with llama.cpp's llama-quantize, then make the model from that file.",
            )
        for member in ("remote_host", "draft_files", "renderer", "parser"):
            if getattr(self, member):
                raise UsageError(f"{member} is not supported here", hint="Leave it out.")


def recipe(store: Store, body: CreateRequest, base: ModelRecord | None, listener: Listener) -> ModelRecord:
    """Make the model; UsageError and CorruptData say what of the request cannot be used. Blocks."""
    listener(Note(message="reading model metadata"))
    with tempfile.TemporaryDirectory(prefix="pierhead-create-") as name:
        scratch = Path(name)
        extras = [_blob(store, file, digest, "lora") for file, digest in (body.adapters or {}).items()]
        if body.template:
            extras.append(Input(_kept(scratch, "template.jinja", _jinja(body.template)), "template.jinja", "template"))
        licences = [body.license] if isinstance(body.license, str) else body.license or []
        for number, text in enumerate(licences):
            extras.append(Input(_kept(scratch, f"license-{number}", text), "LICENSE", "license"))
        made = Recipe(
            name=body.wanted,
            base=base if base is not None else _inputs(store, body.files or {}),
            created=iso(time.time()),
            extras=tuple(extras),
            packaged=_packaged(body),
        )
        return package(store, made, lambda event: None)


def _packaged(body: CreateRequest) -> Packaged:
    options, context = dict[str, Any](), 0
    for name, value in (body.parameters or {}).items():
        key = PARAMETERS.get(name.lower())
        if key is None:
            raise UsageError(f"there is no parameter '{name[:60]}'", hint=f"Known: {', '.join(sorted(PARAMETERS))}.")
        if key == "context":
            context = _tokens(value)
        elif key == "antiprompt":
            texts = cast("list[Any]", value) if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                raise UsageError("the parameter 'stop' must be a list of strings")
            options[key] = texts
        elif isinstance(value, int | float | str) and value != "":
            options[key] = value
        else:
            raise UsageError(f"the parameter '{name}' must be a number")
    return Packaged(context=context, options=options, system=body.system or "", messages=_messages(body))


def _tokens(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 24:
        raise UsageError("the parameter 'num_ctx' must be a number of tokens")
    return int(value)


def _messages(body: CreateRequest) -> tuple[dict[str, str], ...]:
    made: list[dict[str, str]] = []
    for message in body.messages or ():
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or not isinstance(content, str):
            raise UsageError(f"a message needs a role ({', '.join(_ROLES)}) and a text")
        made.append({"role": str(role), "content": content})
    return tuple(made)


def _jinja(text: str) -> str:
    """The template as Jinja; Ollama's own language where that is exactly the same."""
    if not is_go_template(text):
        return text
    found = to_jinja(text)
    if found is None:
        raise UsageError(
            "this template is one of Go, as Ollama has them, and does what cannot be carried over to Jinja",
            hint="Leave it out to use the model's own, or send one in Jinja.",
        )
    return found


def _inputs(store: Store, files: dict[str, str]) -> Inputs:
    found = tuple(_blob(store, name, digest) for name, digest in sorted(files.items()))
    return Inputs(found, folder=any(file.format != "gguf" for file in found))


def _blob(store: Store, name: str, digest: str, role: Role | None = None) -> Input:
    """A file that the client sent before, or that the store had already."""
    digest = digest.replace("sha256-", "sha256:", 1)
    try:
        path = store.blob_path(digest)
    except NotFound as exc:
        raise UsageError(
            f"the file {name[:100]} was not sent: {digest[:80]}", hint=f"POST /api/blobs/{digest}"
        ) from exc
    check_filepath(name)
    with path.open("rb") as file:
        gguf = file.read(4) == b"GGUF"
    if role is None:
        role, format = ("weights", "gguf") if gguf else classify(name)
        if gguf and read_file(path).metadata.get("general.architecture") == "clip":
            role = "mmproj"
    else:
        format = "gguf" if gguf else ""
    if role == "lora" and not gguf:
        raise UsageError(f"{name} is not a LoRA in GGUF", hint="Make one with llama.cpp's convert_lora_to_gguf.py.")
    return Input(path, name if not gguf or name.endswith(".gguf") else f"{name}.gguf", role, format, digest=digest)


def _kept(scratch: Path, name: str, text: str) -> Path:
    if len(text) > MAX_SIZE:
        raise UsageError(f"a text of the request is longer than {MAX_SIZE >> 20} MiB")
    path = scratch / name
    path.write_text(text, "utf-8")
    return path
