"""The control API's document and its answers to bad requests."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from pierhead.daemon.control import Control, openapi_document, operations
from pierhead.daemon.streams import events
from pierhead.errors import Conflict, NotFound, UsageError
from pierhead.events import Failed, Listener, Note, PullProgress, decode

if TYPE_CHECKING:
    from tests.daemon.conftest import House

DOCUMENT = openapi_document()


def schemas(node: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "schema" and isinstance(value, dict):
                found.append(value)
            found += schemas(value)
    elif isinstance(node, list):
        for value in node:
            found += schemas(value)
    return found


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def test_the_document_is_json_and_every_schema_in_it_is_valid() -> None:
    again = json.loads(json.dumps(DOCUMENT))
    assert again["openapi"].startswith("3.1")
    for schema in [*schemas(again["paths"]), *again["components"]["schemas"].values()]:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere() -> None:
    for name in re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(DOCUMENT)):
        assert name in DOCUMENT["components"]["schemas"], name


def test_every_operation_has_an_id_a_summary_and_its_path_parameters() -> None:
    ids: list[str] = []
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            ids.append(operation["operationId"])
            assert operation["summary"]
            declared = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert declared == set(re.findall(r"\{(\w+)\}", path))
            assert "default" in operation["responses"]
    assert len(ids) == len(set(ids)) == len(operations(Control.__new__(Control)))


def test_the_promised_operations_are_there() -> None:
    have = {f"{m.upper()} {p.removeprefix('/api/v1')}" for p, ms in DOCUMENT["paths"].items() for m in ms}
    assert have == {
        "GET /version",
        "GET /status",
        "GET /settings/{name}",
        "PATCH /settings/{name}",
        "GET /models",
        "GET /models/{name}",
        "DELETE /models/{name}",
        "POST /models/pull",
        "POST /models/copy",
        "GET /replicas",
        "POST /replicas",
        "DELETE /replicas/{name}",
        "GET /replicas/{name}/logs",
        "GET /replicas/stats",
        "GET /keys",
        "POST /keys",
        "GET /keys/{name}",
        "PATCH /keys/{name}",
        "DELETE /keys/{name}",
        "POST /keys/{name}/rotate",
        "GET /routes",
        "POST /routes/check",
        "GET /routes/{name}",
        "PUT /routes/{name}",
        "DELETE /routes/{name}",
        "GET /usage",
        "GET /prices",
        "POST /shutdown",
    }


def test_real_answers_match_the_document(running: House) -> None:
    assert running.client.request("GET", "/openapi.json") == json.loads(json.dumps(DOCUMENT))
    running.client.request("POST", "/keys", {"name": "x"})
    list(running.client.events("POST", "/replicas", {"model": "smollm2"}))
    for path in ("/version", "/status", "/models", "/models/smollm2", "/replicas", "/keys"):
        template = "/models/{name}" if path == "/models/smollm2" else path
        answer = DOCUMENT["paths"]["/api/v1" + template]["get"]["responses"]["200"]
        validator(answer["content"]["application/json"]["schema"]).validate(running.client.get(path))
    lines = DOCUMENT["paths"]["/api/v1/replicas"]["post"]["responses"]["200"]["content"]["application/x-ndjson"]
    for line in running.client.stream("POST", "/replicas", {"model": "smollm2"}):
        validator(lines["schema"]).validate(line)


def test_bad_requests_get_one_clear_error_each(running: House) -> None:
    client = running.client
    for error, method, path, body in [
        (NotFound, "GET", "/nowhere", None),
        (UsageError, "PATCH", "/version", None),
        (UsageError, "POST", "/replicas", {"model": 7}),
        (UsageError, "POST", "/replicas", {"model": "smollm2", "colour": "red"}),
        (UsageError, "POST", "/keys", {"name": ""}),
        (UsageError, "POST", "/shutdown", {"mode": "later"}),
        (UsageError, "GET", "/replicas/stats?interval=soon", None),
        (NotFound, "GET", "/models/org/nosuch:tag", None),
        (NotFound, "DELETE", "/replicas/nosuch", None),
        (NotFound, "GET", "/replicas/nosuch/logs", None),
        (NotFound, "DELETE", "/keys/nosuch", None),
        (NotFound, "GET", "/keys/nosuch", None),
        (NotFound, "PATCH", "/keys/nosuch", {"rpm": 1}),
        (NotFound, "POST", "/keys/nosuch/rotate", {}),
        (UsageError, "POST", "/keys", {"name": "b", "budgets": ["lots"]}),
        (UsageError, "POST", "/keys/nosuch/rotate", {"grace": "soon"}),
    ]:
        with pytest.raises(error) as caught:
            client.request(method, path, body)
        assert caught.value.message
    with pytest.raises(UsageError, match="unknown engine parameter 'contxt'") as caught:
        list(client.events("POST", "/replicas", {"model": "smollm2", "settings": {"contxt": 5}}))
    assert "context" in (caught.value.hint or "")


def test_a_body_that_never_ends_is_refused(running: House) -> None:
    with pytest.raises((UsageError, Conflict)):
        running.client.request("POST", "/keys", {"name": "x" * 2_000_000})


def test_the_documentation_page_lists_the_operations(running: House) -> None:
    page = b"\n".join(running.client.lines("GET", "/docs")).decode()
    assert "/api/v1/replicas" in page


async def test_a_bug_in_streamed_work_ends_the_stream_with_an_error() -> None:
    async def work(listener: Listener) -> None:
        listener(Note(message="begun"))
        raise ZeroDivisionError

    seen = [decode(line) async for line in events(work)]
    assert isinstance(seen[0], Note)
    assert isinstance(seen[-1], Failed)
    assert "ZeroDivisionError" in seen[-1].error["message"]


async def test_a_reader_that_leaves_cancels_the_work() -> None:
    cancelled = asyncio.Event()

    async def work(listener: Listener) -> None:
        listener(Note(message="begun"))
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    stream = events(work)
    await anext(stream)
    await stream.aclose()
    assert cancelled.is_set()


async def test_progress_is_dropped_while_the_reader_lags() -> None:
    async def work(listener: Listener) -> None:
        for n in range(50):
            for _ in range(100):
                listener(PullProgress(name="m", file="f", done=n, total=50))
            await asyncio.sleep(0)
        listener(Failed(error={}))

    stream = events(work)
    first = await anext(stream)
    for _ in range(100):
        await asyncio.sleep(0)
    count = len([first, *[line async for line in stream]])
    assert 900 < count < 1500
