"""The exception tree and its wire form."""

from __future__ import annotations

import msgspec
import pytest

from pierhead import events
from pierhead.errors import EngineFailed, NotFound, PierError, from_dict


def _tree(cls: type[PierError]) -> list[type[PierError]]:
    known = [sub for sub in cls.__subclasses__() if sub.__module__ == "pierhead.errors"]
    return [cls, *(s for sub in known for s in _tree(sub))]


@pytest.mark.parametrize("cls", _tree(PierError), ids=lambda c: c.__name__)
def test_an_error_survives_the_wire(cls: type[PierError]) -> None:
    sent = cls("what failed", hint="type this", data={"free": 3})
    got = from_dict(msgspec.json.decode(msgspec.json.encode(sent.to_dict())))
    assert type(got) is cls
    assert (got.message, got.hint, got.data) == (sent.message, sent.hint, sent.data)


def test_codes_name_one_class_each() -> None:
    codes = [c.code for c in _tree(PierError)]
    assert len(codes) == len(set(codes))


def test_an_unknown_or_odd_error_from_elsewhere_is_still_an_error() -> None:
    assert str(from_dict({"code": "new", "data": "text", "hint": 3})) == "unknown error"
    assert from_dict({"message": "m", "hint": 3}).hint is None


def test_a_failure_event_carries_an_error() -> None:
    error = EngineFailed("it stopped", data={"log": ["last line"]})
    event = events.decode(events.encode(events.Failed(error=error.to_dict())))
    assert isinstance(event, events.Failed)
    assert isinstance(from_dict(event.error), EngineFailed)
    assert not isinstance(from_dict(event.error), NotFound)
