"""Stored responses and conversations, over HTTP: read, listed, changed and deleted by the key that made them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec

from pierhead.gateway.answers import Answers
from pierhead.gateway.dialects.base import Save
from pierhead.gateway.dialects.members import Members, invalid, read
from pierhead.gateway.dialects.responses import items_of
from pierhead.gateway.dialects.responses_items import Conversation, Item, listed, normal
from pierhead.gateway.dialects.responses_request import labels
from pierhead.gateway.faults import Fault

if TYPE_CHECKING:
    from pierhead.gateway.admission import Admitted

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_MOST = 100  # items of a page, and of one addition
_DEEPEST = 1000  # responses in one chain


def methods(path: str) -> tuple[str, ...]:
    """What may be done at a path of stored things; () when there is nothing."""
    match path.split("/")[2:]:
        case ["responses", name] if name.startswith("resp_"):
            return ("GET", "DELETE")
        case ["responses", _, "input_items"]:
            return ("GET",)
        case ["responses", _, "cancel"] | ["conversations"]:
            return ("POST",)
        case ["conversations", _]:
            return ("GET", "POST", "DELETE")
        case ["conversations", _, "items"]:
            return ("GET", "POST")
        case ["conversations", _, "items", _]:
            return ("GET", "DELETE")
        case _:
            return ()


class Stored:
    """Answers one request about what ``answers`` holds; Fault 404 for what is not there, or is another key's."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def answer(self, request: Admitted, body: bytes) -> bytes:
        """The JSON of the answer."""
        _, _, kind, *rest = request.local.split("/")
        query = {name: values[-1] for name, values in parse_qs(request.query).items()}
        if kind == "responses":
            return await self._response(request, query, *rest)
        members = await asyncio.to_thread(read, body) if request.method == "POST" else Members({})
        if not rest:
            return await self._create(request.key_id, members)
        return await self._conversation(request, query, members, *rest)

    # --- responses ------------------------------------------------------------------------------------------------

    async def _response(self, request: Admitted, query: dict[str, str], name: str, verb: str = "") -> bytes:
        key = request.key_id
        if request.method == "DELETE":
            if not name.startswith("resp_") or await self._answers.change(key, name, lambda _: None) is None:
                raise _absent("response", name)
            return _encode({"id": name, "object": "response", "deleted": True})
        kept = await self._load(key, name)
        if verb == "cancel":
            raise Fault(400, "not_cancellable", "only a response that is made in the background can be cancelled.")
        if verb == "input_items":
            return _encode(_page(await self._inputs(key, kept), query))
        if query.get("stream") == "true":
            raise invalid("stream", "only a response that is made in the background can be streamed again.")
        return _encode(kept["response"])

    async def _load(self, key: str, name: str) -> dict[str, Any]:
        body = await self._answers.load(key, name) if name.startswith("resp_") else None
        if body is None:
            raise _absent("response", name)
        return await asyncio.to_thread(_decode, body)

    async def _inputs(self, key: str, kept: dict[str, Any]) -> list[Item]:
        """The items that made a response, from the beginning of its chain as far as that is still there."""
        found: list[list[Item]] = [kept["input"]]
        while kept["previous"] and len(found) < 2 * _DEEPEST:
            try:
                kept = await self._load(key, kept["previous"])
            except Fault:
                break
            found += [kept["response"]["output"], kept["input"]]
        return [item for items in reversed(found) for item in items]

    # --- conversations --------------------------------------------------------------------------------------------

    async def _create(self, key: str, members: Members) -> bytes:
        made: dict[str, Any] = {
            "id": f"conv_{os.urandom(16).hex()}",
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": labels(members),
        }
        lines = _lines(_new_items(members))
        members.done()
        await self._answers.keep(key, (Save(made["id"], _encode(made) + b"\n" + lines),))
        return _encode(made)

    async def _conversation(
        self, request: Admitted, query: dict[str, str], members: Members, name: str, items: str = "", item: str = ""
    ) -> bytes:
        key = request.key_id
        if item:
            return await self._item(request, name, item)
        if items and request.method == "POST":
            return await self._add(key, name, members)
        if items:
            body = await self._stored(key, name)
            return await asyncio.to_thread(lambda: _encode(_page(items_of(body), query)))
        if request.method == "GET":
            return (await self._stored(key, name)).partition(b"\n")[0]
        if request.method == "DELETE":
            await self._change(key, name, lambda _: None)
            return _encode({"id": name, "object": "conversation.deleted", "deleted": True})
        metadata = labels(members)
        members.done()
        made: list[bytes] = []

        def edit(body: bytes) -> bytes:
            head, _, rest = body.partition(b"\n")
            made.append(_encode(_decode(head) | {"metadata": metadata}))
            return made[0] + b"\n" + rest

        await self._change(key, name, edit)
        return made[0]

    async def _add(self, key: str, name: str, members: Members) -> bytes:
        added = _new_items(members)
        members.done()
        await self._change(key, name, lambda body: body + _lines(added))
        return _encode(_list(added, False))

    async def _item(self, request: Admitted, name: str, item: str) -> bytes:
        if request.method == "GET":
            for candidate in await asyncio.to_thread(items_of, await self._stored(request.key_id, name)):
                if candidate["id"] == item:
                    return _encode(candidate)
            raise _absent("item", item)

        def edit(body: bytes) -> bytes:
            kept = items_of(body)
            left = [candidate for candidate in kept if candidate["id"] != item]
            if len(left) == len(kept):
                raise _absent("item", item)
            return body.partition(b"\n")[0] + b"\n" + _lines(left)

        before = await self._change(request.key_id, name, edit)
        return before.partition(b"\n")[0]

    async def _stored(self, key: str, name: str) -> bytes:
        body = await self._answers.load(key, name) if name.startswith("conv_") else None
        if body is None:
            raise _absent("conversation", name)
        return body

    async def _change(self, key: str, name: str, edit: Callable[[bytes], bytes | None]) -> bytes:
        before = await self._answers.change(key, name, edit) if name.startswith("conv_") else None
        if before is None:
            raise _absent("conversation", name)
        return before


def _absent(kind: str, name: str) -> Fault:
    return Fault(404, f"{kind}_not_found", f"there is no {kind} '{name[:100]}'.")


def _lines(items: list[Item]) -> bytes:
    return b"".join(_encode(item) + b"\n" for item in items)


def _new_items(members: Members) -> list[Item]:
    """The items of a body, checked as a request for a response would have them."""
    raw = listed(members.any("items"), "items")
    if len(raw) > _MOST:
        raise invalid("items", f"must be at most {_MOST}.")
    nonce = os.urandom(16).hex()
    items = [normal(item, f"items.{number}", f"{nonce}_i{number}") for number, item in enumerate(raw)]
    for item in items:
        if item["type"] == "item_reference":
            raise invalid("items", "must be items themselves, not references to them.")
    Conversation().add((item, f"items.{number}") for number, item in enumerate(items))
    return items


def _list(items: list[Item], more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": more,
    }


def _page(items: list[Item], query: dict[str, str]) -> dict[str, Any]:
    """The page that ``limit``, ``order`` and ``after`` ask for; the newest come first unless asked otherwise."""
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit) <= _MOST):
        raise invalid("limit", f"must be a number from 1 to {_MOST}.")
    if order not in ("asc", "desc"):
        raise invalid("order", "must be asc or desc.")
    shown = items if order == "asc" else items[::-1]
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in shown]
        if after not in ids:
            raise invalid("after", f"there is no item '{after[:100]}'.")
        shown = shown[ids.index(after) + 1 :]
    return _list(shown[: int(limit)], len(shown) > int(limit))
