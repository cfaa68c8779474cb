"""A recipe: what goes into a model, and how its files come together; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from pierhead.package.inputs import Input, Inputs
from pierhead.store.documents import Format
from pierhead.store.media import CNCF_CONFIG, CONFIG, CONFIG_V02
from pierhead.store.model import ModelFile, ModelRecord, Packaged, Role

Wanted = Literal["", "docker", "docker-v0.1", "docker-v0.2", "cncf"]
_LEGACY = frozenset({"weights", "mmproj", "lora", "draft", "template", "license"})
_LEGACY_FORMATS = frozenset({"gguf", "safetensors", "dduf"})
_ALONE: frozenset[Role] = frozenset({"template", "mmproj"})


@dataclass(frozen=True)
class Recipe:
    """``base`` is a model of the store, or files of this machine; ``extras`` are added to it.

    ``format`` empty: the base's own, else Docker's. ``created`` is RFC 3339.
    """

    name: str
    base: Inputs | ModelRecord
    created: str
    extras: tuple[Input, ...] = ()
    packaged: Packaged = Packaged()
    format: Wanted = ""
    link: bool = False
    allow_unsafe: bool = False  # take in files that run code of their author
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    aside: bool = False  # beside what the name means, as another version of it


def merged(base: Packaged, new: Packaged) -> Packaged:
    """How the model is to run: what is said now counts before what the base said."""
    return Packaged(
        context=new.context or base.context,
        options={**base.options, **new.options},
        system=new.system or base.system,
        messages=new.messages or base.messages,
    )


def joined(files: Sequence[ModelFile], extras: Sequence[ModelFile]) -> tuple[ModelFile, ...]:
    """The base's files and those that are added: a template or projector takes the place of the one before.

    A file that is there already, with the same bytes in the same role, is not there twice; names stay apart.
    """
    replaced = {extra.role for extra in extras} & _ALONE
    made = [file for file in files if file.role not in replaced]
    for extra in extras:
        made = [f for f in made if not (f.digest == extra.digest and f.role == extra.role)]
        taken = {f.name.casefold() for f in made}
        made.append(msgspec.structs.replace(extra, name=_free(extra.name, taken)))
    return tuple(made)


def chosen(wanted: Wanted, files: Sequence[ModelFile], base: str, *, folder: bool) -> Format:
    """The specification to follow; ``base`` is the media type of the base's config, empty for files."""
    if wanted in ("docker-v0.1", "docker-v0.2", "cncf"):
        return wanted
    if not wanted and base == CNCF_CONFIG:
        return "cncf"
    if base == CONFIG_V02 or folder:
        return "docker-v0.2"
    weights = {f.format for f in files if f.role == "weights"}
    plain = all(f.role in _LEGACY and "/" not in f.name for f in files) and weights <= _LEGACY_FORMATS
    return "docker-v0.1" if base == CONFIG or (plain and weights) else "docker-v0.2"


def settings_of(raw: Mapping[str, Any]) -> Packaged:
    """Engine settings in canonical form as what a model is packaged with: the context is a setting of its own."""
    options = dict(raw)
    context = int(options.pop("context", 0) or 0)
    return Packaged(context=context, options=options)


def _free(name: str, taken: set[str]) -> str:
    head, slash, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    found, number = name, 1
    while found.casefold() in taken:
        number += 1
        found = f"{head}{slash}{stem}-{number}{dot}{ending}"
    return found
