"""Whether a chat template stays within what templates are for, read from its syntax tree; it is never rendered.

Engines render templates of strangers, each in a sandbox of its own quality. This check does not rely on theirs: a
template may format messages, and that is all. What reaches for Python's inside, loads other files, calls what no engine
offers, or is built to blow up, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pierhead.formats.findings import Severity, short

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import SandboxedEnvironment

MAX_TEMPLATE = 256 << 10
MAX_NODES = 100_000
MAX_NUMBER = 100_000  # of a range, a repetition, a width
MAX_LOOPS = 1_000_000  # rounds of nested ranges together
MAX_WIDTH = 4  # digits


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CALLABLE = frozenset(
    {"range", "namespace", "dict", "raise_exception", "strftime_now", "joiner", "cycler", "caller", "loop", "super"}
)
_METHODS = _words(
    "append capitalize casefold copy count cycle endswith extend find get get_value index insert isalnum isalpha "
    "isdecimal isdigit islower isnumeric isspace istitle isupper items join keys lower lstrip partition pop "
    "removeprefix removesuffix replace reverse rfind rindex rpartition rsplit rstrip sort split splitlines startswith "
    "strftime strip swapcase title upper update values changed"
)
_PADDING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})
_BY_ATTRIBUTE = frozenset(
    {"attr", "map", "selectattr", "rejectattr", "groupby", "sort", "sum", "unique", "min", "max", "join"}
)
_INSIDE = _words("mro gi_frame gi_code cr_frame cr_code ag_frame f_globals f_locals f_builtins func_globals")
_DUNDERS = _words(
    "class mro base bases subclasses globals builtins import init new dict getattribute getattr setattr delattr code "
    "closure func self module loader spec reduce reduce_ex call wrapped get set doc name qualname defaults kwdefaults"
)
_FORMAT_WIDTH = re.compile(r"%[-+ #0]*(\d+|\*)|\.(\d+|\*)[a-zA-Z]")
_GO = re.compile(r"\{\{-?\s*(\.|\$|if\b|range\b|else\b|end\b|with\b|define\b|template\b|block\b)")

Found = tuple[Severity, str]


def check(text: str) -> list[Found]:
    """What is to be said about a template; empty for those that only format messages."""
    from jinja2 import TemplateError, nodes

    if len(text) > MAX_TEMPLATE:
        return [("unsafe", f"a template of more than {MAX_TEMPLATE:,} characters")]
    try:
        tree = _environment().parse(text)
    except RecursionError:
        return [("unsafe", "the template is nested too deeply")]
    except (TemplateError, ValueError, OverflowError, MemoryError) as exc:
        if _GO.search(text):
            return []  # Go's templates, which Ollama's models have: they cannot call anything of the host
        return [("warning", f"the template cannot be read: {short(str(exc))}")]
    looking = _Look()
    try:
        looking.macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        looking.node(tree, 1)
    except RecursionError:
        looking.say("the template is nested too deeply")
    return [("unsafe", reason) for reason in looking.reasons]


def _environment() -> SandboxedEnvironment:
    """Jinja's own parser with the tags that engines add."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import SandboxedEnvironment

    class Generation(Extension):
        """The tag by which training tools mark the assistant's words."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do", Generation])


class _Look:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.macros: set[str] = set()
        self._seen = 0
        self._loops = 0
        self._doublings = 0

    def say(self, reason: str) -> None:
        if reason not in self.reasons and len(self.reasons) < 20:
            self.reasons.append(reason)

    def node(self, node: nodes.Node, rounds: int) -> None:
        """One node and what is below it; ``rounds`` is how often the ranges around it repeat it."""
        self._seen += 1
        if self._seen > MAX_NODES:
            self.say(f"the template has more than {MAX_NODES:,} parts")
            return
        looker = _LOOKERS.get(type(node).__name__)
        if looker is not None:
            looker(self, node)
        if type(node).__name__ == "For":
            self._for(node, rounds)
            return
        for child in node.iter_child_nodes():
            self.node(child, rounds)

    # --- names ----------------------------------------------------------------------------------------------------

    def attribute(self, node: Any) -> None:
        self._name(node.attr)

    def item(self, node: Any) -> None:
        constant = _text(node.arg)
        if constant is not None:
            self._name(constant)
        elif _assembles(node.arg):
            self.say("it puts the name of an attribute together")

    def constant(self, node: Any) -> None:
        if isinstance(node.value, str) and _is_inside(node.value):
            self.say(f"it names Python's inside: {short(node.value, 60)!r}")

    def joined(self, node: Any) -> None:
        """Constants that together make a name of Python's inside."""
        whole = _text(node)
        if whole is not None and _is_inside(whole):
            self.say(f"it names Python's inside: {short(whole, 60)!r}")

    def _name(self, name: str) -> None:
        if name.startswith("_") or name in _INSIDE:
            self.say(f"it reaches for Python's inside: {short(name, 60)!r}")
        elif name in ("format", "format_map"):
            self.say("it uses str.format, which reaches attributes of what it formats")

    # --- calls ----------------------------------------------------------------------------------------------------

    def call(self, node: Any) -> None:
        kind = type(node.node).__name__
        if kind == "Name":
            name: str = node.node.name
            if name == "range":
                self._range(node)
            elif name not in _CALLABLE and name not in self.macros:
                self.say(f"it calls {short(name, 60)}, which no engine offers")
        elif kind == "Getattr":
            self._method(node.node.attr, node)
        else:
            self.say("it calls a value")

    def _method(self, name: str, node: Any) -> None:
        if name in _PADDING:
            if any(not isinstance(n := _number(a), int) or n > MAX_NUMBER for a in node.args[:1]):
                self.say(f"it pads text without bound: {name}")
        elif name not in _METHODS and name not in ("format", "format_map") and not name.startswith("_"):
            self.say(f"it calls the method {short(name, 60)}, which templates have no use for")

    def filter(self, node: Any) -> None:
        arguments = [*node.args, *(k.value for k in node.kwargs)]
        if node.name in ("attr",) and (not arguments or _text(arguments[0]) is None):
            self.say("it works out the name of an attribute")
        if node.name in _BY_ATTRIBUTE:
            for one in (t for a in arguments if (t := _text(a)) is not None):
                for part in one.split("."):
                    if part.startswith("__") or part in _INSIDE:
                        self._name(part)
            keyed = [k.value for k in node.kwargs if k.key == "attribute"]
            if any(_assembles(a) for a in keyed):
                self.say("it puts the name of an attribute together")
        elif node.name in ("center", "indent", "wordwrap") and any((_number(a) or 0) > MAX_NUMBER for a in arguments):
            self.say("it pads text without bound")
        elif node.name == "format":
            self._width(_text(node.node))

    def refused(self, node: Any) -> None:
        self.say("it loads another template")

    # --- bombs ----------------------------------------------------------------------------------------------------

    def _range(self, node: Any) -> None:
        if any(_largest(a) > MAX_NUMBER for a in node.args):
            self.say("a range without a sensible bound")

    def _for(self, node: Any, rounds: int) -> None:
        inner = rounds
        if type(node.iter).__name__ == "Call" and getattr(node.iter.node, "name", "") == "range":
            inner = rounds * max([1, *(_largest(a) for a in node.iter.args)])
            if inner > MAX_LOOPS:
                self.say("loops inside loops without a sensible bound")
                inner = MAX_LOOPS
        self.node(node.iter, rounds)
        before = self._loops
        self._loops += 1
        for child in node.iter_child_nodes(exclude=("iter",)):
            self.node(child, inner)
        self._loops = before

    def multiply(self, node: Any) -> None:
        factors = list(_chain(node, "Mul"))
        product = 1
        for factor in factors:
            product *= min(max(abs(_number(factor) or 1), 1), MAX_LOOPS)
        if product > MAX_NUMBER:
            self.say("it repeats or multiplies without a sensible bound")

    def power(self, node: Any) -> None:
        base, exponent = _number(node.left), _number(node.right)
        if base is None or exponent is None or abs(exponent) > 64 or abs(base) > 1024:
            self.say("a power without a sensible bound")

    def modulo(self, node: Any) -> None:
        self._width(_text(node.left))

    def _width(self, text: str | None) -> None:
        for found in _FORMAT_WIDTH.finditer(text or ""):
            digits = found[1] or found[2] or ""
            if digits == "*" or len(digits) > MAX_WIDTH:
                self.say("it pads text without bound")

    def assign(self, node: Any) -> None:
        """``x = x ~ x`` again and again is a bomb."""
        parts = [_label(p) for p in _parts(node.node)]
        if any(p and parts.count(p) > 1 for p in parts):
            self._doublings += 1
            if self._loops or self._doublings > 8:
                self.say("it doubles a text again and again")


