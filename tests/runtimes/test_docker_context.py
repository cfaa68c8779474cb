"""What goes into an engine image, told without a Docker Engine."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from pierhead.engines.base import ImageRecipe
from pierhead.errors import RuntimeUnavailable, SourceUnavailable
from pierhead.runtimes.docker_context import gather, portable, write_context
from pierhead.runtimes.docker_image import with_python

SHELL = b"#!/bin/sh\n'''exec' /a very/long path/bin/python3.11 \"$0\" \"$@\"\n' '''\nimport sys\n"


@pytest.mark.parametrize(
    ("script", "made"),
    [
        (b"#!/home/me/env/bin/python3.11\nimport sys\n", b"#!/usr/bin/env python3\nimport sys\n"),
        (SHELL, b"#!/usr/bin/env python3\nimport sys\n"),
        (b"#!/bin/sh\nexec python3 -m tool\n", b"#!/bin/sh\nexec python3 -m tool\n"),
        (b"\x7fELF#!/x/python\n", b"\x7fELF#!/x/python\n"),
    ],
)
def test_programs_of_wheels_name_the_images_python_and_not_this_machines(script: bytes, made: bytes) -> None:
    assert portable(script) == made


def test_programs_are_in_the_context_and_can_be_run(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "bin").mkdir(parents=True)
    (site / "bin" / "tool").write_bytes(b"#!/x/python\n")
    (site / "tool.py").write_text("")
    write_context(ImageRecipe("e", "base", ()), "base", "x86_64", site, tmp_path / "context.tar")
    with tarfile.open(tmp_path / "context.tar") as tar:
        modes = {one.name.removeprefix("opt/engine/site/"): one.mode for one in tar if "/site/" in one.name}
    assert modes == {"__main__.py": 0o644, "bin/tool": 0o755, "tool.py": 0o644}


@pytest.mark.parametrize("torch", ["cpu", ""])
def test_a_build_of_pytorch_that_the_index_lacks_comes_from_pytorchs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: Literal["", "cpu"]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        absent = "No matching distribution found for torch==2.13.0+cpu" if "--extra-index-url" not in command else ""
        return subprocess.CompletedProcess(command, int(bool(absent)), "", absent)

    monkeypatch.setattr(subprocess, "run", run)
    recipe = ImageRecipe("e", "base", ("torch==2.13.0+cpu",), python="3.11", torch=torch)
    refused = contextlib.nullcontext() if torch else pytest.raises(SourceUnavailable, match="No matching distribution")
    with refused:
        gather(recipe, "x86_64", tmp_path)
    tried = [c[c.index("--extra-index-url") + 1] if "--extra-index-url" in c else "" for c in asked]
    assert tried == (["", "https://download.pytorch.org/whl/cpu"] if torch else [""])


@pytest.mark.parametrize(
    ("base", "version", "made"),
    [
        ("docker.io/library/python:3.11-slim-bookworm", "", "docker.io/library/python:3.11-slim-bookworm"),
        ("docker.io/library/python:3.11-slim-bookworm", "3.13", "docker.io/library/python:3.13-slim-bookworm"),
        ("registry:5000/python:3.12.4", "3.13", "registry:5000/python:3.13"),
        ("registry:5000/base:latest", "3.11", "registry:5000/base:latest"),
    ],
)
def test_the_base_image_has_the_python_that_is_wanted(base: str, version: str, made: str) -> None:
    assert with_python(base, version) == made


def test_a_base_image_that_does_not_say_its_python_is_not_guessed_at() -> None:
    with pytest.raises(RuntimeUnavailable, match="does not say which it has"):
        with_python("registry:5000/base:latest", "3.13")


def a_wheel(index: Path, where: str) -> None:
    """An index whose ``iniconfig`` is not that of PyPI, though it has the same version."""
    name = "iniconfig-2.1.0"
    folder = index / "iniconfig"
    folder.mkdir(parents=True)
    machine = platform.machine()
    with zipfile.ZipFile(folder / f"{name}-cp310-abi3-linux_{machine}.whl", "w") as wheel:
        wheel.writestr("iniconfig.py", f"WHERE = {where!r}\n")
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: iniconfig\nVersion: 2.1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: cp310-abi3-linux_{machine}\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "iniconfig.py,,\n")
    (folder / "index.html").write_text(f'<a href="{name}-cp310-abi3-linux_{machine}.whl">iniconfig</a>')


def test_with_an_index_the_first_comes_from_there_and_the_rest_from_the_users_own(tmp_path: Path) -> None:
    a_wheel(tmp_path / "index", "there")
    pins = ("iniconfig==2.1.0", "typing_extensions==4.15.0")
    recipe = ImageRecipe("e", "base", pins, python="3.11", glibc=(2, 35), index=(tmp_path / "index").as_uri())
    gather(recipe, platform.machine(), tmp_path / "site")
    assert (tmp_path / "site" / "iniconfig.py").read_text() == "WHERE = 'there'\n"
    assert (tmp_path / "site" / "typing_extensions.py").is_file()


def test_an_index_that_lacks_it_is_not_replaced_by_another(tmp_path: Path) -> None:
    a_wheel(tmp_path / "index", "there")
    recipe = ImageRecipe("e", "base", ("iniconfig==2.0.0",), python="3.11", index=(tmp_path / "index").as_uri())
    with pytest.raises(SourceUnavailable, match=r"iniconfig==2\.0\.0"):
        gather(recipe, platform.machine(), tmp_path / "site")
