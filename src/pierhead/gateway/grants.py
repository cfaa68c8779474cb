"""What a key may do, as people write it (budgets, durations, dates), read into grants and back; pure."""

from __future__ import annotations

import datetime
import re
import time
from decimal import Decimal
from typing import Any, Literal, cast

import msgspec

from pierhead.errors import UsageError
from pierhead.gateway.link import Budget, Grants

DIALECTS = ("openai", "anthropic", "ollama", "kserve")
MILLION = 1_000_000
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_BUDGET = re.compile(
    r"(\$?)\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kmbg]?)\s*(tokens?|usd|requests?|)\s*/\s*(day|month)", re.I
)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|m|h|d|w)", re.I)
_MOST = 10**15


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Grants as they are asked for; None leaves what is.

    ``expires`` is a duration (``30d``), a date or ``never``; ``budgets`` are such as ``1000000tokens/day``,
    ``5usd/month`` and ``100requests/day``. An empty list takes a scope or all budgets away.
    """

    models: tuple[str, ...] | None = None
    dialects: tuple[str, ...] | None = None
    admin: bool | None = None
    expires: str | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrent: int | None = None
    priority: int | None = None
    budgets: tuple[str, ...] | None = None
    cache: bool | None = None


def grants(wanted: Wanted, before: Grants | None = None, now: float | None = None) -> Grants:
    """``before`` with what is wanted; UsageError names what cannot be read."""
    changes: dict[str, Any] = {
        name: value for name in ("models", "admin", "priority", "cache") if (value := getattr(wanted, name)) is not None
    }
    for name in ("rpm", "tpm", "concurrent"):
        value = getattr(wanted, name)
        if value is not None:
            if not 0 <= value <= _MOST:
                raise UsageError(f"{name} must be a whole number of at least 0", hint="0 sets no limit.")
            changes[name] = value
    if wanted.models is not None and not all(0 < len(p) <= 200 and p.isprintable() for p in wanted.models):
        raise UsageError("a model's pattern is empty or too long", hint="Write a name or a pattern such as 'smol*'.")
    if wanted.dialects is not None:
        changes["dialects"] = _dialects(wanted.dialects)
    if wanted.expires is not None:
        changes["expires"] = expiry(wanted.expires, time.time() if now is None else now)
    if wanted.budgets is not None:
        changes["budgets"] = _distinct(tuple(budget(text) for text in wanted.budgets))
    if abs(changes.get("priority", 0)) > 100:
        raise UsageError("a priority is a number from -100 to 100", hint="0 is the usual one; higher goes first.")
    return msgspec.structs.replace(before or Grants(), **changes)


def _dialects(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in DIALECTS:
            raise UsageError(f"there is no dialect '{name[:40]}'", hint=f"Known: {', '.join(DIALECTS)}.")
    return names


def _distinct(budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    kinds = [(b.unit, b.window) for b in budgets]
    if len(set(kinds)) != len(kinds):
        raise UsageError("two budgets are of the same kind", hint="Give one for each unit and window.")
    return budgets


def budget(text: str) -> Budget:
    """``1000000tokens/day``, ``2M tokens/month``, ``5usd/month``, ``$0.50/day``, ``100requests/day``."""
    found = _BUDGET.fullmatch(text.strip())
    named = found[4].lower() if found is not None else ""
    if found is None or (named not in ("", "usd") if found[1] else not named):
        raise UsageError(
            f"'{text[:60]}' is not a budget",
            hint="Write an amount and a window, such as 1000000tokens/day, 5usd/month or 100requests/day.",
        )
    unit: Any = "usd" if found[1] or named == "usd" else named.removesuffix("s") + "s"
    amount = Decimal(found[2].replace("_", "").replace(",", "")) * _SCALE[found[3].lower()]
    if unit == "usd":
        amount *= MILLION
    if amount != amount.to_integral_value() or not 0 < amount <= _MOST:
        raise UsageError(
            f"the amount of '{text[:60]}' is too small, too large or too fine", hint="Write whole numbers."
        )
    return Budget(int(amount), unit, cast('Literal["day", "month"]', found[5].lower()))


def show_budget(value: Budget) -> str:
    """The same as text that ``budget`` reads."""
    if value.unit == "usd":
        return f"{money(value.amount)}usd/{value.window}"
    return f"{value.amount}{value.unit}/{value.window}"


def money(micro: int) -> str:
    """Millionths of a dollar as dollars, exactly: ``5``, ``0.25``."""
    text = f"{micro // MILLION}.{micro % MILLION:06d}".rstrip("0")
    return text.removesuffix(".")


def duration(text: str) -> float:
    """Seconds of ``90s``, ``30min``, ``12h``, ``30d``, ``2w``; UsageError for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found[1]) > 1e6:
        raise UsageError(f"'{text[:40]}' is not a duration", hint="Write a number and s, min, h, d or w, such as 30d.")
    return float(found[1]) * _SECONDS[found[2].lower()]


def expiry(text: str, now: float) -> float:
    """Unix time of a duration from ``now``, of a date (its end, in UTC) or a time; 0 for ``never``."""
    text = text.strip()
    if text.lower() in ("never", "none", ""):
        return 0.0
    if _DURATION.fullmatch(text):
        return now + duration(text)
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(
            f"'{text[:40]}' is neither a duration nor a date", hint="Write 30d, 2027-01-31 or 2027-01-31T12:00Z."
        ) from exc
    if len(text) == 10:
        at += datetime.timedelta(days=1)
    stamp = (at if at.tzinfo is not None else at.replace(tzinfo=datetime.UTC)).timestamp()
    if stamp <= now:
        raise UsageError(f"'{text}' is in the past", hint="`pier key revoke` ends a key at once.")
    return stamp