_LOOKERS: dict[str, Callable[[_Look, Any], None]] = {
    "Getattr": _Look.attribute,
    "Getitem": _Look.item,
    "Const": _Look.constant,
    "Concat": _Look.joined,
    "Add": _Look.joined,
    "Call": _Look.call,
    "Filter": _Look.filter,
    "Import": _Look.refused,
    "FromImport": _Look.refused,
    "Include": _Look.refused,
    "Extends": _Look.refused,
    "Mul": _Look.multiply,
    "Pow": _Look.power,
    "Mod": _Look.modulo,
    "Assign": _Look.assign,
}


# --- reading constants ------------------------------------------------------------------------------------------------


def _is_inside(text: str) -> bool:
    """Whether a text is a name like ``__class__``, or a piece that such a name could be put together from."""
    if text.startswith("__") and len(text) > 2:
        rest = text[2:].removesuffix("__")
        return any(name.startswith(rest) for name in _DUNDERS)
    return len(text) > 2 and text.endswith("__") and any(name.endswith(text[:-2]) for name in _DUNDERS)


def _text(node: Any) -> str | None:
    """The string that an expression of constants makes; None for any other."""
    kind = type(node).__name__
    if kind == "Const":
        return node.value if isinstance(node.value, str) else None
    if kind in ("Concat", "Add"):
        parts = [_text(p) for p in _parts(node)]
        return "".join(p for p in parts if p is not None) if None not in parts else None
    return None


