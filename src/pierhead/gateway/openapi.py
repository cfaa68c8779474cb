"""The OpenAPI 3.1 document of what clients can ask the gateway for, made of the table of operations; answers nothing.

Schemas tell the members that the gateway or its translations rely on. Others are allowed: an engine that speaks a
dialect itself may know more.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from pierhead import __version__
from pierhead.gateway.operations import OPERATIONS, PATHS, Operation

Obj = dict[str, Any]


class ChatMessage(msgspec.Struct):
    """One message; ``content`` is text or parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Obj] | None = None


class ChatRequest(msgspec.Struct):
    """OpenAI's chat completions."""

    model: str
    messages: list[ChatMessage]
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    stop: str | list[str] | None = None
    tools: list[Obj] | None = None


class CompletionRequest(msgspec.Struct):
    """OpenAI's completions."""

    model: str
    prompt: str | list[str]
    stream: bool | None = None
    max_tokens: int | None = None


class ResponsesRequest(msgspec.Struct):
    """OpenAI's responses."""

    model: str
    input: str | list[Obj]
    instructions: str | None = None
    stream: bool | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None


class EmbeddingsRequest(msgspec.Struct):
    """OpenAI's embeddings."""

    model: str
    input: str | list[str]


class RerankRequest(msgspec.Struct):
    """The rerank call of Cohere and Jina."""

    model: str
    query: str
    documents: list[str]


class MessagesMessage(msgspec.Struct):
    """One of Anthropic's messages."""

    role: Literal["user", "assistant"]
    content: str | list[Obj]


class MessagesRequest(msgspec.Struct):
    """Anthropic's messages."""

    model: str
    messages: list[MessagesMessage]
    max_tokens: int
    system: str | list[Obj] | None = None
    stream: bool | None = None


class CountRequest(msgspec.Struct):
    """Anthropic's token count."""

    model: str
    messages: list[MessagesMessage]


class OllamaMessage(msgspec.Struct):
    """One of Ollama's messages."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""


class OllamaChatRequest(msgspec.Struct):
    """Ollama's chat; it streams unless told not to."""

    model: str
    messages: list[OllamaMessage]
    stream: bool | None = None
    options: Obj | None = None


class OllamaGenerateRequest(msgspec.Struct):
    """Ollama's generate; it streams unless told not to."""

    model: str
    prompt: str = ""
    stream: bool | None = None
    options: Obj | None = None


class OllamaEmbedRequest(msgspec.Struct):
    """Ollama's embed."""

    model: str
    input: str | list[str]


class OllamaEmbeddingsRequest(msgspec.Struct):
    """Ollama's older embeddings."""

    model: str
    prompt: str


class AnyRequest(msgspec.Struct):
    """What an engine that serves this takes."""

    model: str


class OpenAIError(msgspec.Struct):
    """OpenAI's envelope; ``source`` tells who failed: gateway, engine or provider."""

    message: str
    type: str
    code: str
    source: Literal["gateway", "engine", "provider"]
    param: str | None = None


class OpenAIFault(msgspec.Struct):
    """An error as OpenAI's clients expect it."""

    error: OpenAIError


class AnthropicFault(msgspec.Struct):
    """An error as Anthropic's clients expect it."""

    type: Literal["error"]
    error: dict[str, str]


class PlainFault(msgspec.Struct):
    """An error as the clients of Ollama and KServe expect it."""

    error: str


class ModelList(msgspec.Struct):
    """OpenAI's or Anthropic's list of models."""

    data: list[Obj]


class Health(msgspec.Struct):
    """How the gateway is."""

    status: str


class Shape(NamedTuple):
    """The request's type, members that a whole answer has, and the media type of a stream."""

    body: Any
    answer: tuple[str, ...] = ()
    stream: str = ""


