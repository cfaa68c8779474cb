"""The OpenAPI document of one model at the gateway's door; the engine is scripted."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json

import msgspec
import pytest

from pierhead.gateway import described, link
from pierhead.gateway.faults import Fault

ASK = {"type": "object", "title": "Ask", "required": ["text"], "properties": {"text": {"type": "string"}}}
ERROR = {"422": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}}}}
JSON = {"application/json": {"schema": {"$ref": "#/components/schemas/Ask"}}}


def post(answer: dict | None = None, body: dict | None = None) -> dict:
    made = {"responses": {"200": {"description": "", "content": answer or JSON}, **ERROR}}
    return {"post": made if body is None else {**made, "requestBody": {"required": True, "content": body}}}


DOCUMENT = {
    "openapi": "3.1.0",
    "info": {"title": "inner", "version": "1", "description": "Adds up."},
    "paths": {
        "/v1/predict": post({"text/event-stream": {}}, JSON),
        "/v2/models/{name}/infer": post(),
        "/v1/classify": post(body=JSON),
        "/internal": post(body=JSON),
    },
    "components": {"schemas": {"Ask": ASK, "HTTPValidationError": {}, "ValidationError": {}}},
}
PATH = "/v1/models/team/mine/openapi.json"


def endpoint(engine, **changes) -> link.Endpoint:
    return link.Endpoint("r", str(engine.path), serves=("predict", described.SERVED), **changes)


async def tells(call) -> None:
    await call.json(DOCUMENT)


async def test_the_document_has_the_gateways_paths_members_and_errors(gate, new_engine) -> None:
    engine = await new_engine(tells)
    await gate.serve(link.Route(name="team/mine", aliases=("mine",), endpoints=(endpoint(engine),)))
    answer = await gate.ask("GET", PATH)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found["info"] == {"title": "team/mine", "version": "1", "description": "Adds up."}
    assert list(found["paths"]) == ["/v1/predict", "/v2/models/team%2Fmine/infer", "/v1/classify"]
    asked = found["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert asked["required"] == ["model", "text"]
    assert asked["properties"]["model"] == {"type": "string", "const": "team/mine"}
    assert asked["properties"]["stream"] == {"type": "boolean", "default": True}
    classify = found["paths"]["/v1/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "stream" not in classify["properties"]
    assert set(found["paths"]["/v1/predict"]["post"]["responses"]) == {"200", "422", "default"}
    assert found["components"]["schemas"] == {"Ask": ASK}, "the model's own types stay as they are"
    assert (await gate.ask("GET", "/v1/models/mine/openapi.json")).json() == found


async def test_a_model_that_does_not_run_is_started_when_its_engine_has_a_document(gate, new_engine) -> None:
    engine = await new_engine(tells)
    await gate.serve(link.Route(name="idle", card={"openapi": "/v1/models/idle/openapi.json"}), link.Route(name="llm"))
    asking = asyncio.create_task(gate.ask("GET", "/v1/models/idle/openapi.json"))
    asked = await gate.next(link.EnsureReady)
    gate.say(link.StartResult(id=asked.id, endpoint=endpoint(engine)))
    assert (await asking).json()["info"]["title"] == "idle"
    answer = await gate.ask("GET", "/v1/models/llm/openapi.json")
    assert (answer.status, answer.json()["error"]["code"]) == (404, "not_offered")
    assert (await gate.ask("GET", "/v1/models/gone/openapi.json")).json()["error"]["code"] == "model_not_found"
    assert (await gate.ask("POST", "/v1/models/idle/openapi.json", {})).status == 405


async def test_only_keys_that_may_use_the_model_read_its_document(new_gate, new_engine) -> None:
    engine = await new_engine(tells)
    gate = await new_gate(require_key=True)
    pepper, text = b"p" * 32, "pier-abc"
    digest = hmac.new(pepper, text.encode(), hashlib.sha256).hexdigest()
    routes = [link.Route(name=name, endpoints=(endpoint(engine),)) for name in ("mine", "other")]
    keys = (link.Key(id="k", mac=digest, grants=link.Grants(models=("mine",))),)
    await gate.serve(*routes, keys=keys, pepper=pepper.hex())
    told = {"authorization": f"Bearer {text}"}
    asked = [("mine", told), ("other", told), ("mine", {})]
    got = [(await gate.ask("GET", f"/v1/models/{name}/openapi.json", headers=h)).status for name, h in asked]
    assert got == [200, 403, 401]


async def test_a_document_without_end_is_not_taken_in(gate, new_engine) -> None:
    async def floods(call) -> None:
        await call.json({"paths": {}, "info": {"description": "x" * (described.MOST + 1)}})

    engine = await new_engine(floods)
    await gate.serve(link.Route(name="m", endpoints=(endpoint(engine),)))
    answer = await gate.ask("GET", "/v1/models/m/openapi.json")
    assert (answer.status, answer.json()["error"]["source"]) == (502, "engine")


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"[]",
        b"{}",
        b'{"paths": []}',
        b'{"paths": {"/v1/predict": {"post": 1}}}',
        b'{"paths": {"/v1/predict": {"post": {"responses": {"200": 1}, "requestBody": {"content": {"x": {}}}}}}}',
        b'{"paths": {"/v1/predict": {"post": {"responses": {}}}}, "components": 3}',
        b'{"paths":' + b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_document_is_the_engines_failure(said: bytes) -> None:
    with pytest.raises(Fault) as failed:
        described.of_engine(said, "m")
    assert failed.value.status == 502


def test_schemas_that_refer_to_nothing_stay_as_they_are() -> None:
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/Gone"}}}
    document = {**DOCUMENT, "paths": {"/v1/predict": post(body=body)}, "components": {}}
    made = msgspec.json.decode(described.of_engine(json.dumps(document).encode(), "m"))
    assert made["paths"]["/v1/predict"]["post"]["requestBody"]["content"] == body
