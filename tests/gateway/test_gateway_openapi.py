"""The gateway's OpenAPI document is true: requests made from it are answered as it says, and none breaks anything."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pierhead.gateway import link
from pierhead.gateway.openapi import document
from pierhead.gateway.operations import OPERATIONS, PATHS

CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
CHOICE: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
DELTA = {"index": 0, "delta": {"role": "assistant", "content": "hi"}, "finish_reason": None}
END = {"index": 0, "delta": {}, "finish_reason": "stop"}
FRAME = {"id": "c", "created": 1, "model": "m"}
EMBEDDING = {"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}
NATIVE = tuple(o.name for o in OPERATIONS.values() if o.dialect in ("openai", "anthropic"))
ANSWERS: dict[str, Any] = {
    "/v1/chat/completions": FRAME | {"object": "chat.completion", "choices": [CHOICE], "usage": USAGE},
    "/v1/completions": FRAME
    | {"object": "text_completion", "choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], "usage": USAGE},
    "/v1/embeddings": {"object": "list", "data": [EMBEDDING], "usage": USAGE},
    "/tokenize": {"tokens": [1, 2]},
    "/detokenize": {"content": "x"},
    "/apply-template": {"prompt": "x"},
    "/v1/rerank": {"results": [{"index": 0, "relevance_score": 0.5}]},
}
EVERYTHING: dict[str, Any] = {
    "id": "r", "object": "response", "output": [], "type": "message", "role": "assistant", "content": [], "data": [],
    "usage": {}, "input_tokens": 1, "model": "m", "message": {}, "response": "", "done": True, "embeddings": [],
    "embedding": [], "results": [],
}  # fmt: skip


async def play(call: Any) -> None:
    """An engine that answers everything in a word."""
    path = call.head.split()[1].decode()
    body = json.loads(call.body or b"{}") if call.headers.get("content-type") == "application/json" else {}
    if not (isinstance(body, dict) and body.get("stream")):
        await call.json(ANSWERS.get(path, EVERYTHING))
        return
    await call.sse()
    for choices in ([DELTA], [END]):
        await call.event(FRAME | {"object": "chat.completion.chunk", "choices": choices})
    await call.event(FRAME | {"object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    await call.event(b"[DONE]")
    await call.end()


def test_the_document_has_every_path_that_clients_can_ask():
    made = document()
    assert set(PATHS) < set(made["paths"])
    refs = {r["$ref"].rpartition("/")[2] for r in _refs(made)}
    assert refs <= set(made["components"]["schemas"])
    names = [operation["operationId"] for methods in made["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


def _refs(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return ([value] if "$ref" in value else []) + [r for v in value.values() for r in _refs(v)]
    return [r for v in value for r in _refs(v)] if isinstance(value, list) else []


@pytest.mark.filterwarnings("ignore")
async def test_requests_made_from_the_document_are_answered_as_it_says(gate, new_engine):
    native, chats = await new_engine(play, "native"), await new_engine(play, "chats")
    llama = ("chat", "completions", "embeddings", "llamacpp-tokenize", "llamacpp-detokenize", "llamacpp-template")
    await gate.serve(
        link.Route(name="native", endpoints=(msgspec.structs.replace(native.endpoint, serves=NATIVE),)),
        link.Route(name="chats", endpoints=(msgspec.structs.replace(chats.endpoint, serves=llama, context=4096),)),
    )
    served = (await gate.ask("GET", "/openapi.json")).json()
    assert served == json.loads(json.dumps(document()))
    for schema in served["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": ["native", "chats"]}
    base = f"http://127.0.0.1:{gate.port}"
    until = time.monotonic() + 60  # on a busy machine; it takes a fifth of that

    def tries(operation: Any) -> int:
        count = 0

        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            nonlocal count
            if time.monotonic() > until:
                return
            count += 1
            answer = case.call(base_url=base, timeout=15)
            if answer.status_code != 501:  # which is honest: it says what the model's engine cannot do
                case.validate_response(answer, checks=[not_a_server_error])
            case.validate_response(answer, checks=CHECKS)

        one()
        return count

    loaded = schemathesis.openapi.from_dict(served)
    operations = [result.ok() for result in loaded.get_all_operations()]
    assert len(operations) > 20
    async with asyncio.timeout(120):
        for operation in operations:
            await asyncio.to_thread(tries, operation)
    said = (await gate.ask("GET", "/ready")).status
    assert said == 200
    assert len(native.calls) > 20
    assert len(chats.calls) > 20
