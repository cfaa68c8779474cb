"""What clients ask, as OpenAI's routes for sound have it: the fields of a form, checked."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from .faults import Refused, bad
from .languages import code
from .settings import Settings
from .whisper import Wish

FORMS = ("json", "text", "srt", "verbose_json", "vtt")
_TRUE = frozenset(("true", "1", "on", "yes"))
_PARTS = 100
_SHORT = 16 << 10  # bytes of a field that is no file


@dataclass(frozen=True)
class Ask:
    """A request; ``form`` is that of the answer."""

    sound: bytes
    wish: Wish
    form: str = "json"
    segments: bool = True
    logprobs: bool = False
    stream: bool = False


def read(body: bytes, content_type: str, settings: Settings, *, translate: bool, multilingual: bool) -> Ask:
    """The request in a form; Refused for what is not understood or cannot be done."""
    fields, sound = _parts(body, content_type)
    if sound is None:
        raise bad("The form has no file.", "file")
    if not sound:
        raise bad("The file is empty.", "file", "invalid_audio")
    form = _last(fields, "response_format", "json").strip().lower()
    if form not in FORMS:
        raise bad(f"'response_format' is {form[:40]!r}: it must be one of {', '.join(FORMS)}.", "response_format")
    details = _list(fields, "timestamp_granularities", ("word", "segment"))
    if details and form != "verbose_json":
        raise bad("'timestamp_granularities' needs the response_format verbose_json.", "timestamp_granularities")
    wish = Wish(
        language=_language(fields, settings, multilingual),
        translate=translate or settings.translate,
        prompt=_last(fields, "prompt", "").replace("\0", " ").strip(),
        temperature=_temperature(fields, settings),
        words="word" in details,
    )
    if wish.translate and not multilingual:
        raise bad("This model knows English only: there is nothing to translate.", "model")
    include = _list(fields, "include", ("logprobs",))
    stream = _last(fields, "stream", "false").strip().lower() in _TRUE
    return Ask(sound, wish, form, not details or "segment" in details, "logprobs" in include, stream)


def _language(fields: dict[str, list[str]], settings: Settings, multilingual: bool) -> str:
    found = code(_last(fields, "language", "")) or code(settings.language)
    if not multilingual and found not in ("", "en"):
        raise bad("This model knows English only.", "language")
    return found


def _temperature(fields: dict[str, list[str]], settings: Settings) -> float:
    given = _last(fields, "temperature", "").strip()
    try:
        found = float(given) if given else settings.temperature
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise bad(f"'temperature' is {given[:40]!r}: it must be a number from 0 to 1.", "temperature")
    return found


def _last(fields: dict[str, list[str]], name: str, default: str) -> str:
    return fields.get(name, [default])[-1]


def _list(fields: dict[str, list[str]], name: str, known: tuple[str, ...]) -> list[str]:
    """A field that may be there several times, as ``name`` or ``name[]``."""
    found = [word.strip() for key in (name, f"{name}[]") for word in fields.get(key, ())]
    for word in found:
        if word not in known:
            raise bad(f"'{name}' has {word[:40]!r}: it may have {', '.join(known)}.", name)
    return found


def _parts(body: bytes, content_type: str) -> tuple[dict[str, list[str]], bytes | None]:
    """Short fields by name, and the file; Refused where the body is no form."""
    multipart: Any = importlib.import_module("python_multipart.multipart")
    errors: Any = importlib.import_module("python_multipart.exceptions")
    kind, options = multipart.parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise Refused(415, "This route takes multipart/form-data with a boundary.", "not_a_form")
    found = _Form(body, multipart.parse_options_header)
    try:
        parser = multipart.MultipartParser(boundary, found.callbacks())
        parser.write(body)
        parser.finalize()
    except errors.FormParserError as exc:
        raise bad(f"The form cannot be read: {exc}.") from exc
    if not found.ended:
        raise bad("The form has no end.")
    return found.fields, found.sound


class _Form:
    """The callbacks of the parser, which is fed the whole body at once."""

    def __init__(self, body: bytes, options: Any) -> None:
        self.fields: dict[str, list[str]] = {}
        self.sound: bytes | None = None
        self.ended = False
        self._body = body
        self._options = options
        self._parts = 0
        self._key = self._value = self._name = b""
        self._span = (-1, -1)

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header,
            "on_header_value": self._said,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._all,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _PARTS:
            raise bad(f"The form has more than {_PARTS} parts.")
        self._name, self._span = b"", (-1, -1)

    def _header(self, data: bytes, start: int, end: int) -> None:
        self._key += data[start:end]

    def _said(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._key.lower() == b"content-disposition":
            self._name = self._options(self._value)[1].get(b"name", b"")
        self._key = self._value = b""

    def _data(self, _: bytes, start: int, end: int) -> None:
        self._span = (self._span[0] if self._span[0] >= 0 else start, end)

    def _part_end(self) -> None:
        name = self._name.decode("utf-8", "replace")
        start, end = self._span if self._span[0] >= 0 else (0, 0)
        if name == "file":
            self.sound = self._body[start:end]
        elif end - start > _SHORT:
            raise bad(f"The field '{name[:40]}' is longer than {_SHORT} bytes.", name[:40])
        else:
            self.fields.setdefault(name, []).append(self._body[start:end].decode("utf-8", "replace"))

    def _all(self) -> None:
        self.ended = True
