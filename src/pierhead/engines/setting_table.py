"""Settings of engines by name: their kinds and bounds, and refusals that name the closest; starts nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from pierhead.errors import UsageError

_SWITCH = {**dict.fromkeys(("true", "1", "on", "yes"), True), **dict.fromkeys(("false", "0", "off", "no"), False)}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Setting(NamedTuple):
    """A whole or fractional number within bounds, a number of bytes, a switch, text, or a tuple of words.

    Text is one of ``choices`` or fits ``pattern``, where there are such; so does each word of a tuple.
    """

    kind: type
    default: Any
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    bytes: bool = False
    pattern: str = ""


class Table:
    """The settings of ``whose``; ``aliases`` are other words for them."""

    def __init__(self, whose: str, settings: Mapping[str, Setting], aliases: Mapping[str, str]) -> None:
        self._whose = whose
        self._settings = settings
        self._aliases = aliases

    @property
    def defaults(self) -> dict[str, Any]:
        """What holds of those that nobody sets."""
        return {name: setting.default for name, setting in self._settings.items()}

    def canonical(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under their own names with values of the right kind; UsageError for what is not one."""
        done: dict[str, Any] = {}
        for word, value in given.items():
            name = self._name(word)
            try:
                done[name] = _value(self._settings[name], value)
            except (TypeError, ValueError, OverflowError) as exc:
                raise UsageError(
                    f"bad value {value!r:.60} for the setting '{word}' of {self._whose}",
                    hint=f"It must be: {_wanted(self._settings[name])}.",
                ) from exc
        return done

    def _name(self, given: str) -> str:
        plain = spelled(given)
        name = self._aliases.get(plain, plain)
        if name in self._settings:
            return name
        raise unknown(self._whose, given, self._settings, self._aliases)


def unknown(whose: str, given: str, known: Collection[str], aliases: Collection[str] = ()) -> UsageError:
    """The refusal of a setting that is not ``known``, with the closest one that is."""
    close = difflib.get_close_matches(spelled(given), [*known, *aliases], 1, 0.5)
    return UsageError(
        f"{whose} has no setting '{given}'",
        hint=f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(known) or 'none'}.",
        data={"parameter": given, "closest": close[0] if close else None},
    )


def spelled(given: str) -> str:
    """A setting's name as it is written here: ``--KV-cache-type`` is ``kv_cache_type``."""
    return given.strip().lstrip("-").replace("-", "_").lower()


def switch(value: Any) -> bool:
    """``on``, ``no``, ``true``, 0 … as a bool; ValueError for anything else."""
    found = value if isinstance(value, bool) else _SWITCH.get(str(value).lower())
    if found is None:
        raise ValueError
    return found


def byte_count(value: Any) -> int:
    """``2GiB``, ``500M`` or a number; ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(?:i?b)?\s*", str(value).lower())
    if found is None:
        raise ValueError
    return int(float(found[1]) * _UNITS[found[2]])


def _value(setting: Setting, value: Any) -> Any:
    if setting.kind is bool:
        return switch(value)
    if setting.kind is str:
        return _text(setting, value)
    if setting.kind is tuple:
        words: list[Any] = list(value) if isinstance(value, list | tuple) else str(value).split(",")  # pyright: ignore[reportUnknownArgumentType]
        return tuple(_text(setting, text) for word in words if (text := str(word).strip()))
    if isinstance(value, bool):
        raise ValueError
    number = byte_count(value) if setting.bytes else float(value)
    if setting.kind is int:
        if number != int(number):
            raise ValueError
        number = int(number)
    if not setting.low <= number <= setting.high:
        raise ValueError
    return number


def _text(setting: Setting, value: Any) -> str:
    text = ("true" if value else "false") if isinstance(value, bool) else str(value)
    if setting.choices:
        if text.lower() not in setting.choices:
            raise ValueError
        return text.lower()
    if setting.pattern and not re.fullmatch(setting.pattern, text):
        raise ValueError
    if len(text) > 1024 or "\0" in text or ".." in text.split("/") or text.startswith("/"):
        raise ValueError
    return text


def _wanted(setting: Setting) -> str:
    if setting.kind is bool:
        return "true or false"
    if setting.choices:
        return ", ".join(setting.choices)
    if setting.pattern:
        return f"{'words' if setting.kind is tuple else 'text'} of the form {setting.pattern}"
    if setting.kind in (str, tuple):
        return f"{'names' if setting.kind is tuple else 'a name'} inside the model's folder"
    if setting.bytes:
        return "a number of bytes, as 2GiB"
    return f"{'a whole number' if setting.kind is int else 'a number'} from {setting.low:g} to {setting.high:g}"