_SSE, _NDJSON = "text/event-stream", "application/x-ndjson"
_SHAPES: dict[str, Shape] = {
    "chat": Shape(ChatRequest, ("id", "object", "choices"), _SSE),
    "completions": Shape(CompletionRequest, ("id", "object", "choices"), _SSE),
    "responses": Shape(ResponsesRequest, ("id", "object", "output"), _SSE),
    "embeddings": Shape(EmbeddingsRequest, ("data",)),
    "rerank": Shape(RerankRequest, ("results",)),
    "messages": Shape(MessagesRequest, ("id", "type", "role", "content", "usage"), _SSE),
    "count-tokens": Shape(CountRequest, ("input_tokens",)),
    "ollama-chat": Shape(OllamaChatRequest, ("model", "message", "done"), _NDJSON),
    "ollama-generate": Shape(OllamaGenerateRequest, ("model", "response", "done"), _NDJSON),
    "ollama-embed": Shape(OllamaEmbedRequest, ("embeddings",)),
    "ollama-embeddings": Shape(OllamaEmbeddingsRequest, ("embedding",)),
}
_FAULTS = {"openai": OpenAIFault, "anthropic": AnthropicFault, "ollama": PlainFault, "kserve": PlainFault}
_LOCAL: dict[str, tuple[str, Any]] = {
    "/v1/models": ("The models that the key may use.", ModelList),
    "/health": ("Whether the gateway answers.", Health),
    "/ready": ("Whether it knows its models.", Health),
}


def document() -> Obj:
    """The whole document."""
    types = [*{s.body for s in _SHAPES.values()}, *set(_FAULTS.values()), AnyRequest, *(t for _, t in _LOCAL.values())]
    types = list(dict.fromkeys(sorted(types, key=lambda t: t.__name__)))
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    paths: dict[str, Obj] = {path: {"post": _operation(path, operation)} for path, operation in PATHS.items()}
    paths |= {o.path: {"post": _operation(o.path, o)} for o in OPERATIONS.values() if o.where == "path"}
    paths |= {path: {"get": _local(path, text, type_)} for path, (text, type_) in _LOCAL.items()}
    paths["/metrics"] = {"get": _local("/metrics", "What is counted, for Prometheus.", None)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pierhead",
            "version": __version__,
            "description": "What clients ask models for. The control API below /api/v1 has a document of its own.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _ref(type_: Any) -> Obj:
    return {"$ref": f"#/components/schemas/{type_.__name__}"}


def _operation(path: str, operation: Operation) -> Obj:
    shape = _SHAPES.get(operation.name, Shape(AnyRequest))
    content: Obj = {"application/json": {"schema": {"type": "object", "required": list(shape.answer)}}}
    if shape.stream:
        content[shape.stream] = {"schema": {}}
    elif operation.name not in _SHAPES:
        content["*/*"] = {"schema": {}}
    kind = "multipart/form-data" if operation.where == "form" else "application/json"
    body = _ref(shape.body) if operation.where != "path" else {"type": "object"}
    fault = {"application/json": {"schema": _ref(_FAULTS[operation.dialect])}}
    made: Obj = {
        "operationId": f"post_{path.strip('/').replace('/', '_')}".replace("{", "").replace("}", ""),
        "summary": f"{operation.name} ({operation.dialect})",
        "tags": [operation.dialect],
        "requestBody": {"required": True, "content": {kind: {"schema": body}}},
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "It failed; 404 where the model's engine cannot do it.", "content": fault},
        },
    }
    if operation.where == "path":
        made["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return made


def _local(path: str, text: str, type_: Any) -> Obj:
    kind = "text/plain" if type_ is None else "application/json"
    schema: Obj = {"type": "string"} if type_ is None else _ref(type_)
    answer = {"description": text, "content": {kind: {"schema": schema}}}
    fault = {"application/json": {"schema": _ref(OpenAIFault)}}
    responses: Obj = {"200": answer, "default": {"description": "It failed.", "content": fault}}
    if path == "/ready":
        responses["503"] = {"description": "Not yet.", "content": answer["content"]}
    return {"operationId": f"get_{path.strip('/').replace('/', '_')}", "summary": text, "responses": responses}
