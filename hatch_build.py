"""Puts the gateway's compiled modules into a wheel when PIERHEAD_COMPILED names the folder that scripts/compile made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Compiled(BuildHookInterface):
    """Without that variable, and for a checkout, nothing changes: the wheel is pure Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the modules, and the tag of the Python and the platform that they are for."""
        folder = os.environ.get("PIERHEAD_COMPILED", "")
        if not folder or version == "editable":
            return
        for path in Path(folder).rglob("*.so"):
            build_data["force_include"][str(path)] = str(path.relative_to(folder))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
