"""The few members that the gateway changes in a request which an engine understands as it is; pure.

What is absent is put in front of the other members, without decoding; what must become another is decoded one level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import msgspec

from pierhead.gateway.ask import Ask
from pierhead.gateway.unseen import ESCAPED

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_USAGE: Final = b'"stream_options":{"include_usage":true},'
_STREAMS = ("chat", "completions")


def wants_usage(operation: str, ask: Ask) -> bool:
    """Whether an engine must be asked to tell the usage of this stream, and its word be kept from the client."""
    if not ask.stream or operation not in _STREAMS:
        return False
    return ask.stream_options is None or not ask.stream_options.include_usage


def _names(text: bytes, name: str) -> bool:
    """Whether a body may have a member of this name, as null: of two engines take the last."""
    return b'"%b"' % name.encode() in text or any(escape in text for escape in ESCAPED)


class Wanted(NamedTuple):
    """Members that an engine wants in every request: as JSON with a comma behind each, and each by its name."""

    text: bytes = b""
    members: Mapping[str, Any] = {}

    @classmethod
    def of(cls, text: str) -> Wanted:
        """From the JSON of an endpoint."""
        return cls(text.encode(), msgspec.json.decode(f"{{{text.removesuffix(',')}}}"))

    def over(self, text: bytes) -> tuple[bytes, dict[str, Any]]:
        """(members to put in front, members to replace) in a body: of two engines take the last, the client's own."""
        if self.members and any(_names(text, name) for name in self.members):
            return b"", dict(self.members)
        return self.text, {}


NOTHING: Final = Wanted()


def changes(
    operation: str, ask: Ask, model: str, cap: int, text: bytes = b"", wanted: Wanted = NOTHING
) -> tuple[bytes, dict[str, Any]]:
    """(members to put in front, members to replace): for the engine's ``model`` name, ``cap`` tokens at most, usage.

    ``model`` "" leaves the name; ``cap`` 0 sets no bound; ``text`` is the body or its skeleton. ``wanted`` is what its
    engine wants in every request.
    """
    front, changed = wanted.over(text)
    if wants_usage(operation, ask):
        if ask.stream_options is None and not _names(text, "stream_options"):
            front += _USAGE
        else:
            changed["stream_options"] = {"include_usage": True}
    if cap and operation in _BOUNDED:
        given = {name: value for name in _LIMITS if (value := getattr(ask, name)) is not None}
        name = _limit(operation, ask)
        if name not in given and not _names(text, name):
            front += b'"%b":%d,' % (name.encode(), cap)
        elif name not in given:
            changed[name] = cap
        changed |= {name: cap for name, value in given.items() if not 0 <= value <= cap}  # whichever an engine minds
    if model and model != ask.model:
        changed["model"] = model
    return front, changed


def within(operation: str, ask: Ask, cap: int) -> bool:
    """Whether the client bounds its answer by ``cap`` or less in the usual words, so that nothing need change."""
    if operation not in _BOUNDED:
        return True
    tokens = ask.max_tokens
    if tokens is None or not 0 <= tokens <= cap or operation == "responses":
        return False
    return ask.max_completion_tokens is None and ask.max_output_tokens is None and ask.n_predict is None


_BOUNDED = ("chat", "completions", "responses", "messages")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict")


def _limit(operation: str, ask: Ask) -> str:
    """The member by which this operation bounds its answer."""
    if operation == "responses":
        return "max_output_tokens"
    return "max_completion_tokens" if ask.max_completion_tokens is not None else "max_tokens"


def apply(body: Sequence[bytes], front: bytes, changed: dict[str, Any]) -> list[bytes]:
    """The body with these members; what is no JSON object is returned as it is: the engine refuses it better."""
    pieces = list(body)
    if changed:
        try:
            members = _members(b"".join(pieces))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return pieces
        for name, value in changed.items():
            members[name] = msgspec.Raw(msgspec.json.encode(_with(members.get(name), value)))
        pieces = [msgspec.json.encode(members)]
    for at, piece in enumerate(pieces if front else ()):  # the first one may be nothing but space
        brace = piece.find(b"{")
        if brace >= 0:
            pieces[at] = piece[: brace + 1] + front + piece[brace + 1 :]
            break
    return pieces


def _with(before: msgspec.Raw | None, value: Any) -> Any:
    """A member's new value; of an object only the members that are told are new."""
    if before is None or not isinstance(value, dict) or not bytes(before).startswith(b"{"):
        return cast("Any", value)
    merged: dict[str, Any] = {**_members(before), **cast("dict[str, Any]", value)}
    return merged


BARE: Final = b'{"choices":[{"finish_reason":'  # how llama.cpp begins a chat's whole answer
_SAYS: Final = b'"message":{"role":"assistant",'  # no text of the answer can hold this: its quotes would be escaped


def completed(body: bytes) -> bytes:
    """A whole answer that begins as ``BARE``, with the members of it that OpenAI's own are never without, as null."""
    if b'"refusal":' not in body:
        body = body.replace(_SAYS, _SAYS + b'"refusal":null,"annotations":[],')
    if b'"logprobs":' not in body:
        body = body.replace(b'{"finish_reason":', b'{"logprobs":null,"finish_reason":')
    return body


def without(body: bytes, name: str) -> bytes:
    """A JSON object without one of its members."""
    if name.encode() not in body:
        return body
    members = _members(body)
    members.pop(name, None)
    return msgspec.json.encode(members)
