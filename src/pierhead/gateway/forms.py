"""The fields of multipart forms: the model's name found, and where need be replaced; files stay as they are.

Runs in a thread: a form may be as large as any body.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from pierhead.gateway.faults import Fault, bad_request

_PARTS = 1000
_SHORT = 4096  # bytes of a field that is looked at


class _Field(NamedTuple):
    """Where a field's value is in the body."""

    name: str
    start: int
    end: int
    file: bool


class _Collector:
    """The callbacks of the parser; offsets are those of the whole body, which is fed at once."""

    def __init__(self, options: Any) -> None:
        self.fields: list[_Field] = []
        self.ended = False
        self._options = options
        self._name = b""
        self._key = b""
        self._value = b""
        self._file = False
        self._start = self._end = -1

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
        if len(self.fields) >= _PARTS:
            raise bad_request(f"the form has more than {_PARTS} parts.")
        self._name, self._file, self._start, self._end = b"", False, -1, -1

    def _header(self, data: bytes, start: int, end: int) -> None:
        self._key += data[start:end]

    def _said(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._key.lower() == b"content-disposition":
            _, options = self._options(self._value)
            self._name = options.get(b"name", b"")
            self._file = b"filename" in options
        self._key = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._start = start if self._start < 0 else self._start
        self._end = end

    def _part_end(self) -> None:
        name = self._name.decode("utf-8", "replace")
        self.fields.append(_Field(name, max(self._start, 0), max(self._end, 0), self._file))

    def _all(self) -> None:
        self.ended = True


def _parsed(body: bytes, content_type: str) -> list[_Field]:
    multipart: Any = importlib.import_module("python_multipart.multipart")
    errors: Any = importlib.import_module("python_multipart.exceptions")
    kind, options = multipart.parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise Fault(415, "not_a_form", "this endpoint takes multipart/form-data with a boundary.")
    found = _Collector(multipart.parse_options_header)
    try:
        parser = multipart.MultipartParser(boundary, found.callbacks())
        parser.write(body)
        parser.finalize()
    except errors.FormParserError as exc:
        raise bad_request(f"the form cannot be read: {exc}.") from exc
    if not found.ended:
        raise bad_request("the form has no end.")
    return found.fields


def fields(body: bytes, content_type: str) -> dict[str, str]:
    """The form's short fields by name; of one that is there twice the last; Fault 400 or 415."""
    return {
        f.name: body[f.start : f.end].decode("utf-8", "replace")
        for f in _parsed(body, content_type)
        if not f.file and f.end - f.start <= _SHORT
    }


def renamed(body: bytes, content_type: str, model: str) -> bytes:
    """The form with another model; all else to the byte."""
    for field in reversed(_parsed(body, content_type)):
        if field.name == "model" and not field.file:
            body = body[: field.start] + model.encode() + body[field.end :]
    return body