def _number(node: Any) -> int | None:
    """An integer constant."""
    if type(node).__name__ == "Neg":
        inner = _number(node.node)
        return None if inner is None else -inner
    value = getattr(node, "value", None) if type(node).__name__ == "Const" else None
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


def _largest(node: Any) -> int:
    """The largest number in an expression; products of constants multiplied."""
    if type(node).__name__ == "Mul":
        product = 1
        for factor in _chain(node, "Mul"):
            product *= max(1, min(_largest(factor), MAX_LOOPS))
        return product
    if type(node).__name__ == "Pow":
        return MAX_LOOPS
    own = _number(node)
    return max([abs(own) if own is not None else 0, *(_largest(c) for c in node.iter_child_nodes())])


def _chain(node: Any, kind: str) -> Iterator[Any]:
    """The operands of ``a * b * c``."""
    if type(node).__name__ == kind:
        yield from _chain(node.left, kind)
        yield from _chain(node.right, kind)
    else:
        yield node


def _parts(node: Any) -> Iterator[Any]:
    """The operands of ``a ~ b + c``."""
    if type(node).__name__ == "Concat":
        for inner in node.nodes:
            yield from _parts(inner)
    elif type(node).__name__ == "Add":
        yield from _parts(node.left)
        yield from _parts(node.right)
    else:
        yield node


def _label(node: Any) -> str:
    """What a variable is called, with its namespace."""
    kind = type(node).__name__
    if kind in ("Name", "NSRef"):
        return node.name + (f".{node.attr}" if kind == "NSRef" else "")
    return f"{_label(node.node)}.{node.attr}" if kind == "Getattr" and _label(node.node) else ""


def _assembles(node: Any) -> bool:
    """Whether a subscript is a text put together, rather than a key, a number or a slice."""
    kind = type(node).__name__
    if kind in ("Concat", "TemplateData"):
        return True
    if kind == "Add":
        return any(_text(p) is not None for p in _parts(node))
    if kind == "Mod":
        return _text(node.left) is not None
    if kind == "Filter":
        return node.name in (
            "join",
            "format",
            "replace",
            "string",
            "lower",
            "upper",
            "reverse",
            "trim",
            "first",
            "last",
        )
    if kind == "Call" and type(node.node).__name__ == "Getattr":
        return node.node.attr in ("join", "format", "replace", "lower", "upper", "strip")
    return False
