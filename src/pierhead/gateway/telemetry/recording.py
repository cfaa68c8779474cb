"""Makes the record of an exchange: what is worth keeping of it, cleaned; stores nothing."""

from __future__ import annotations

import json
from typing import Any

from pierhead.gateway.telemetry import answers
from pierhead.gateway.telemetry.messages import Exchange
from pierhead.gateway.telemetry.records import Record
from pierhead.gateway.telemetry.redact import Redactor


def record(exchange: Exchange, redactor: Redactor) -> Record:
    """A streamed answer is kept as the text in it: cut to pieces, what must go could not be found."""
    outcome, usage = exchange.outcome, exchange.outcome.usage
    redactor.media = False
    cut = exchange.request_size > len(exchange.request)
    request = redactor.body(exchange.request)
    media = redactor.media
    answer = answers.parse(exchange.answer)
    said = redactor.text(answers.text(answer))
    whole: Any = None
    if not answers.streamed(answer):
        whole = redactor.body(answer.body)
    return Record(
        id=outcome.id,
        time=outcome.time,
        key=outcome.key,
        operation=outcome.operation,
        dialect=outcome.dialect,
        path=outcome.path,
        asked=outcome.asked,
        model=outcome.model,
        replica=outcome.replica,
        revision=outcome.revision,
        status=outcome.status,
        ok=outcome.ok,
        stream=outcome.stream,
        code=outcome.code,
        prompt_tokens=usage.prompt,
        cached_tokens=usage.cached,
        completion_tokens=usage.completion,
        cost=outcome.cost,
        queued=outcome.queued,
        ttft=outcome.ttft,
        seconds=outcome.seconds,
        request=request,
        answer=whole,
        text=said,
        cut=cut,
        media=media,
        replay_of=exchange.replay_of,
    )


def body(kept: Record, model: str) -> bytes:
    """The request to send again, to ``model``; a stream is asked for its usage, to compare it."""
    again: dict[str, Any] = {**kept.request, "model": model}
    if again.get("stream") and kept.operation in ("chat", "completions"):
        again["stream_options"] = {"include_usage": True}
    return json.dumps(again).encode()
