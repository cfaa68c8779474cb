"""What the plans of engines share: the command of a server program of ours, its files, and a refusal; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pierhead.errors import OutOfMemory

MIB = 1 << 20
PROGRAMS = Path(__file__).with_name("programs")
VERSION = re.compile(r":(3\.\d+)(?:\.\d+)?(?=$|[@-])")  # in the tag of an image
# For every engine's program. Libraries report to nobody, sandbox or not. OpenMP's threads give the processor back after
# some microseconds of waiting, where they would spin for milliseconds: that costs an engine which is alone nothing, and
# engines that work at the same time lost three quarters of their speed to each other's spinning. GGML would call a
# debugger when it gives up, whose pages hide the reason.
ENV = {"ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "GOMP_SPINCOUNT": "1000", "GGML_NO_BACKTRACE": "1"}


def command(settings: Mapping[str, Any], *name: str) -> tuple[str, ...]:
    """The argv of an entry program, or of the one of ``PROGRAMS`` with this name, with its ``settings`` as JSON."""
    told = json.dumps(settings, separators=(",", ":")).replace("$(", "$$(")
    places = ("--socket", "$(SOCKET)", "--model-dir", "$(MODEL_DIR)")
    return ("$(PYTHON)", "-I", "$(ENTRY)", *name, *places, "--settings", told)


def program_files(name: str) -> tuple[tuple[str, str], ...]:
    """One of ``PROGRAMS`` and what all of them share, as files of an engine image."""
    found = sorted((*PROGRAMS.glob("*.py"), *(PROGRAMS / name).rglob("*.py")))
    return tuple((f"/opt/engine/entry/{p.relative_to(PROGRAMS)}", p.read_text(encoding="utf-8")) for p in found)


def files(entry: Path) -> tuple[tuple[str, str], ...]:
    """An entry program, a file or a folder of them, as files of an engine image."""
    if entry.is_file():
        return (("/opt/engine/entry.py", entry.read_text(encoding="utf-8")),)
    found = sorted(entry.glob("*.py"))
    return tuple((f"/opt/engine/entry/{path.name}", path.read_text(encoding="utf-8")) for path in found)


def python_of(image: str) -> str:
    """The Python that an image's name says it has, as ``3.12``; that of the default base image where it says none."""
    found = VERSION.search(image)
    return found[1] if found else "3.11"


def within(asked: int, metadata: Mapping[str, Any]) -> int:
    """The context that is asked for (0: none is), of at most the tokens that a model knows, where that is known."""
    known = int(metadata.get("context_length") or 0)
    return min(asked, known) if known else asked


def too_large(
    model: str, parts: Mapping[str, int], free: int, *, hint: str, context: int = 0, **data: int
) -> OutOfMemory:
    """The refusal with its numbers: ``parts`` are bytes by what they are for, ``context`` tokens where that counts."""
    needed = sum(parts.values())
    told = ", ".join(f"{what} {_mib(size)}" for what, size in parts.items())
    with_context = f" with a context of {context} tokens" if context else ""
    return OutOfMemory(
        f"'{model}'{with_context} needs {_mib(needed)} ({told}); {_mib(free)} are free",
        hint=hint,
        data={**data, "needed": needed, "free": free} | ({"context": context} if context else {}),
    )


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
