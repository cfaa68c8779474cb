"""Ollama's chat templates, written in Go's template language, as Jinja: only those whose meaning is known; pure.

A template of other shapes (tools, thinking, functions) gives None: a nearly right prompt is worse than none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"\{\{(?P<left>-\s)?\s*(?P<body>.*?)\s*(?P<right>\s-)?\}\}", re.DOTALL)
_FIELD = re.compile(r"(?P<root>\$?)\.(?P<name>System|Prompt|Response|Role|Content)")
_ROLE = re.compile(r'eq\s+\.Role\s+"(?P<role>[a-z]{1,20})"')
_MOST = 200  # tags: longer templates do more than any that can be carried over
_TURN = frozenset({"System", "Prompt", "Response"})

# What Ollama does before it renders: neighbours of one role become one message, all system messages one text.
_COLLATE = (
    "{%- set ns = namespace(all=[], system='', last='', prompt='', response='') -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}"
    "{%- set ns.system = ns.system + '\\n\\n' + m['content'] if ns.system else m['content'] -%}"
    "{%- endif -%}"
    "{%- if ns.all and ns.last == m['role'] and m['role'] != 'tool' -%}"
    "{%- set joined = ns.all[-1]['content'] + '\\n\\n' + m['content'] -%}"
    "{%- set ns.all = ns.all[:-1] + [{'role': m['role'], 'content': joined}] -%}"
    "{%- else -%}"
    "{%- set ns.all = ns.all + [{'role': m['role'], 'content': m['content']}] -%}"
    "{%- endif -%}"
    "{%- set ns.last = m['role'] -%}"
    "{%- endfor -%}"
)
_NEXT = (
    "{{ turn(ns.system, ns.prompt, ns.response) }}"
    "{%- set ns.system = '' -%}{%- set ns.prompt = '' -%}{%- set ns.response = '' -%}"
)
_TURNS = (
    "{%- set ns.system = '' -%}"
    "{%- for m in ns.all -%}"
    "{%- if m['role'] == 'system' -%}"
    "{%- if ns.prompt or ns.response -%}" + _NEXT + "{%- endif -%}"
    "{%- set ns.system = m['content'] -%}"
    "{%- elif m['role'] == 'user' -%}"
    "{%- if ns.response -%}" + _NEXT + "{%- endif -%}"
    "{%- set ns.prompt = m['content'] -%}"
    "{%- elif m['role'] == 'assistant' -%}"
    "{%- set ns.response = m['content'] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ begun(ns.system, ns.prompt, ns.response) }}"
    "{%- elif ns.system or ns.prompt or ns.response -%}"
    "{{ turn(ns.system, ns.prompt, ns.response) }}"
    "{%- endif -%}"
)


@dataclass(frozen=True)
class Text:
    """Characters that are printed as they are."""

    text: str


@dataclass(frozen=True)
class Field:
    """A value that is printed: of the turn, or (``Role``, ``Content``) of a message."""

    name: str


@dataclass(frozen=True)
class If:
    """Branches of (condition, nodes), the first true one printed; a condition of ``""`` is always true."""

    branches: tuple[tuple[Field | str, Nodes], ...]


@dataclass(frozen=True)
class Range:
    """Nodes for each message."""

    nodes: Nodes


Node = Text | Field | If | Range
Nodes = tuple[Node, ...]


class _Unknown(Exception):  # control flow: the template does something that is not understood here
    """Not a template that can be carried over."""


def to_jinja(template: str) -> str | None:
    """The same prompt as a Jinja template; None where that is not certain."""
    try:
        nodes = _parsed(template)
        return _of_messages(nodes) if any(isinstance(n, Range) for n in nodes) else _of_turns(nodes)
    except _Unknown:
        return None


# --- reading ----------------------------------------------------------------------------------------------------------


def _tokens(template: str) -> list[tuple[str, str]]:
    """Pieces of (``text`` or ``tag``, content), white space trimmed where the tags say so."""
    found: list[tuple[str, str]] = []
    at, trim = 0, False
    for number, tag in enumerate(_TAG.finditer(template)):
        if number > _MOST:
            raise _Unknown
        text = template[at : tag.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        text = text.rstrip(" \t\r\n") if tag["left"] else text
        found += [("text", text), ("tag", tag["body"])]
        at, trim = tag.end(), bool(tag["right"])
    rest = template[at:]
    found.append(("text", rest.lstrip(" \t\r\n") if trim else rest))
    if any(kind == "text" and "{{" in text for kind, text in found):
        raise _Unknown
    return [piece for piece in found if piece[1]]


def _parsed(template: str) -> Nodes:
    reader = _Reader(_tokens(template))
    nodes = reader.nodes(message=False)
    if reader.closing is not None:
        raise _Unknown
    return nodes


class _Reader:
    """Builds nodes from pieces; ``closing`` is the tag that ended the last run of nodes."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0
        self.closing: str | None = None

    def nodes(self, *, message: bool, depth: int = 0) -> Nodes:
        """Nodes up to ``end`` or ``else``; ``message`` inside a range, where fields are a message's."""
        if depth > 8:
            raise _Unknown
        found: list[Node] = []
        while self._at < len(self._tokens):
            kind, body = self._tokens[self._at]
            self._at += 1
            if kind == "text":
                found.append(Text(body))
            elif body == "end" or body.split()[:1] == ["else"]:
                self.closing = body
                return tuple(found)
            elif body.split()[:1] == ["if"]:
                found.append(self._if(body[2:].strip(), message=message, depth=depth))
            elif body == "range .Messages" and not message:
                inner = self.nodes(message=True, depth=depth + 1)
                if self.closing != "end":
                    raise _Unknown
                found.append(Range(inner))
            else:
                found.append(_field(body, message=message))
        self.closing = None
        return tuple(found)

    def _if(self, condition: str, *, message: bool, depth: int) -> If:
        branches: list[tuple[Field | str, Nodes]] = []
        while True:
            test = _condition(condition, message=message) if condition else ""
            branches.append((test, self.nodes(message=message, depth=depth + 1)))
            if self.closing == "end":
                return If(tuple(branches))
            words = (self.closing or "").split(None, 2)
            if not condition or words[:1] != ["else"] or (len(words) > 1 and words[1] != "if"):
                raise _Unknown
            condition = words[2] if len(words) > 2 else ""


