"""Settings of an engine that is started with command-line flags: what there is, kept as data; starts nothing.

The table of each engine is written by ``scripts/engine-flags`` from the engine's own parser.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pierhead.engines.setting_table import spelled, switch
from pierhead.errors import UsageError

_SIZE = re.compile(r"\d+(\.\d+)?[kKmMgG]?|-1|auto")
MOST = 1 << 24


class Flag(msgspec.Struct, frozen=True):
    """One flag: ``yesno`` has a ``--no-`` form, ``size`` may end in K, M or G, ``many`` takes several words."""

    kind: str
    choices: tuple[str, ...] = ()
    many: bool = False


@functools.cache
def table(place: Path) -> dict[str, Flag]:
    """A table that ``scripts/engine-flags`` wrote; names with underscores."""
    found = msgspec.json.decode(place.read_bytes(), type=dict[str, Flag])
    return {name.replace("-", "_"): flag for name, flag in found.items()}


class Flags:
    """What one engine takes: ``own`` settings that its plugin reads itself, and the flags of the table.

    ``aliases`` are other words for either; ``refused`` are flags that cannot be set, each with the reason.
    """

    def __init__(
        self, place: Path | None, own: Mapping[str, Flag], aliases: Mapping[str, str], refused: Mapping[str, str]
    ) -> None:
        self._place = place
        self._own = own
        self._aliases = aliases
        self._refused = refused

    @property
    def table(self) -> Mapping[str, Flag]:
        """The flags by name, read when they are first needed."""
        return table(self._place) if self._place is not None else {}

    def canonical(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under the engine's own names with values of the right type; UsageError for what is not one."""
        done: dict[str, Any] = {}
        for given, value in settings.items():
            name, flag = self._find(given)
            try:
                done[name] = [_value(flag, v) for v in _several(value)] if flag.many else _value(flag, value)
            except (TypeError, ValueError, OverflowError, RecursionError) as exc:
                raise UsageError(
                    f"bad value {value!r:.60} for engine parameter '{given}'", hint=f"It must be: {_wanted(flag)}."
                ) from exc
        return done

    def argv(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Flags and values; a value never stands where a flag could."""
        words: list[str] = []
        known = self.table
        for name, value in settings.items():
            flag, word = known[name], f"--{name.replace('_', '-')}"
            if flag.kind in ("yesno", "switch"):
                words += [word] if value else [f"--no-{word[2:]}"] if flag.kind == "yesno" else []
            elif flag.many and len(value) > 1:
                words += [word, *(_text(v) for v in value)]
            else:
                words.append(f"{word}={_text(value[0] if flag.many else value)}")
        return tuple(words)

    def _find(self, given: str) -> tuple[str, Flag]:
        plain = spelled(given)
        name = self._aliases.get(plain, plain)
        if name in self._own:
            return name, self._own[name]
        reason = self._refused.get(name)
        if reason is not None:
            raise UsageError(f"the engine parameter '{given}' cannot be set: {reason}", hint="Leave it out.")
        known = self.table
        if name in known:
            return name, known[name]
        choices = [*self._own, *self._aliases, *(n for n in known if n not in self._refused)]
        close = difflib.get_close_matches(plain, choices, 1, 0.5)
        raise UsageError(
            f"unknown engine parameter '{given}'",
            hint=f"Did you mean '{close[0]}'?" if close else "docs/how-to/engines.md names the common ones.",
            data={"parameter": given, "closest": close[0] if close else None},
        )


def _several(value: Any) -> list[Any]:
    found: list[Any] = list(value) if isinstance(value, list | tuple) else str(value).split(",")  # pyright: ignore[reportUnknownArgumentType]
    return found or _refuse()


def _value(flag: Flag, value: Any) -> Any:
    if flag.kind in ("yesno", "switch"):
        return switch(value)
    if flag.kind == "json":
        made: Any = json.loads(value) if isinstance(value, str) else value
        json.dumps(made)  # what cannot be written down cannot be handed to the engine
        return made
    if isinstance(value, bool | list | dict):
        _refuse()
    found = _READ.get(flag.kind, str)(str(value))  # pyright: ignore[reportUnknownArgumentType]
    return found if not flag.choices or str(found) in flag.choices else _refuse()


def _count(text: str) -> int:
    return int(text) if 0 <= int(text) <= MOST else _refuse()


def _size(text: str) -> str:
    return text if _SIZE.fullmatch(text) else _refuse()


def _plain(text: str) -> str:
    return text if "\0" not in text and not text.startswith("-") else _refuse()


_READ: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "count": _count, "size": _size, "text": _plain}


def _refuse() -> Any:
    raise ValueError


def _wanted(flag: Flag) -> str:
    if flag.choices:
        return " or ".join(flag.choices)
    words = {
        "yesno": "true or false",
        "switch": "true or false",
        "size": "a number, which may end in K, M or G",
        "json": "JSON",
        "count": f"a number from 0 to {MOST}",
    }
    return words.get(flag.kind, flag.kind)


def _text(value: Any) -> str:
    """A value as one word; what looks like a place of the launch spec stays text."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return text.replace("$(", "$$(")
