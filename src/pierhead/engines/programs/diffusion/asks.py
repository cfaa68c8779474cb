"""What clients ask for, in the shapes of OpenAI's Images API, checked; extensions are ``seed``, ``steps`` and so on."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .faults import Refused
from .painter import SAMPLERS, SCHEDULERS
from .settings import Settings

KINDS = ("png", "jpeg", "webp")
LONGEST = 4000  # characters of a prompt
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
_QUALITIES = {"auto": 1.0, "standard": 1.0, "medium": 1.0, "low": 0.5, "high": 1.5, "hd": 1.5}  # of the usual steps
_SEEDS = 1 << 32


@dataclass(frozen=True)
class Ask:
    """Pictures to make; ``size`` is None where the client's own picture tells it."""

    job: dict[str, Any]
    n: int
    size: tuple[int, int] | None
    kind: str
    compression: int
    stream: bool


def read(given: Mapping[str, Any], settings: Settings, *, prompt: bool = True) -> Ask:
    """The request's fields, whether from JSON or a form; Refused 400 names the one that is wrong."""
    fields = Fields(given)
    fields.choice("response_format", "b64_json", ("b64_json",), "pictures are not kept here: ask for b64_json")
    fields.choice("background", "auto", ("auto", "opaque"), "these models make no transparent background")
    stream = fields.flag("stream")
    quality = fields.choice("quality", "auto", tuple(_QUALITIES))
    usual = min(settings.max_steps, max(1, round(settings.steps * _QUALITIES[quality])))
    kind = fields.choice("output_format", "png", KINDS)
    seed = fields.whole("seed", -1, -1, _SEEDS - 1)
    job: dict[str, Any] = {
        "prompt": fields.text("prompt", needed=prompt),
        "negative_prompt": fields.text("negative_prompt"),
        "seed": seed if seed >= 0 else secrets.randbelow(1 << 31),
        "steps": fields.whole("steps", usual, 1, settings.max_steps),
        "cfg_scale": fields.number("cfg_scale", settings.cfg_scale, 0, 100),
        "guidance": fields.number("guidance", settings.guidance, 0, 100),
        "strength": fields.number("strength", settings.strength, 0, 1),
        "clip_skip": fields.whole("clip_skip", settings.clip_skip, -1, 12),
        "sampler": fields.choice("sampler", settings.sampler, ("auto", *SAMPLERS)),
        "scheduler": fields.choice("scheduler", settings.scheduler, ("auto", *SCHEDULERS)),
        "images": [],
        "partials": fields.whole("partial_images", 0, 0, 3) if stream else 0,
    }
    n = fields.whole("n", 1, 1, settings.max_n)
    return Ask(job, n, size(fields, settings), kind, fields.whole("output_compression", 90, 0, 100), stream)


def size(fields: Fields, settings: Settings) -> tuple[int, int] | None:
    """The size that is asked for, within what can be painted."""
    asked = fields.text("size") or "auto"
    if asked == "auto":
        return None
    found = _SIZE.fullmatch(asked)
    if found is None:
        raise Refused("'size' must be like 512x512, or auto", "size")
    wide, high = int(found[1]), int(found[2])
    unit = settings.multiple
    if not wide or not high or wide % unit or high % unit:
        raise Refused(f"both numbers of 'size' must be multiples of {unit} from {unit} up", "size")
    if wide * high > settings.max_pixels:
        raise Refused(f"'size' has {wide * high} pixels, and {settings.max_pixels} are allowed (max-pixels)", "size")
    return wide, high


def near(size: tuple[int, int], multiple: int, most: int) -> tuple[int, int]:
    """The size that can be painted and is most like this one."""
    scale = min(1.0, (most / (size[0] * size[1])) ** 0.5)
    wide, high = (max(multiple, int(side * scale) // multiple * multiple) for side in size)
    longest = max(multiple, most // min(wide, high) // multiple * multiple)  # a strip keeps no proportions
    return min(wide, longest), min(high, longest)


class Fields:
    """A request's fields by name. Forms write all of them as text."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def text(self, name: str, *, needed: bool = False) -> str:
        value = self._given.get(name)
        if value is None:
            value = ""
        if not isinstance(value, str):
            raise Refused(f"'{name}' must be text", name)
        if needed and not value.strip():
            raise Refused(f"'{name}' is missing", name, code="missing_required_parameter")
        if len(value) > LONGEST:
            raise Refused(f"'{name}' has {len(value)} characters, and {LONGEST} are read", name, code="too_long")
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise Refused(f"'{name}' has characters that no text has", name)
        return value

    def choice(self, name: str, default: str, known: tuple[str, ...], why: str = "") -> str:
        value = self._given.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in known:
            raise Refused(f"'{name}' cannot be {str(value)[:40]!r}: {why or 'it may be ' + ', '.join(known)}", name)
        return value

    def flag(self, name: str) -> bool:
        return str(self._given.get(name, "false")).lower() not in ("false", "none", "0", "")

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        found = self.number(name, default, low, high)
        if found != int(found):
            raise Refused(f"'{name}' must be a whole number from {low} to {high}", name)
        return int(found)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._given.get(name)
        if value is None:
            return default
        try:
            if isinstance(value, bool):
                raise ValueError
            found = float(value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise Refused(f"'{name}' must be a number from {low} to {high}", name) from exc
        if not low <= found <= high:
            raise Refused(f"'{name}' must be from {low} to {high}", name)
        return found
