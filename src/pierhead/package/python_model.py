"""A file or folder of Python as something to package: its files, and the one that says which class is served."""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import UsageError
from pierhead.formats.python_model import FORMAT, NAME, PythonModel
from pierhead.package.inputs import Input, Inputs, custom
from pierhead.package.python_source import Needs, Served, choose, classes, inline, listed, project
from pierhead.sources.installer import Installer
from pierhead.store.files import os_errors

MAX_SOURCE = 4 << 20


@dataclass(frozen=True)
class Program:
    """What was found: the class, its needs, and the files of the model."""

    served: Served
    needs: Needs
    files: tuple[Input, ...]


def is_program(path: Path) -> bool:
    """Whether a path is a Python model: a ``.py`` file, or a folder that has a class with ``load`` to serve."""
    if path.is_file():
        return path.suffix == ".py"
    if not path.is_dir() or any(path.glob("*.gguf")):
        return False
    if (path / "pyproject.toml").is_file() and _project(path).table:
        return True
    try:
        return any(one.loads for file in sorted(path.glob("*.py")) for one in _classes(file, file.stem))
    except UsageError:
        return True  # it is Python, and whoever packages it hears what is wrong


def find(path: Path) -> Program:
    """Read a Python model; UsageError says what of it cannot be served."""
    if path.is_file():
        if not path.stem.isidentifier():
            raise UsageError(f"{path.name} cannot be imported", hint="Name it like a Python module: my_model.py.")
        found = _classes(path, path.stem)
        needs = inline(_text(path), path.name) or _beside(path.parent)
        return Program(choose(found, _wanted(needs), path.name), needs, (Input(path, path.name, "code"),))
    files = tuple(f for f in custom(path).files if f.name != NAME)
    found = [one for file in files if file.name.endswith(".py") for one in _of_folder(file)]
    needs = _beside(path)
    served = choose(found, _wanted(needs), str(path))
    own = next(f for f in files if f.name.endswith(".py") and _module(f.name) == served.module)
    return Program(served, inline(_text(own.path), own.name) or needs, files)


def prepare(
    program: Program,
    settings: Mapping[str, Any],
    scratch: Path,
    server: tuple[str, ...],
    *,
    lock: bool = True,
    pins: dict[tuple[str, ...], tuple[str, ...]] | None = None,
) -> Inputs:
    """The files to package, with the one that says what they are. Asks the package index where there is something to
    pin: the author's requirements together with the ``server``'s. ``pins`` remembers what it said from one to the next.
    """
    served, needs = program.served, program.needs
    if served.single and settings.get("max_batch_size", 1) > 1:
        raise UsageError(
            f"with max_batch_size above 1, predict of {served.cls} gets a list; it takes {served.single}",
            hint=f"Let it take list[{served.single}] and give a list, or leave max_batch_size out.",
        )
    locked: tuple[str, ...] = ()
    if needs.requirements and lock:
        known = pins if pins is not None else {}
        if needs.requirements not in known:
            known[needs.requirements] = tuple(asyncio.run(Installer().lock((*needs.requirements, *server))))
        locked = known[needs.requirements]
    about = PythonModel(
        module=served.module,
        cls=served.cls,
        methods=served.methods,
        tensors=served.tensors,
        python=needs.python,
        requirements=needs.requirements,
        locked=locked,
        locked_for=f"{sys.platform}/{platform.machine()}, Python {sys.version_info.major}.{sys.version_info.minor}"
        if locked
        else "",
        settings=dict(settings),
    )
    path = scratch / NAME
    path.write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=1) + b"\n")
    return Inputs((*program.files, Input(path, NAME, "code", FORMAT)), folder=True)


def settings_of(program: Program) -> dict[str, Any]:
    """The settings that the author wrote: constants of the class, and over them those of ``[tool.pierhead]``."""
    written = {name: value for name, value in program.needs.table.items() if name != "model"}
    return {**program.served.settings, **written}


def _wanted(needs: Needs) -> str:
    wanted = needs.table.get("model", "")
    if not isinstance(wanted, str) or (wanted and ":" not in wanted):
        raise UsageError(f"model = {wanted!r:.60} names no class", hint='Write model = "MODULE:CLASS".')
    return wanted


def _beside(folder: Path) -> Needs:
    """What the files of a folder say: a list of requirements counts before those of the project."""
    found = _project(folder) if (folder / "pyproject.toml").is_file() else Needs()
    file = folder / "requirements.txt"
    if not file.is_file():
        return found
    return Needs(listed(_text(file), file.name), found.python, found.table)


def _project(folder: Path) -> Needs:
    return project(_text(folder / "pyproject.toml"), "pyproject.toml")


def _of_folder(file: Input) -> list[Served]:
    module = _module(file.name)
    return _classes(file.path, module, file.name) if module else []


def _module(name: str) -> str:
    """The module that a file is; "" where it cannot be imported."""
    parts = name.removeprefix("src/").removesuffix(".py").split("/")
    parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
    ours = all(part.isidentifier() for part in parts) and parts[0] not in ("tests", "test", "setup", "conftest")
    return ".".join(parts) if ours else ""


def _classes(path: Path, module: str, shown: str = "") -> list[Served]:
    return classes(_text(path), module, shown or path.name)


def _text(path: Path) -> str:
    with os_errors(f"cannot read {path}"):
        if path.stat().st_size > MAX_SOURCE:
            raise UsageError(f"{path} is larger than {MAX_SOURCE >> 20} MiB", hint="Name the model's own source.")
        data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not UTF-8 text", hint="Save it as UTF-8.") from exc
