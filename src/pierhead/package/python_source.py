"""Somebody's Python read as text: which class can be served, and what it needs; imports and runs none of it."""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from packaging.requirements import InvalidRequirement, Requirement

from pierhead.errors import UsageError
from pierhead.formats.python_model import OPERATIONS

_SCRIPT = re.compile(r"(?m)^# /// script[ \t]*$\n(?P<content>(?:^#(?:| .*)$\n)+?)^# ///[ \t]*$")
_COMMENT = re.compile(r"(^|\s)#.*$")
_CONSTANTS = ("max_batch_size", "batch_delay_ms", "concurrency", "parallel", "memory")
_TABLE = "[tool.pierhead]"


@dataclass(frozen=True)
class Served:
    """A class that can be served; ``settings`` are those that stand in it as constants."""

    module: str
    cls: str
    methods: tuple[str, ...]
    loads: bool
    tensors: bool = False
    single: str = ""  # what ``predict`` takes, where that can be no list
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    misspelt: Mapping[str, str] = field(default_factory=dict[str, str])  # members that mean nothing → what is close


@dataclass(frozen=True)
class Needs:
    """What the author wrote of packages, of Python, and in ``[tool.pierhead]``."""

    requirements: tuple[str, ...] = ()
    python: str = ""
    table: Mapping[str, Any] = field(default_factory=dict[str, Any])


# --- classes ----------------------------------------------------------------------------------------------------------


def classes(text: str, module: str, shown: str) -> list[Served]:
    """The classes of a file that have a method which can be served; UsageError where it is no Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as exc:
        line = f", line {exc.lineno}" if isinstance(exc, SyntaxError) and exc.lineno else ""
        said = exc.msg if isinstance(exc, SyntaxError) else str(exc)
        raise UsageError(f"{shown}{line}: {said}", hint="Correct it, then try again.") from exc
    there = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = (_served(node, there, module) for node in there.values())
    return [one for one in found if one.methods]


def _served(node: ast.ClassDef, there: Mapping[str, ast.ClassDef], module: str) -> Served:
    methods: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
    settings: dict[str, Any] = {}
    assigned: set[str] = set()
    for one in _family(node, there, set()):
        for item in one.body:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                methods[item.name] = item
            assigned |= _assigned(item)
            settings |= _constant(item)
    names = tuple(name for name in OPERATIONS if name in methods)
    tensors = "predict" in names and _takes_arrays(methods["predict"])
    single = _single(methods["predict"], there) if "predict" in names else ""
    return Served(module, node.name, names, "load" in methods, tensors, single, settings, _misspelt(methods, assigned))


def _family(node: ast.ClassDef, there: Mapping[str, ast.ClassDef], seen: set[str]) -> Iterator[ast.ClassDef]:
    """The class's bases in the same file, and it."""
    seen.add(node.name)
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in there and base.id not in seen:
            yield from _family(there[base.id], there, seen)
    yield node


def _assigned(item: ast.stmt) -> set[str]:
    targets = item.targets if isinstance(item, ast.Assign) else [item.target] if isinstance(item, ast.AnnAssign) else []
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _misspelt(methods: Collection[str], assigned: Collection[str]) -> dict[str, str]:
    """Members that look like one which means something and is not there."""
    found: dict[str, str] = {}
    for names, known in ((methods, ("load", *OPERATIONS)), (assigned, _CONSTANTS)):
        for name in sorted(n for n in names if n not in known and not n.startswith("_")):
            close = difflib.get_close_matches(name, [k for k in known if k not in names], 1, 0.75)
            if close and abs(len(close[0]) - len(name)) <= 1:
                found[name] = close[0]
    return found


def _constant(item: ast.stmt) -> dict[str, Any]:
    value = getattr(item, "value", None)
    names = sorted(_assigned(item) & set(_CONSTANTS))
    return dict.fromkeys(names, value.value) if isinstance(value, ast.Constant) else {}


def _single(method: ast.FunctionDef | ast.AsyncFunctionDef, there: Mapping[str, ast.ClassDef]) -> str:
    """The type of a method's first argument where that is one thing and no list; "" where it may be one."""
    given = [*method.args.posonlyargs, *method.args.args][1:2]
    kind = ast.unparse(given[0].annotation) if given and given[0].annotation else ""
    return kind if kind.partition("[")[0] in ("bool", "int", "float", "str", "bytes", "dict", *there) else ""


