"""The OpenAPI document that an engine gives of its model, as clients of the gateway see it; pure but for the asking."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import msgspec

from pierhead.gateway.faults import Fault
from pierhead.gateway.fetch import fetch
from pierhead.gateway.operations import place
from pierhead.gateway.routes import Entry

if TYPE_CHECKING:
    from pierhead.gateway.services import Services
    from pierhead.gateway.upstream import Target

Obj = dict[str, Any]
ENDING = "/openapi.json"
SERVED = "python-openapi"  # by an engine that has such a document
MOST = 1 << 20  # bytes of it
_TIMEOUT = 10.0
_SCHEMAS = "#/components/schemas/"
_TEXT: Obj = {"type": "string"}
_ERROR: Obj = {
    "type": "object",
    "required": ["message", "type", "code"],
    "properties": {"message": _TEXT, "type": _TEXT, "code": _TEXT, "param": {"type": ["string", "null"]}},
}
_TENSOR: Obj = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": _TEXT,
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": _TEXT,
        "data": {"type": "array"},
    },
}
_FAULTS: dict[str, Obj] = {
    "openai": {"type": "object", "required": ["error"], "properties": {"error": _ERROR}},
    "kserve": {"type": "object", "required": ["error"], "properties": {"error": _TEXT}},
}


async def described(services: Services, entry: Entry) -> bytes:
    """The document of a model, whose engine is started if need be; Fault 404 where it has none."""
    target = next((t for t in entry.targets if _tells(t)), None)
    if target is None and "openapi" in entry.facts:
        target = await services.ensure_ready(entry.name, "")
    if target is None or not _tells(target):
        raise Fault(
            404,
            "not_offered",
            f"the engine of '{entry.name}' has no document of its own.",
            hint="/openapi.json describes what models can be asked for.",
        )
    said = await fetch(target, b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n", limit=MOST, timeout=_TIMEOUT)
    return await asyncio.to_thread(of_engine, said, entry.name)


def _tells(target: Target) -> bool:
    return target.outside is None and SERVED in target.serves


def of_engine(said: bytes, name: str) -> bytes:
    """The engine's document with the gateway's paths, errors and keys, and the ``model`` that requests have to name."""
    try:
        document = msgspec.json.decode(said, type=Obj)
        made = _document(document, name)
        return msgspec.json.encode(made)
    except (msgspec.MsgspecError, RecursionError, KeyError, TypeError, AttributeError) as exc:
        text = f"the engine of '{name}' gave a document that is none."
        raise Fault(502, "engine_failed", text, source="engine") from exc


def _document(document: Obj, name: str) -> Obj:
    components: Obj = {**document["components"].get("schemas", {})} if "components" in document else {}
    paths = [_path(path, methods, components, name) for path, methods in document["paths"].items()]
    shown = {one: what for one, what in components.items() if one not in ("HTTPValidationError", "ValidationError")}
    about: Obj = document.get("info") or {}
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": "1", "description": str(about.get("description") or "")},
        "paths": dict(found for found in paths if found is not None),
        "components": {
            "schemas": shown,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


def _path(path: str, methods: Obj, components: Mapping[str, Any], name: str) -> tuple[str, Obj] | None:
    """One path as the gateway has it; None for one that clients do not reach."""
    if path == "/v2/models/{name}/infer":
        path = f"/v2/models/{quote(name, safe='')}/infer"
    found = place(path)
    if found is None or "post" not in methods:
        return None
    operation, in_path = found
    post: Obj = {key: value for key, value in methods["post"].items() if key != "parameters"}
    fault = {"application/json": {"schema": _FAULTS["kserve" if in_path else "openai"]}}
    answers = {status: answer for status, answer in post["responses"].items() if status.startswith("2")}
    post["responses"] = {
        **answers,
        "422": {"description": "It does not fit the types.", "content": fault},
        "default": {"description": "It failed.", "content": fault},
    }
    if in_path:
        inputs = {
            "type": "object",
            "required": ["inputs"],
            "properties": {"inputs": {"type": "array", "items": _TENSOR}},
        }
        post["requestBody"] = {"required": True, "content": {"application/json": {"schema": inputs}}}
        return path, {"post": post}
    streams = operation.name == "predict" and any("text/event-stream" in a.get("content", {}) for a in answers.values())
    content: Obj = post["requestBody"]["content"]
    told = {kind: {**one, "schema": _named(one["schema"], components, name, streams)} for kind, one in content.items()}
    post["requestBody"] = {**post["requestBody"], "content": told}
    return path, {"post": post}


def _named(schema: Obj, components: Mapping[str, Any], name: str, streams: bool) -> Obj:
    """A request's schema with the members that are the gateway's."""
    reference = str(schema.get("$ref", ""))
    found: Any = components.get(reference.removeprefix(_SCHEMAS)) if reference else schema
    if not isinstance(found, dict):
        return schema
    shown = cast("Obj", found)
    ours: Obj = {"model": {"type": "string", "const": name}}
    if streams:
        ours["stream"] = {"type": "boolean", "default": True}
    members: Obj = shown.get("properties") or {}
    required: list[str] = shown.get("required") or []
    return {
        **shown,
        "properties": {**ours, **{key: value for key, value in members.items() if key not in ours}},
        "required": ["model", *(key for key in required if key != "model")],
    }
