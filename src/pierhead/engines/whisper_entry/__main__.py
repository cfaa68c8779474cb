"""Starts the server when the folder is run as a program: makes a package of it and calls ``program.main``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "whisper_entry"


def _package() -> None:
    """Import the folder under a name of its own: what a program's folder has is otherwise no package."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _package()
    sys.exit(importlib.import_module(f"{NAME}.program").main())
