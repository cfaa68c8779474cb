"""The model repository that tritonserver gets of a model's files, as data for its entry program; pure.

A repository is ``NAME/config.pbtxt`` and ``NAME/VERSION/model.…``. A model may be one, be one model of such, or be a
bare ONNX file or TensorRT plan.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from pierhead.errors import UsageError
from pierhead.store.model import ModelFile

CONFIG = "config.pbtxt"
_LLM = re.compile(r"(^|/)rank\d+\.engine$")  # TensorRT-LLM, which serves these itself
BARE = {"onnx": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}


class Served(msgspec.Struct, frozen=True):
    """One model of the repository: ``files`` by their place below it, ``config`` by top-level field of its text."""

    name: str
    files: dict[str, str]
    config: dict[str, str]
    threads: int = 0


class Repository(msgspec.Struct, frozen=True):
    """All of them, and the one that is meant by the Pierhead model's own name."""

    models: tuple[Served, ...]
    main: str
    notes: tuple[str, ...] = ()


def roots(files: tuple[ModelFile, ...]) -> dict[str, list[str]]:
    """The folders that are models of a repository, with the names of the files below each."""
    found: set[str] = set()
    for file in files:
        folder, name = posixpath.split(file.name)
        if name == CONFIG:
            found.add(folder)
        elif name.startswith("model.") and posixpath.basename(folder).isdecimal():
            found.add(posixpath.dirname(folder))
    tops = {root for root in found if not any(root != other and _below(root, other) for other in found)}
    return {root: sorted(f.name for f in files if _below(f.name, root)) for root in sorted(tops)}


def bare(files: tuple[ModelFile, ...]) -> list[ModelFile]:
    """The weights that can be served without being a repository, the likeliest first."""
    found = [f for f in files if f.role == "weights" and f.format in BARE and not _LLM.search(f.name)]
    return sorted(found, key=lambda f: (f.name.count("/"), posixpath.basename(f.name) != BARE[f.format][1], f.name))


def plan(model: str, files: tuple[ModelFile, ...], settings: Mapping[str, Any]) -> Repository:
    """The repository; UsageError where a setting names what is not there."""
    config, threads = configuration(settings), int(settings.get("threads", 0))
    name = slug(model)
    below = roots(files)
    notes: tuple[str, ...] = ()
    if below and "file" not in settings:
        names = _named(model, tuple(below))
        models = tuple(
            Served(
                names[root],
                {f[len(root) :].lstrip("/"): f for f in inside},
                _fitting(config, inside) | _renamed(root, names[root]),
                threads,
            )
            for root, inside in below.items()
        )
        main = _main(model, models, settings, name)
        if len(models) > 1 and "model" not in settings:
            others = ", ".join(m.name for m in models if m.name != main)
            notes = (f"'{model}' means its model {main}; the others are {model}/models/NAME: {others}",)
    else:
        models, main = (_bare(model, name, files, settings, config, threads),), name
    unknown = [w for w in settings.get("load", ()) if w not in {m.name for m in models}]
    if unknown:
        raise _absent(model, unknown[0], models)
    return Repository(models, main, notes)


def _bare(
    model: str,
    name: str,
    files: tuple[ModelFile, ...],
    settings: Mapping[str, Any],
    config: dict[str, str],
    threads: int,
) -> Served:
    found = bare(files)
    chosen = str(settings.get("file", "")) or (found[0].name if found else "")
    file = next((f for f in found if f.name == chosen), None)
    if file is None:
        names = ", ".join(f.name for f in found) or "none that Triton serves by itself"
        raise UsageError(f"the model '{model}' has no weights '{chosen}'", hint=f"It has: {names}.")
    backend, inside = BARE[file.format]
    folder = posixpath.dirname(file.name)
    beside = {
        f"1/{posixpath.relpath(f.name, folder or '.')}": f.name
        for f in files
        if f.format == "data" and _below(f.name, folder)
    }
    if "dynamic_batching" in config and settings.get("preferred_batch_size") and "max_batch_size" not in config:
        config = {"max_batch_size": f"max_batch_size: {max(settings['preferred_batch_size'])}", **config}
    return Served(name, {f"1/{inside}": file.name, **beside}, {"backend": f'backend: "{backend}"', **config}, threads)


def _main(model: str, models: tuple[Served, ...], settings: Mapping[str, Any], name: str) -> str:
    """Which one is meant: the one asked for, the only one, the only ensemble, the one named alike, the first."""
    names = [m.name for m in models]
    asked = str(settings.get("model", ""))
    if asked:
        if asked not in names:
            raise _absent(model, asked, models)
        return asked
    ensembles = [m.name for m in models if set(m.files) == {CONFIG}]  # nothing but a configuration
    if len(ensembles) == 1:
        return ensembles[0]
    return name if name in names else names[0]


def _absent(model: str, asked: str, models: tuple[Served, ...]) -> UsageError:
    return UsageError(
        f"the repository of '{model}' has no model '{asked}'", hint=f"It has: {', '.join(m.name for m in models)}."
    )


def configuration(settings: Mapping[str, Any]) -> dict[str, str]:
    """Fields of a model's configuration that settings ask for, each in protobuf's text format."""
    found: dict[str, str] = {}
    if "max_batch_size" in settings:
        found["max_batch_size"] = f"max_batch_size: {settings['max_batch_size']}"
    inner = [f"preferred_batch_size: {size}" for size in settings.get("preferred_batch_size", ())]
    if "max_queue_delay_microseconds" in settings:
        inner.append(f"max_queue_delay_microseconds: {settings['max_queue_delay_microseconds']}")
    if "max_queue_size" in settings:
        inner.append(f"default_queue_policy {{ max_queue_size: {settings['max_queue_size']} }}")
    if inner:
        found["dynamic_batching"] = f"dynamic_batching {{ {' '.join(inner)} }}"
    if "instances" in settings or "kind" in settings:
        kind = f" kind: KIND_{settings['kind'].upper()}" if "kind" in settings else ""
        found["instance_group"] = f"instance_group [ {{ count: {settings.get('instances', 1)}{kind} }} ]"
    return found


def _fitting(config: dict[str, str], names: list[str]) -> dict[str, str]:
    """An ensemble runs nothing itself: it has neither batches nor instances of its own."""
    return {} if len(names) == 1 and posixpath.basename(names[0]) == CONFIG else config


def _named(model: str, roots: tuple[str, ...]) -> dict[str, str]:
    """The name of each model by its folder: its last part, or all of it where others end alike."""
    names = {root: slug(posixpath.basename(root) or model) for root in roots}
    counted = Counter(names.values())
    names = {root: slug(root.replace("/", "-")) if counted[name] > 1 and root else name for root, name in names.items()}
    for name, count in Counter(names.values()).items():
        if count > 1:
            alike = ", ".join(root or "." for root in roots if names[root] == name)
            raise UsageError(
                f"the repository of '{model}' has more than one model '{name}': {alike}",
                hint="Give each of its folders a name of its own.",
            )
    return names


def _renamed(root: str, name: str) -> dict[str, str]:
    """The field that says a model's name, which must be its folder's, where that has got another."""
    return {} if posixpath.basename(root) == name else {"name": f'name: "{name}"'}


def slug(model: str) -> str:
    """A name that can be a folder's: the last part of a reference, without its tag."""
    last = model.rsplit("/", 1)[-1].partition("@")[0].partition(":")[0]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last).strip(".-") or "model"


def _below(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(f"{folder}/")
