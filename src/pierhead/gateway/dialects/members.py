"""Reads a JSON object member by member and refuses what nobody read, so that nothing is dropped silently; pure."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from pierhead.gateway.faults import Fault

_decode = msgspec.json.Decoder().decode
_NAMES: dict[str, tuple[type, ...]] = {
    "a string": (str,),
    "an integer": (int,),
    "a number": (int, float),
    "true or false": (bool,),
    "an array": (list,),
    "an object": (dict,),
}


class Members:
    """The members of one object that were not read yet; ``where`` is its place in the request, for messages.

    A member that is null counts as absent, as the APIs of the field have it. A value of another type than asked for is
    a Fault 400.
    """

    __slots__ = ("_left", "where")

    def __init__(self, value: Any, where: str = "") -> None:
        self.where = where
        if not isinstance(value, dict):
            raise invalid(where, "must be an object.")
        self._left: dict[str, Any] = dict(cast("dict[str, Any]", value))

    def place(self, name: str | int) -> str:
        """The path of a member."""
        return f"{self.where}.{name}" if self.where else str(name)

    def has(self, name: str) -> bool:
        """Whether it is there, and not read yet."""
        return self._left.get(name) is not None

    def any(self, name: str) -> Any:
        """A member of any type; None when it is absent."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        return self._typed(name, "a string")

    def whole(self, name: str, least: int | None = None) -> int | None:
        """An integer, at least ``least``."""
        value: int | None = self._typed(name, "an integer")
        if value is not None and least is not None and value < least:
            raise invalid(self.place(name), f"must be {least} or more.")
        return value

    def number(self, name: str) -> float | None:
        return self._typed(name, "a number")

    def flag(self, name: str) -> bool | None:
        return self._typed(name, "true or false")

    def array(self, name: str) -> list[Any] | None:
        return self._typed(name, "an array")

    def object(self, name: str) -> dict[str, Any] | None:
        return self._typed(name, "an object")

    def inner(self, name: str) -> Members | None:
        """An object, to be read in the same way."""
        value = self.any(name)
        return None if value is None else Members(value, self.place(name))

    def each(self, name: str) -> list[Members]:
        """The objects of an array."""
        return [Members(value, self.place(f"{name}.{i}")) for i, value in enumerate(self.array(name) or ())]

    def need(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        if value is None:
            raise invalid(self.place(name), "is missing.")
        return value

    def choice(self, name: str, *known: str) -> str | None:
        """One of a few words."""
        value = self.text(name)
        if value is not None and value not in known:
            raise invalid(self.place(name), f"must be one of {', '.join(known)}; '{value[:100]}' is not understood.")
        return value

    def ignore(self, *names: str) -> None:
        """Members that say nothing which an engine here could do otherwise; the documentation lists them."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, why: str, *names: str) -> None:
        """Fault 400 when one of these asks for something."""
        for name in names:
            if self._left.pop(name, None) not in (None, False, [], {}):
                raise invalid(self.place(name), why)

    def done(self) -> None:
        """Fault 400 for a member that was not read."""
        for name, value in self._left.items():
            if value is not None:
                raise invalid(self.place(name), "is not understood here.")

    def _typed(self, name: str, kind: str) -> Any:
        value = self._left.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, _NAMES[kind]) or (isinstance(value, bool) and kind != "true or false"):
            raise invalid(self.place(name), f"must be {kind}.")
        return value


def invalid(where: str, what: str) -> Fault:
    """The refusal of one member, whose place begins the message."""
    return Fault(400, "invalid_request", f"{where or 'the body'}: {what}", param=where or None)


def read(body: bytes) -> Members:
    """The members of a JSON body; Fault 400 when it is none."""
    try:
        return Members(_decode(body))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise Fault(400, "invalid_json", f"the request body is not usable JSON: {exc}.") from exc
