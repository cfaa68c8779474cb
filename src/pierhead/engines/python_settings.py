"""The Python engine's settings by name: which there are, of which kind, and in which bounds; starts nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pierhead.errors import UsageError


class Setting(NamedTuple):
    """A whole or fractional number within bounds, or a number of bytes."""

    kind: type
    default: Any
    low: float
    high: float
    bytes: bool = False


SETTINGS: dict[str, Setting] = {
    "max_batch_size": Setting(int, 1, 1, 65536),
    "batch_delay_ms": Setting(float, 0.0, 0, 60_000),
    "concurrency": Setting(int, 1, 1, 1024),
    "parallel": Setting(int, 0, 0, 65536),
    "threads": Setting(int, 0, 0, 1024),
    "memory": Setting(int, 0, 0, 1 << 50, bytes=True),
}
ALIASES = {
    "max_batch": "max_batch_size",
    "batch_size": "max_batch_size",
    "batch": "max_batch_size",
    "batch_delay": "batch_delay_ms",
    "max_delay_ms": "batch_delay_ms",
    "max_concurrency": "concurrency",
}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their own names with values of the right kind; UsageError for what is not one."""
    done: dict[str, Any] = {}
    for given, value in settings.items():
        name = _name(given)
        try:
            done[name] = _value(SETTINGS[name], value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise UsageError(
                f"bad value {value!r:.60} for the setting '{given}' of a Python model",
                hint=f"It must be: {_wanted(SETTINGS[name])}.",
            ) from exc
    return done


def _name(given: str) -> str:
    plain = given.strip().lstrip("-").replace("-", "_").lower()
    name = ALIASES.get(plain, plain)
    if name in SETTINGS:
        return name
    close = difflib.get_close_matches(plain, [*SETTINGS, *ALIASES], 1, 0.5)
    raise UsageError(
        f"a Python model has no setting '{given}'",
        hint=f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(SETTINGS)}.",
        data={"parameter": given, "closest": close[0] if close else None},
    )


def _value(setting: Setting, value: Any) -> Any:
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


def byte_count(value: Any) -> float:
    """``2GiB``, ``500M`` or a number."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(?:i?b)?\s*", str(value).lower())
    if found is None:
        raise ValueError
    return int(float(found[1]) * _UNITS[found[2]])


def _wanted(setting: Setting) -> str:
    if setting.bytes:
        return "a number of bytes, as 2GiB"
    return f"{'a whole number' if setting.kind is int else 'a number'} from {setting.low:g} to {setting.high:g}"
