"""What goes into an engine image: the pinned wheels, fetched on the host, and a reproducible build context."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pierhead.engines.base import ImageRecipe
from pierhead.errors import RuntimeUnavailable, SourceUnavailable
from pierhead.runtimes.environment import ONE_INDEX, TORCH, only_from

SITE = "opt/engine/site"
GLIBC = (2, 28)  # what installed wheels may ask for to be copied: every base image of the last years has it
FETCH_LIMIT = 1800.0

# How installers begin a script: with the Python itself, or by way of a shell where its path is too long.
_SHEBANG = re.compile(rb"\A#!(?:[^\n]*python[^\n]*\n|/bin/sh\n'{3}exec' [^\n]*python[^\n]*\n' '{3}\n)")

# Wheels lean on these; slim Python images lack them, so this machine's own are offered as a fallback.
LIBRARIES = ("libgomp.so.1",)
LIBRARY_PLACES = ("/usr/lib/{machine}-linux-gnu", "/lib/{machine}-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib")

# Run as `python -I FOLDER`: the folder comes first on the module path, even in isolated mode.
LAUNCHER = """import ctypes
import glob
import os
import runpy

site = "/opt/engine/site"
os.environ["PYTHONPATH"] = site  # of programs that the entry starts; this one is isolated
os.environ["PATH"] = site + "/bin:" + os.environ.get("PATH", os.defpath)
for path in glob.glob("/opt/engine/lib/*"):
    try:
        ctypes.CDLL(os.path.basename(path), ctypes.RTLD_GLOBAL)
    except OSError:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
entry = "/opt/engine/entry"
runpy.run_path(entry if os.path.isdir(entry) else entry + ".py", run_name="__main__")
"""

DOCKERFILE = """FROM {base}
COPY opt/ /opt/
ENV PYTHONDONTWRITEBYTECODE=1 LANG=C.UTF-8
WORKDIR /
USER 65532:65532
"""


def gather(recipe: ImageRecipe, machine: str, target: Path) -> None:
    """Put a recipe's distributions for ``machine`` into ``target``: this environment's own ones, else fetched.

    With an ``index`` the first of them comes from there, and none from this environment.
    """
    if recipe.index:
        first, *others = recipe.requirements
        _fetch((first,), recipe, machine, target, ("--no-deps",), recipe.index)
        if recipe.dependencies:
            _fetch(recipe.requirements, recipe, machine, target, ())
        elif others:
            _fetch(tuple(others), recipe, machine, target, ("--no-deps",))
        return
    if recipe.dependencies:
        _fetch(recipe.requirements, recipe, machine, target, ())
        return
    missing = tuple(pin for pin in recipe.requirements if not _copy_installed(pin, machine, target))
    if missing:
        _fetch(missing, recipe, machine, target, ("--no-deps",))


def _copy_installed(pin: str, machine: str, target: Path) -> bool:
    """Copy an installed distribution whose wheel fits the container: same version, Linux and CPU, stable ABI."""
    name, _, version = pin.partition("==")
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    tags = re.findall(r"^Tag: (\S+)$", found.read_text("WHEEL") or "", re.MULTILINE)
    if found.version != version or not any(_fits(tag, machine) for tag in tags):
        return False
    files = [f for f in found.files or () if ".." not in f.parts and "__pycache__" not in f.parts]
    root = target.resolve()
    for file in files:
        place = root / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(found.locate_file(file)), place)
    return bool(files)


def _fits(tag: str, machine: str) -> bool:
    """Whether a wheel tag holds for any Python 3 from its first on, on a glibc that is old enough."""
    python, abi, system = tag.split("-")
    if system == "any":
        return python.startswith("py3")
    if abi != "abi3" or not system.endswith(f"_{machine}"):
        return False
    wanted = re.match(r"manylinux_(\d+)_(\d+)_", system)
    return system.startswith("manylinux2014") or bool(wanted and (int(wanted[1]), int(wanted[2])) <= GLIBC)


def _fetch(
    pins: tuple[str, ...], recipe: ImageRecipe, machine: str, target: Path, options: tuple[str, ...], index: str = ""
) -> None:
    """From the user's own index; where that lacks the wanted build of PyTorch, from PyTorch's index as well."""
    command = _installer(pins, recipe, machine, target, options)
    if index:
        command += only_from(index, "pip" if command[1] == "-m" else "uv")
    failed = _run(command, pins, {**os.environ, **ONE_INDEX} if index else None)
    if failed and recipe.torch and "torch" in failed:
        failed = _run([*command, "--extra-index-url", f"{TORCH}/{recipe.torch}"], pins)
    if failed:
        raise SourceUnavailable(
            f"{', '.join(pins)} could not be fetched for the engine image: {_last_words(failed)}",
            hint="Check the network or set your package index for uv or pip (UV_DEFAULT_INDEX, PIP_INDEX_URL).",
        )


def _installer(
    pins: tuple[str, ...], recipe: ImageRecipe, machine: str, target: Path, options: tuple[str, ...]
) -> list[str]:
    """pip or uv, told to bring wheels for the image's system."""
    glibc = recipe.glibc
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.prefix) / "bin"))
    if importlib.util.find_spec("pip") is not None:  # so that the user's pip.conf holds
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--root-user-action=ignore"]
        for minor in range(glibc[1], 16, -1):  # pip does not take the newer ones to mean the older ones, too
            command += ["--platform", f"manylinux_{glibc[0]}_{minor}_{machine}"]
        command += ["--platform", f"manylinux2014_{machine}", "--platform", f"linux_{machine}"]
    elif uv is not None:
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
        command += ["--python-platform", f"{machine}-manylinux_{glibc[0]}_{glibc[1]}"]
    else:
        raise RuntimeUnavailable(
            f"fetching {', '.join(pins)} for the engine image needs uv or pip", hint="Install uv (`pip install uv`)."
        )
    return [*command, *options, "--only-binary", ":all:", "--python-version", recipe.python, "--target", str(target)]


