"""A Modelfile that was read, made into files to add and settings; texts of its own become files in a scratch folder."""

from __future__ import annotations

import sys
from pathlib import Path

from pierhead.errors import NotFound, UsageError
from pierhead.package import inputs
from pierhead.package.modelfile import MAX_SIZE, Modelfile, parse
from pierhead.store.files import os_errors
from pierhead.store.model import Packaged


def read(path: Path, *, template_elsewhere: bool) -> tuple[Path, Modelfile]:
    """The Modelfile at a path (``-``: stdin) and the folder that its paths start from."""
    if str(path) == "-":
        return Path(), parse(sys.stdin.read(MAX_SIZE + 1), template_elsewhere=template_elsewhere)
    if not path.is_file():
        raise NotFound(f"no such file: {path}", hint="Name a Modelfile.")
    with os_errors(f"cannot read {path}"):
        data = path.read_bytes()
    try:
        return path.parent, parse(data.decode(), template_elsewhere=template_elsewhere)
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not text", hint="Name a Modelfile.") from exc


def apply(made: Modelfile, folder: Path, scratch: Path) -> tuple[tuple[inputs.Input, ...], Packaged]:
    """Files to add, relative to ``folder``, and how the model is to run."""
    found: list[inputs.Input] = []
    for adapter in made.adapters:
        path = folder / Path(adapter).expanduser()
        if path.is_dir() or path.suffix == ".safetensors":
            raise UsageError(f"{path} is not a LoRA in GGUF", hint="Make one with llama.cpp's convert_lora_to_gguf.py.")
        found.append(inputs.single(path, "lora", format="gguf"))
    if made.template:
        found.append(inputs.single(_kept(scratch, "template.jinja", made.template), "template"))
    for number, text in enumerate(made.licenses):
        path = folder / text
        beside = len(text) < 256 and "\n" not in text and path.is_file()
        kept = path if beside else _kept(scratch, f"LICENSE.{number}", text)
        found.append(inputs.single(kept, "license", name=path.name if beside else "LICENSE"))
    packaged = Packaged(
        context=made.context, options=made.parameters, system=made.system, messages=tuple(made.messages)
    )
    return tuple(found), packaged


def _kept(scratch: Path, name: str, text: str) -> Path:
    path = scratch / name
    path.write_text(text, "utf-8")
    return path
