"""The command line that joins an engine which listens on a port only to its replica's socket; pure."""

from __future__ import annotations

from pathlib import Path

ENTRY = Path(__file__).with_name("bridge_entry.py")
BESIDE = "/opt/engine/bridge.py"  # in an image; it is ``$(BRIDGE)``


def watched(*program: str, health: str) -> tuple[str, ...]:
    """An argv that runs a ``program`` which listens on ``$(SOCKET)`` itself, and tells when it is healthy."""
    return ("$(PYTHON)", "-I", "$(ENTRY)", "--socket", "$(SOCKET)", "--watch", "--health", health, "--", *program)


def bridged(*program: str, health: str) -> tuple[str, ...]:
    """An argv that runs ``program`` behind the bridge; ``$(PORT)`` in it becomes the port to listen on.

    The launch spec's ``entry`` must be ``ENTRY``, and an image recipe must have ``recipe_file()``. ``$(ENTRY)`` is
    taken, so the program's own code has to come from its environment or its mounts.
    """
    return ("$(PYTHON)", "-I", "$(ENTRY)", "--socket", "$(SOCKET)", "--health", health, "--", *program)


def beside(*program: str, health: str) -> tuple[str, ...]:
    """As ``bridged``, for a spec whose ``$(ENTRY)`` is a program of its own; an image recipe has ``beside_file()``.

    ``$(METRICS_PORT)`` becomes a second port, which answers ``GET /metrics``.
    """
    return ("$(PYTHON)", "-I", "$(BRIDGE)", "--socket", "$(SOCKET)", "--health", health, "--", *program)


def beside_file() -> tuple[str, str]:
    """The bridge as a file of an image whose engine has an entry program of its own."""
    return (BESIDE, ENTRY.read_text(encoding="utf-8"))


def recipe_file() -> tuple[str, str]:
    """The bridge as a file of an engine image."""
    return ("/opt/engine/entry.py", ENTRY.read_text(encoding="utf-8"))
