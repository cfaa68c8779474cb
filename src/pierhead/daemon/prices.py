"""What models cost: the prices that come with Pierhead, and the user's own over them; counts nothing."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, cast

import msgspec

from pierhead.errors import ConfigError
from pierhead.gateway.link import Price

FILE = "prices.toml"
_MILLION = 1_000_000
_DEAREST = 1_000_000  # dollars for a million tokens
_MEMBERS = {"input", "output", "cached"}


class PriceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the models of a pattern cost, in US dollars per million tokens; ``origin`` is ``pierhead`` or a file."""

    pattern: str
    input: float
    output: float
    cached: float
    origin: str


def load(config: Path) -> list[tuple[Price, str]]:
    """Every price and where it comes from, in the order in which they count; ConfigError names what is wrong."""
    file = config / FILE
    try:
        own = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        own = ""
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {file}: {exc}", hint=f"Correct or move away {file}.") from exc
    shipped = resources.files(__package__ or "pierhead.daemon").joinpath(FILE).read_text(encoding="utf-8")
    return [(p, str(file)) for p in parse(own, str(file))] + [(p, "pierhead") for p in parse(shipped, FILE)]


def parse(text: str, where: str) -> list[Price]:
    """The prices of a file: a table for each pattern, with ``input``, ``output`` and perhaps ``cached`` in dollars."""
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"cannot read {where}: {exc}", hint=f"Correct or move away {where}.") from exc
    return [_price(pattern, table, where) for pattern, table in tables.items()]


def _price(pattern: str, raw: Any, where: str) -> Price:
    table = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}
    wrong = set(table) - _MEMBERS
    if not {"input", "output"} <= set(table) or wrong:
        raise ConfigError(
            f"{where}: the price of '{pattern[:100]}' needs input and output, and knows cached beside them",
            hint=f'Write ["{pattern[:100]}"] and below it: input = 0.15 and output = 0.60.',
        )
    values = {name: _micro(value, pattern, where) for name, value in table.items()}
    return Price(pattern, values["input"], values["output"], values.get("cached", -1))


def _micro(value: Any, pattern: str, where: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | Decimal)
        or not Decimal(value).is_finite()
        or not 0 <= value <= _DEAREST
    ):
        raise ConfigError(
            f"{where}: a price of '{pattern[:100]}' is no number of dollars from 0 to {_DEAREST}",
            hint="Prices are US dollars per million tokens.",
        )
    return int((Decimal(value) * _MILLION).to_integral_value(rounding="ROUND_CEILING"))


def info(price: Price, origin: str) -> PriceInfo:
    """A price for people."""
    cached = price.cached if price.cached >= 0 else price.input
    dollars = [micro / _MILLION for micro in (price.input, price.output, cached)]
    return PriceInfo(pattern=price.pattern, input=dollars[0], output=dollars[1], cached=dollars[2], origin=origin)
