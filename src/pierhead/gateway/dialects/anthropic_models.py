"""The list of models in the words of Anthropic's API, page by page; pure."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import msgspec

from pierhead.gateway.dialects.members import invalid

_MOST = 1000


def card(facts: dict[str, Any]) -> bytes:
    """One model; ``facts`` is its entry of ``/v1/models``."""
    return msgspec.json.encode(_card(facts))


def page(cards: Sequence[dict[str, Any]], query: str) -> bytes:
    """The page that ``limit``, ``after_id`` and ``before_id`` ask for; Fault 400 for a limit out of 1 to 1000."""
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    limit = asked.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit) <= _MOST):
        raise invalid("limit", f"must be a number from 1 to {_MOST}.")
    ids = [facts["id"] for facts in cards]
    begin, end = 0, len(ids)
    if asked.get("after_id") in ids:
        begin = ids.index(asked["after_id"]) + 1
    if asked.get("before_id") in ids:
        end = ids.index(asked["before_id"])
        begin = max(begin, end - int(limit))
        more = begin > 0
    else:
        more = end - begin > int(limit)
    shown = [_card(facts) for facts in cards[begin : min(end, begin + int(limit))]]
    return msgspec.json.encode(
        {
            "data": shown,
            "has_more": more,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
        }
    )


def _card(facts: dict[str, Any]) -> dict[str, Any]:
    created = datetime.datetime.fromtimestamp(facts.get("created") or 0, datetime.UTC)
    return {
        "type": "model",
        "id": facts["id"],
        "display_name": facts["id"],
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
    }
