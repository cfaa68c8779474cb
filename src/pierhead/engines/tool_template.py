"""Teaches tool calls to models whose chat template knows none; pure.

The engine finds out by rendering the template how a model writes a call, and makes its grammar from that. A prelude
in front of the model's own template writes tools, calls and results into plain messages, which any template renders;
without tools in the request it does nothing, and the prompt is the same to the byte.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CALL_PREFIX = "<tool_call>["  # how the prelude has a call begin
_LONGEST = 32768  # characters of a template that still fits an argument list beside the other settings


def with_tools(metadata: Mapping[str, Any]) -> str | None:
    """The model's chat template behind the prelude; None where it has none or knows tools itself."""
    own = metadata.get("chat_template")
    if not isinstance(own, str) or not own.strip() or len(own) > _LONGEST or "tool" in own:
        return None
    return _prelude() + own


@functools.cache
def _prelude() -> str:
    return Path(__file__).with_name("tool_calls.jinja").read_text("utf-8").rstrip("\n")
