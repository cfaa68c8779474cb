"""The control API as a table of operations, and the OpenAPI document made from it; answers no request."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pierhead import __version__

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Parameter:
    """One query parameter: ``kind`` is a JSON Schema type."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Operation:
    """One method of one path. ``answer`` is the type of the JSON body, or of each line when ``stream``."""

    method: str
    path: str
    handler: Handler
    summary: str
    answer: Any = None
    body: Any = None
    description: str = ""
    stream: bool = False
    text: bool = False
    status: int = 200
    query: tuple[Parameter, ...] = ()


class ErrorBody(msgspec.Struct, frozen=True):
    """What is wrong; ``hint`` says what to do next."""

    code: str
    message: str
    hint: str | None
    data: dict[str, Any]
    http_status: int
    exit_code: int


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The answer to every request that failed."""

    error: ErrorBody


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of ``operations``."""
    types = [t for o in operations for t in (o.answer, o.body) if t is not None]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorAnswer], ref_template="#/components/schemas/{name}"
    )
    by_id = dict(zip(map(id, types), schemas, strict=False))
    paths: dict[str, Any] = {}
    for operation in operations:
        path = operation.path.replace(":path}", "}")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, by_id, schemas[-1])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pierhead control API",
            "version": __version__,
            "description": "Models, replicas and keys of one host. On the unix socket no key is needed; through the "
            "gateway's TCP address a key with the admin scope is. Chat itself goes to the gateway's OpenAI paths.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key (TCP only)."}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation, schemas: dict[int, Any], error: Any) -> dict[str, Any]:
    kind = "text/plain" if operation.text else "application/x-ndjson" if operation.stream else "application/json"
    schema = {"type": "string"} if operation.text else schemas.get(id(operation.answer), {})
    made: dict[str, Any] = {
        "operationId": _name(operation),
        "summary": operation.summary,
        "description": operation.description or operation.summary,
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"\{(\w+)(?::path)?\}", operation.path)
            ),
            *(
                {"name": q.name, "in": "query", "required": False, "description": q.text, "schema": {"type": q.kind}}
                for q in operation.query
            ),
        ],
        "responses": {
            str(operation.status): {"description": operation.summary, "content": {kind: {"schema": schema}}},
            "default": {"description": "It failed.", "content": {"application/json": {"schema": error}}},
        },
    }
    if operation.body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[id(operation.body)]}},
        }
    return made


def _name(operation: Operation) -> str:
    words = re.sub(r"[{}:]|/api/v1/|path", " ", operation.path).replace("/", " ").split()
    return "_".join([operation.method.lower(), *words])
