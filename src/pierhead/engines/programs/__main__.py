"""Starts one of the programs: ``python -I programs NAME --socket …``, as it is run in replicas and by hand."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "pierhead_programs"


def _package() -> None:
    """Import the folder under a name of its own, so that none of its modules hides one of a model's or a library's."""
    folder = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != folder]
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
    sys.exit(importlib.import_module(f"{NAME}.{sys.argv.pop(1)}.program").main())