def _run(command: list[str], pins: tuple[str, ...], env: dict[str, str] | None = None) -> str:
    """The complaint of an installer, "" where it has none."""
    try:
        done = subprocess.run(
            [*command, *pins],
            capture_output=True,
            text=True,
            timeout=FETCH_LIMIT,
            check=False,
            stdin=subprocess.DEVNULL,
            env=env,
        )
    except subprocess.TimeoutExpired as exc:
        raise SourceUnavailable(
            f"fetching {', '.join(pins)} took more than {FETCH_LIMIT:g} s", hint="Check the package index, try again."
        ) from exc
    return (done.stderr or f"exit status {done.returncode}") if done.returncode else ""


def _last_words(text: str) -> str:
    """The end of a tool's complaint, without passwords that an index address may carry."""
    return re.sub(r"://[^/@\s]+@", "://…@", " ".join(text.split())[-600:])


def write_context(recipe: ImageRecipe, base: str, machine: str, site: Path, out: Path) -> int:
    """Write the build context as a tar in which nothing depends on this machine or moment; returns its size."""
    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
        _add(tar, "Dockerfile", DOCKERFILE.format(base=base).encode())
        for path, text in sorted(recipe.files):
            _add(tar, path.lstrip("/"), text.encode())
        _add(tar, f"{SITE}/__main__.py", LAUNCHER.encode())
        for library in _libraries(machine):
            _add(tar, f"opt/engine/lib/{library.name}", library.read_bytes())
        for file in _walk(site):
            found = file.stat()
            path = f"{SITE}/{file.relative_to(site).as_posix()}"
            if file.parent == site / "bin":
                _add(tar, path, portable(file.read_bytes()), 0o755)
                continue
            info = _info(path, found.st_size)
            info.mode = 0o755 if found.st_mode & 0o100 else 0o644  # an engine may bring programs of its own
            with file.open("rb") as data:
                tar.addfile(info, data)
    return out.stat().st_size


def _libraries(machine: str) -> Iterator[Path]:
    if machine != platform.machine():
        return
    for name in LIBRARIES:
        places = (Path(p.format(machine=machine)) / name for p in LIBRARY_PLACES)
        yield from [p for p in places if p.is_file()][:1]


def _walk(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders.sort()
        folders[:] = [f for f in folders if f != "__pycache__"]
        yield from (Path(path) / f for f in sorted(files) if (Path(path) / f).is_file() and not f.startswith(".lock"))


def portable(script: bytes) -> bytes:
    """A program of a wheel for the image's Python: installers write this machine's into its first lines."""
    return _SHEBANG.sub(b"#!/usr/bin/env python3\n", script, count=1)


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    info = _info(name, len(data))
    info.mode = mode
    tar.addfile(info, io.BytesIO(data))


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info