def _field(body: str, *, message: bool) -> Field:
    found = _FIELD.fullmatch(body)
    if found is None:
        raise _Unknown
    own = found["name"] in ("Role", "Content")
    if own != (message and not found["root"]):
        raise _Unknown
    return Field(found["name"])


def _condition(body: str, *, message: bool) -> Field | str:
    """A field that must not be empty, or the role that a message must have."""
    role = _ROLE.fullmatch(body)
    if role is not None and message:
        return role["role"]
    return _field(body, message=message)


# --- writing ----------------------------------------------------------------------------------------------------------


def _of_messages(nodes: Nodes) -> str:
    """A template that goes through the messages itself; what follows the last of them begins the answer."""
    last = max(number for number, node in enumerate(nodes) if isinstance(node, Range))
    names = _names(nodes)
    if {"Prompt", "Response"} & names or any(isinstance(n, Range) for n in nodes[:last]):
        raise _Unknown
    body = "".join(_written(node, "ns.system") for node in nodes[: last + 1])
    end = "".join(_written(node, "ns.system") for node in nodes[last + 1 :])
    return _COLLATE + body + "{%- if add_generation_prompt -%}" + end + "{%- endif -%}"


def _of_turns(nodes: Nodes) -> str:
    """A template of one turn (system, prompt, response), rendered once for each and, at the end, up to the response."""
    names = _names(nodes)
    if not {"Prompt"} <= names <= _TURN or any(_has_response(node) for node in nodes if isinstance(node, If)):
        raise _Unknown
    cut = next((number for number, node in enumerate(nodes) if node == Field("Response")), None)
    if cut is None:  # then Ollama adds the response at the end
        nodes, cut = (*nodes, Field("Response")), len(nodes)
    whole = "".join(_written(node, "system") for node in nodes)
    begun = "".join(_written(node, "system") for node in nodes[: cut + 1])
    return (
        "{%- macro turn(system, prompt, response) -%}" + whole + "{%- endmacro -%}"
        "{%- macro begun(system, prompt, response) -%}" + begun + "{%- endmacro -%}" + _COLLATE + _TURNS
    )


def _names(nodes: Nodes) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        match node:
            case Field(name):
                found.add(name)
            case If(branches):
                for test, inner in branches:
                    found |= _names(inner) | ({test.name} if isinstance(test, Field) else set())
            case Range(inner):
                found |= _names(inner)
            case Text():
                pass
    return found


def _has_response(node: If) -> bool:
    return "Response" in _names((node,))


def _written(node: Node, system: str) -> str:
    match node:
        case Text(text):
            return "{{ " + _quoted(text) + " }}"
        case Field():
            return "{{ " + _value(node, system) + " }}"
        case Range(inner):
            return "{%- for m in ns.all -%}" + "".join(_written(n, system) for n in inner) + "{%- endfor -%}"
        case If(branches):
            return _written_if(branches, system)


def _written_if(branches: tuple[tuple[Field | str, Nodes], ...], system: str) -> str:
    made = ""
    for number, (test, inner) in enumerate(branches):
        word = "if" if number == 0 else "elif"
        if isinstance(test, Field):
            made += "{%- " + f"{word} {_value(test, system)}" + " -%}"
        elif test:
            made += "{%- " + f"{word} m['role'] == {_quoted(test)}" + " -%}"
        else:
            made += "{%- else -%}"
        made += "".join(_written(n, system) for n in inner)
    return made + "{%- endif -%}"


def _value(field: Field, system: str) -> str:
    if field.name == "System":
        return system
    return f"m['{field.name.lower()}']" if field.name in ("Role", "Content") else field.name.lower()


def _quoted(text: str) -> str:
    """A string of Jinja's; what trims white space around tags does not reach inside."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '"' + plain.replace("\r", "\\r") + '"'
