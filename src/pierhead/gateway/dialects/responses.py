"""OpenAI's Responses API on engines that chat: history from the store, a chat request, and the answer stored; pure."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec

from pierhead.gateway.dialects import responses_answer as answers
from pierhead.gateway.dialects.base import JSON, SSE, Call, Facts, Load, Reply, Save, Send, Steps, Translation
from pierhead.gateway.dialects.chat import Chunks, prefill
from pierhead.gateway.dialects.counting import count
from pierhead.gateway.dialects.members import invalid, read
from pierhead.gateway.dialects.responses_items import Conversation, Item, listed, normal
from pierhead.gateway.dialects.responses_request import Wish, read_wish
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import Usage

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_DEEPEST = 1000  # responses in one chain
Placed = list[tuple[Item, str]]
Loads = Generator[Load, bytes | None, Placed]


def make(facts: Facts) -> Translation | None:
    """Responses, of engines that chat."""
    return Responses(facts) if "chat" in facts.serves else None


def make_count(facts: Facts) -> Translation | None:
    """How many tokens the input has, of engines that show their template's work and their tokens."""
    counts = {"llamacpp-template", "llamacpp-tokenize"} <= facts.serves
    return CountInput(facts) if counts else None


def history(wish: Wish) -> Loads:
    """The items before this request's own: of the chain of responses that it goes on from, or of its conversation."""
    if wish.conversation:
        stored = yield Load(wish.conversation)
        if stored is None or not wish.conversation.startswith("conv_"):
            raise Fault(404, "conversation_not_found", f"there is no conversation '{wish.conversation[:100]}'.")
        return [(item, "conversation") for item in items_of(stored)]
    chain: list[dict[str, Any]] = []
    name = wish.previous
    while name:
        stored = (yield Load(name)) if name.startswith("resp_") else None
        if stored is None:
            message = f"there is no response '{name[:100]}' to go on from."
            raise Fault(400, "previous_response_not_found", message, param="previous_response_id")
        chain.append(_decode(stored))
        name = chain[-1]["previous"]
        if len(chain) > _DEEPEST:
            raise invalid("previous_response_id", f"goes on from more than {_DEEPEST} responses.")
    before: Placed = []
    for link in reversed(chain):
        before += [(item, "previous_response_id") for item in (*link["input"], *link["response"]["output"])]
    return before


def items_of(stored: bytes) -> list[Item]:
    """The items of a stored conversation: one a line, after the conversation's own."""
    return [_decode(line) for line in stored.splitlines()[1:]]


def own_items(wish: Wish, before: Placed, nonce: str) -> Loads:
    """The request's own items, with what their references refer to."""
    made: Placed = []
    for number, item in enumerate(listed(wish.input, "input")):
        where = f"input.{number}"
        item = normal(item, where, f"{nonce}_i{number}")
        if item["type"] == "item_reference":
            item = yield from _referred(item, where, [*before, *made])
        made.append((item, where))
    return made


def _referred(item: Item, where: str, known: Placed) -> Generator[Load, bytes | None, Item]:
    name = item.get("id")
    for candidate, _ in known:
        if candidate["id"] == name:
            return candidate
    # The ids of items that were made here tell which response they belong to.
    parts = name.split("_") if isinstance(name, str) else []
    stored = (yield Load(f"resp_{parts[1]}")) if len(parts) == 3 else None
    if stored is not None:
        kept = _decode(stored)
        for candidate in (*kept["input"], *kept["response"]["output"]):
            if candidate["id"] == name:
                return candidate
    raise invalid(where, f"there is no item '{str(name)[:100]}'.")


class Responses:
    """One response."""

    kind = SSE
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._wish: Wish | None = None
        self._own: list[Item] = []
        self._prefill = ""
        self._chunks = Chunks()
        self._events: answers.Events | None = None

    def steps(self, body: bytes) -> Steps:
        self._wish = wish = read_wish(read(body), self._facts)
        before = yield from history(wish)
        own = yield from own_items(wish, before, self._facts.nonce)
        self._own = [item for item, _ in own]
        chat = wish.chat | {"messages": _messages(wish, before, own)}
        if wish.truncates:
            yield from _fit(chat, self._facts)
        self._prefill = prefill(chat["messages"])
        self._events = answers.Events(self._facts, wish)
        return Send("chat", _encode(chat), wish.stream)

    def answer(self, body: bytes, usage: Usage) -> bytes:
        assert self._wish is not None
        made = answers.whole(self._facts, self._wish, body, usage, self._prefill)
        self._store(made)
        return _encode(made)

    def events(self, data: bytes) -> bytes:
        assert self._events is not None
        return b"".join(map(self._events.feed, self._chunks.feed(data)))

    def end(self, usage: Usage) -> bytes:
        events = self._events
        assert events is not None
        last = b"".join(map(events.feed, self._chunks.rest())) + events.end(usage)
        if events.last is not None:
            self._store(events.last)
        return last

    def failed(self, fault: Fault) -> bytes:
        """The events that end a stream which broke."""
        return self._events.failed(fault) if self._events is not None else b""

    def _store(self, made: dict[str, Any]) -> None:
        wish = self._wish
        assert wish is not None
        saves: list[Save] = []
        if wish.store:
            kept = {"response": made, "input": self._own, "previous": wish.previous}
            saves.append(Save(made["id"], _encode(kept)))
        if wish.conversation:
            lines = b"".join(_encode(item) + b"\n" for item in (*self._own, *made["output"]))
            saves.append(Save(wish.conversation, lines, append=True))
        self.saves = tuple(saves)


def _messages(wish: Wish, before: Placed, own: Placed) -> list[dict[str, Any]]:
    conversation = Conversation(wish.instructions)
    conversation.add(before)
    conversation.add(own)
    return conversation.finish()


# --- counting ---------------------------------------------------------------------------------------------------------


def _fit(chat: dict[str, Any], facts: Facts) -> Generator[Call, bytes | None, None]:
    """Leave out the oldest messages, but no instructions, until prompt and answer fit the engine's context."""
    if not facts.context or not {"llamacpp-template", "llamacpp-tokenize"} <= facts.serves:
        raise invalid("truncation", "'auto' is not possible with this engine: it does not tell how long a prompt is.")
    room = facts.context - min(chat.get("max_tokens") or 256, facts.context // 2)
    while (size := (yield from count(chat, facts))) > room:
        messages: list[dict[str, Any]] = chat["messages"]
        first = 1 if messages[0]["role"] == "system" else 0
        spare = len(messages) - first - 1
        if spare < 1:
            return  # the last message alone is too long: the engine says so, with its numbers
        drop = max(1, min(spare, spare * (size - room) // size))
        while drop < spare and messages[first + drop]["role"] == "tool":
            drop += 1  # no result without its call
        chat["messages"] = messages[:first] + messages[first + drop :]


class CountInput:
    """The tokens of a request that is not made."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def steps(self, body: bytes) -> Steps:
        wish = read_wish(read(body), self._facts)
        before = yield from history(wish)
        own = yield from own_items(wish, before, self._facts.nonce)
        tokens = yield from count(wish.chat | {"messages": _messages(wish, before, own)}, self._facts)
        return Reply(_encode({"object": "response.input_tokens", "input_tokens": tokens}))

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return body

    def events(self, data: bytes) -> bytes:
        return data

    def end(self, usage: Usage) -> bytes:
        return b""
