"""Modelfiles: how a model is made from another, in the words that Ollama's users know; parsed and checked, pure.

Instructions: FROM, ADAPTER, TEMPLATE (Jinja), SYSTEM, PARAMETER, LICENSE, MESSAGE. Text over several lines stands
between triple quotes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pierhead.errors import UsageError
from pierhead.sources.go_template import to_jinja

MAX_SIZE = 4 << 20
_QUOTES = '"""'
_INSTRUCTIONS = ("FROM", "ADAPTER", "TEMPLATE", "SYSTEM", "PARAMETER", "LICENSE", "MESSAGE")
_ROLES = ("system", "user", "assistant")
# Ollama's parameters and the engine's; ``context`` is the model's own setting.
PARAMETERS: dict[str, str] = {
    "num_ctx": "context",
    "temperature": "sampling.temp",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "typical_p": "sampling.typ_p",
    "seed": "sampling.seed",
    "repeat_penalty": "sampling.penalty_repeat",
    "repeat_last_n": "sampling.penalty_last_n",
    "presence_penalty": "sampling.penalty_present",
    "frequency_penalty": "sampling.penalty_freq",
    "mirostat": "sampling.mirostat",
    "mirostat_tau": "sampling.mirostat_tau",
    "mirostat_eta": "sampling.mirostat_eta",
    "num_predict": "n_predict",
    "num_keep": "n_keep",
    "num_batch": "n_batch",
    "num_gpu": "n_gpu_layers",
    "num_thread": "threads",
    "stop": "antiprompt",
}
# A Go template's actions: a field, a variable, or a word of its language.
_GO = re.compile(
    r"\{\{-?\s*(?:\.[A-Za-z]|\$|(?:if|else|end|range|with|define|block|template|slice|len|eq|and|or|not)\b)"
)


@dataclass
class Modelfile:
    """What it says; paths as they are written, ``parameters`` by the engine's names."""

    source: str = ""
    adapters: list[str] = field(default_factory=list[str])
    template: str = ""
    system: str = ""
    context: int = 0
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    licenses: list[str] = field(default_factory=list[str])
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def parse(text: str, *, template_elsewhere: bool = False) -> Modelfile:
    """Read a Modelfile; UsageError names the line of what is wrong.

    A template in Go's language becomes Jinja where that is exactly the same, and is refused where not, unless a chat
    template is given elsewhere and counts instead.
    """
    made = Modelfile()
    for line, word, value in _instructions(text):
        if not value and word not in ("SYSTEM",):
            _refuse(line, f"{word} says nothing", f"Write {word} and what it is about.")
        _take(made, line, word, value, template_elsewhere)
    if not made.source:
        _refuse(1, "there is no FROM", "Begin with FROM and a model, a file or a folder.")
    return made


def is_go_template(text: str) -> bool:
    """Whether a chat template is written in Go's language, as Ollama's are, and not in Jinja."""
    return "{%" not in text and _GO.search(text) is not None


def _take(made: Modelfile, line: int, word: str, value: str, template_elsewhere: bool) -> None:
    if word == "FROM":
        if made.source:
            _refuse(line, "FROM stands here a second time", "A model is made from one other; add a LoRA with ADAPTER.")
        made.source = value
    elif word == "ADAPTER":
        made.adapters.append(value)
    elif word == "TEMPLATE":
        if is_go_template(value):
            jinja = "" if template_elsewhere else to_jinja(value)
            if jinja is None:
                _refuse(
                    line,
                    "this TEMPLATE is one of Go, as Ollama has them, and does what cannot be carried over to Jinja",
                    "Leave it out to use the model's own, or give a Jinja file: --chat-template FILE.",
                )
            value = jinja
        made.template = value
    elif word == "SYSTEM":
        made.system = value
    elif word == "PARAMETER":
        _parameter(made, line, value)
    elif word == "LICENSE":
        made.licenses.append(value)
    else:
        _message(made, line, value)


def _message(made: Modelfile, line: int, value: str) -> None:
    role, _, said = value.partition(" ")
    if role.lower() not in _ROLES or not said.strip():
        _refuse(line, f"MESSAGE begins with {role!r}", f"Write MESSAGE, one of {', '.join(_ROLES)}, and a text.")
    made.messages.append({"role": role.lower(), "content": _unquoted(said.strip())})


def _parameter(made: Modelfile, line: int, value: str) -> None:
    name, _, given = value.partition(" ")
    given = _unquoted(given.strip())
    key = PARAMETERS.get(name.lower())
    if key is None:
        close = difflib.get_close_matches(name.lower(), PARAMETERS, 1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(PARAMETERS))}."
        _refuse(line, f"there is no PARAMETER '{name[:60]}'", hint)
    if not given:
        _refuse(line, f"PARAMETER {name} has no value", f"Write PARAMETER {name} VALUE.")
    if key == "antiprompt":
        made.parameters.setdefault(key, []).append(given)
    elif key == "context":
        if not given.isdecimal() or not 0 < int(given) < 1 << 24:
            _refuse(line, f"PARAMETER num_ctx is {given[:40]!r}", "Write the number of tokens.")
        made.context = int(given)
    else:
        made.parameters[key] = given


def _instructions(text: str) -> list[tuple[int, str, str]]:
    """Line number, word and value of each; comments and empty lines are passed over."""
    if len(text) > MAX_SIZE:
        _refuse(1, f"it is longer than {MAX_SIZE >> 20} MiB", "Name files instead of writing their text into it.")
    lines = text.splitlines()
    found: list[tuple[int, str, str]] = []
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        word, _, value = line.partition(" ")
        if word.upper() not in _INSTRUCTIONS:
            close = difflib.get_close_matches(word.upper(), _INSTRUCTIONS, 1)
            hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(_INSTRUCTIONS)}."
            _refuse(number, f"there is no instruction '{word[:60]}'", hint)
        value = value.strip()
        opening = value.find(_QUOTES)
        if opening >= 0 and (opening == 0 or word.upper() in ("MESSAGE", "PARAMETER")):
            head, body = value[:opening], lines[number - 1].split(_QUOTES, 1)[1]
            while _QUOTES not in body:
                if at >= len(lines):
                    _refuse(number, f"the text that begins here has no end ({_QUOTES})", "Close it on a line below.")
                body += "\n" + lines[at]
                at += 1
            body, _, rest = body.partition(_QUOTES)
            if rest.strip():
                _refuse(at, f"after {_QUOTES} stands {rest.strip()[:40]!r}", "End the line there.")
            found.append((number, word.upper(), head + body if head else body))
        else:
            found.append((number, word.upper(), _unquoted(value)))
    return found


def _unquoted(value: str) -> str:
    """Without the quotes around it, inside of which a backslash may stand before n, t, quotes and itself."""
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    escapes = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
    return re.sub(r"\\(.)", lambda m: escapes.get(m[1], m[0]), value[1:-1])


def _refuse(line: int, message: str, hint: str) -> NoReturn:
    raise UsageError(f"line {line} of the Modelfile: {message}", hint=hint, data={"line": line})