def _takes_arrays(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    given = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs][1:]
    kinds = [ast.unparse(arg.annotation) if arg.annotation else "" for arg in given]
    return bool(kinds) and all("ndarray" in kind or "NDArray" in kind for kind in kinds)


def choose(found: Sequence[Served], wanted: str, shown: str) -> Served:
    """The class that is ``wanted`` (``module:Class``), or the only one that is meant to be served."""
    if wanted:
        module, _, cls = wanted.partition(":")
        for one in found:
            if (one.module, one.cls) == (module, cls):
                return one
        raise UsageError(
            f"{shown} has no class {wanted} with a method {', '.join(OPERATIONS)}",
            hint=f'{_TABLE} model = "MODULE:CLASS" names it.',
        )
    loading = [one for one in found if one.loads]
    candidates = loading or list(found)
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UsageError(
            f"{shown} has no class that can be served",
            hint="Write one with load(self, folder) and predict(self, …), or chat, embed, classify, rerank.",
        )
    names = ", ".join(f"{one.module}:{one.cls}" for one in candidates[:10])
    raise UsageError(
        f"{shown} has several classes that could be served: {names}",
        hint=f'Say which in {_TABLE}: model = "{candidates[0].module}:{candidates[0].cls}".',
    )


# --- what it needs ----------------------------------------------------------------------------------------------------


def inline(text: str, shown: str) -> Needs | None:
    """The inline metadata of a script (PEP 723); None where it has none."""
    blocks = list(_SCRIPT.finditer(text))
    if not blocks:
        return None
    if len(blocks) > 1:
        raise UsageError(f"{shown} has several blocks of inline metadata", hint="Keep one `# /// script` block.")
    lines = blocks[0].group("content").splitlines()
    table = _toml("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines), shown)
    needs = _checked(table.get("dependencies"), shown)
    return Needs(needs, _word(table.get("requires-python")), _ours(table, shown))


def project(text: str, shown: str) -> Needs:
    """What a ``pyproject.toml`` says."""
    table = _toml(text, shown)
    about: Any = table.get("project")
    known = cast("dict[str, Any]", about) if isinstance(about, dict) else {}
    return Needs(_checked(known.get("dependencies"), shown), _word(known.get("requires-python")), _ours(table, shown))


def listed(text: str, shown: str) -> tuple[str, ...]:
    """What a ``requirements.txt`` lists; options of pip's are not taken, since the index is this machine's own."""
    joined = text.replace("\\\n", " ")
    found: list[str] = []
    for number, line in enumerate(joined.splitlines(), 1):
        plain = _COMMENT.sub("", line).strip()
        plain = re.split(r"\s--hash", plain, maxsplit=1)[0].strip()
        if plain.startswith("-"):
            raise UsageError(
                f"{shown}, line {number}: '{plain[:60]}' is an option of pip's",
                hint="List the packages themselves; index settings are those of uv or pip on the machine that runs it.",
            )
        if plain:
            found.append(_requirement(plain, f"{shown}, line {number}"))
    return tuple(found)


def _requirement(text: str, where: str) -> str:
    try:
        found = Requirement(text)
    except InvalidRequirement as exc:
        raise UsageError(
            f"{where}: '{text[:60]}' is not a requirement", hint="Write NAME, NAME==1.2 or NAME>=1."
        ) from exc
    if found.url is not None:
        raise UsageError(
            f"{where}: '{text[:60]}' names an address", hint="Name a package of an index, and its version."
        )
    return str(found)


def _checked(value: Any, shown: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in cast("list[Any]", value)):
        raise UsageError(f"{shown}: dependencies is not a list of requirements", hint='Write ["numpy>=2"].')
    return tuple(_requirement(v, shown) for v in cast("list[str]", value))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _ours(table: Mapping[str, Any], shown: str) -> dict[str, Any]:
    tool: Any = table.get("tool")
    ours: Any = cast("dict[str, Any]", tool).get("pierhead") if isinstance(tool, dict) else None
    if ours is None:
        return {}
    if not isinstance(ours, dict):
        raise UsageError(
            f"{shown}: {_TABLE} is not a table", hint=f'Write {_TABLE} and below it model = "MODULE:CLASS".'
        )
    return cast("dict[str, Any]", ours)


def _toml(text: str, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise UsageError(f"{shown}: {exc}", hint="Correct it, then try again.") from exc
