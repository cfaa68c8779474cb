"""The documentation says what the program does: its examples run, its reference is the program's own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ("README.md", "docs/tutorial/first-answer.md")
PORT = "12434"


def examples(page: str) -> list[str]:
    """The ``$`` lines of the page's console blocks, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a newcomer: an own home, ``pier`` on the PATH, and a port that nobody's daemon has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PIERHEAD_HOME": str(tmp_path / "home"), "NO_COLOR": "1"}
    env |= {"PORT": port, "PIERHEAD_GATEWAY__LISTEN": f"127.0.0.1:{port}"}
    env.pop("DOCKER_HOST", None)
    try:
        yield env
    finally:
        subprocess.run(["pier", "stop", "--all", "--daemon"], env=env, check=False, timeout=60, capture_output=True)


@pytest.mark.timeout(300)
@pytest.mark.model
@pytest.mark.parametrize("page", PAGES)
def test_every_example_of_a_page_runs_as_it_stands(page: str, shell: dict[str, str]) -> None:
    commands = examples(page)
    assert len(commands) >= 5
    for command in commands:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command.replace(PORT, shell["PORT"])],
            env=shell,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or command.startswith(("pier stop", "pier rm")), f"$ {command} printed nothing"
        assert "Traceback" not in done.stderr


def test_the_reference_pages_are_what_the_program_prints(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "reference"), str(tmp_path)], check=True, timeout=60)
    stale = [p.name for p in tmp_path.iterdir() if p.read_text() != (ROOT / "docs" / "reference" / p.name).read_text()]
    assert not stale, "run `make docs` and commit docs/reference"


def test_every_dependency_has_its_line_of_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.match(r"[A-Za-z0-9_.-]+", line).group().lower() for line in wanted}  # type: ignore[union-attr]
    page = (ROOT / "docs" / "explanation" / "dependencies.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| ([a-z0-9_-]+)", page, re.M)) - {"package", "---"}
    assert listed == names


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tutorial" / "first-answer" / "index.html").exists()
