"""Which chat template the engine gets: the model's own, one that was packaged with it, what is put before it; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pierhead.engines.base import PlanRequest
from pierhead.engines.tool_template import CALL_PREFIX, with_tools

_LONGEST = 65536  # characters of a template that still fits an argument list beside the other settings


@dataclass(frozen=True)
class Template:
    """Engine settings that choose the template, and what the gateway and the user should know of it."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    call_prefix: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: PlanRequest, settings: Mapping[str, Any]) -> Template:
        """A template among the settings counts before a packaged file, and that before the one in the weights."""
        if settings.keys() & {"chat_template", "use_jinja"}:
            return cls()
        taught = with_tools(request.metadata)
        prefix = CALL_PREFIX if taught else ""
        file = next((f.name for f in request.files if f.role == "template"), "")
        if request.opening:
            own = taught or request.metadata.get("chat_template")
            made = opening(request.opening) + own if isinstance(own, str) and own.strip() else ""
            if made and len(made) <= _LONGEST:
                return cls({"chat_template": made}, prefix)
            reason = "its chat template is too long" if made else "it has no chat template"
            note = f"the system prompt that {request.model} was packaged with is not used: {reason}"
            return cls({"chat_template_file": file} if file else {}, "", (note,))
        if taught:
            return cls({"chat_template": taught}, prefix)
        return cls({"chat_template_file": file} if file else {})


def opening(messages: Sequence[Mapping[str, str]]) -> str:
    """Jinja that puts messages before those of a request, unless that begins with a system message of its own."""
    listed = ", ".join(f"{{'role': {_text(m['role'])}, 'content': {_text(m['content'])}}}" for m in messages)
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{listed}] + messages -%}}"
        "{%- endif -%}"
    )


def _text(value: str) -> str:
    """A string of Jinja, in which no block can end."""
    return json.dumps(value, ensure_ascii=False).replace("%}", '%" ~ "}').replace("}}", '}" ~ "}')
