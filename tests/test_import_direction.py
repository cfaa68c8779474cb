"""Imports point one way; the gateway's process keeps to its short list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src" / "pierhead"

# Each row may import its own room and the rows below it.
ORDER: tuple[frozenset[str], ...] = tuple(
    frozenset(row.split())
    for row in (
        "cli __main__",
        "daemon",
        "dashboard stack mcp gateway",
        "releases fleet routing build convert",
        "runtimes",
        "engines",
        "package",
        "sources",
        "trust",
        "registry",
        "store",
        "formats",
        "refs loadtest",
        "sockets plugins paths",
        "config",
        "events",
        "errors",
    )
)
# Rooms with a list of their own instead of "all below": the data plane stays small.
ONLY: dict[str, frozenset[str]] = {
    "gateway": frozenset({"gateway", "routing", "config", "events", "errors", "sockets"}),
}


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _imports(file: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, _room(alias.name)) for alias in node.names if alias.name.startswith("pierhead")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pierhead"):
            module = node.module or ""
            rooms = [_room(module)] if "." in module else [alias.name for alias in node.names]
            found += [(node.lineno, room) for room in rooms]
    return [(line, room) for line, room in found if room and not room.startswith("__version")]


def _rank(room: str) -> int:
    for rank, row in enumerate(ORDER):
        if room in row:
            return rank
    raise AssertionError(f"room '{room}' has no place in the order: give it one")


FILES = sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_module_imports_only_its_own_room_and_rooms_below(file: Path) -> None:
    own = file.relative_to(SRC).parts[0].removesuffix(".py")
    wrong = [
        f"{file.relative_to(SRC)}:{line} imports {room}"
        for line, room in _imports(file)
        if room != own and (room not in ONLY[own] if own in ONLY else _rank(room) <= _rank(own))
    ]
    assert not wrong


def test_no_room_is_a_drawer_for_everything() -> None:
    assert not [p for p in FILES if p.name in {"utils.py", "helpers.py", "common.py", "misc.py"}]


def test_files_stay_within_the_hard_limit_of_600_lines() -> None:
    assert not [f"{p.relative_to(SRC)}: {n}" for p in FILES if (n := p.read_text().count("\n")) > 600]


def test_importing_the_gateway_loads_no_other_room() -> None:
    code = (
        "import sys, pierhead.gateway.server\n"
        "print(*sorted({m.split('.')[1] for m in sys.modules if m.startswith('pierhead.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert set(done.stdout.split()) <= ONLY["gateway"]
