"""What clients can ask for, by path: the operation, its dialect and where an engine answers it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Dialect = Literal["openai", "anthropic", "ollama", "kserve"]


class Operation(NamedTuple):
    """One thing to ask for. An engine ``serves`` it by ``name``, or a translation leads to one that it serves.

    ``path`` is where an engine that serves it answers. ``generates`` tells what takes a slot and makes tokens.
    ``where`` says where the model's name is: in the JSON ``body``, in the ``path`` or in a multipart ``form``.
    """

    name: str
    dialect: Dialect
    path: str
    generates: bool = True
    where: Literal["body", "path", "form"] = "body"


_ALL = (
    Operation("chat", "openai", "/v1/chat/completions"),
    Operation("completions", "openai", "/v1/completions"),
    Operation("responses", "openai", "/v1/responses"),
    Operation("input-tokens", "openai", "/v1/responses/input_tokens", False),
    Operation("embeddings", "openai", "/v1/embeddings", False),
    Operation("rerank", "openai", "/v1/rerank", False),
    Operation("score", "openai", "/v1/score", False),
    Operation("classify", "openai", "/v1/classify", False),
    Operation("predict", "openai", "/v1/predict"),
    Operation("tokenize", "openai", "/tokenize", False),
    Operation("detokenize", "openai", "/detokenize", False),
    Operation("speech", "openai", "/v1/audio/speech"),
    Operation("transcriptions", "openai", "/v1/audio/transcriptions", where="form"),
    Operation("translations", "openai", "/v1/audio/translations", where="form"),
    Operation("images", "openai", "/v1/images/generations"),
    Operation("image-edits", "openai", "/v1/images/edits", where="form"),
    Operation("image-variations", "openai", "/v1/images/variations", where="form"),
    Operation("messages", "anthropic", "/v1/messages"),
    Operation("count-tokens", "anthropic", "/v1/messages/count_tokens", False),
    Operation("ollama-chat", "ollama", "/api/chat"),
    Operation("ollama-generate", "ollama", "/api/generate"),
    Operation("ollama-embed", "ollama", "/api/embed", False),
    Operation("ollama-embeddings", "ollama", "/api/embeddings", False),
    Operation("infer", "kserve", "/v2/models/{model}/infer", where="path"),
    Operation("generate", "kserve", "/v2/models/{model}/generate", where="path"),
    Operation("generate-stream", "kserve", "/v2/models/{model}/generate_stream", where="path"),
    # What only engines offer; translations ask for these, no client reaches them.
    Operation("llamacpp-tokenize", "openai", "/tokenize", False),
    Operation("llamacpp-detokenize", "openai", "/detokenize", False),
    Operation("llamacpp-template", "openai", "/apply-template", False),
    Operation("llamacpp-props", "openai", "/props", False),
    Operation("llamacpp-infill", "openai", "/infill"),
    Operation("llamacpp-rerank", "openai", "/v1/rerank", False),
    Operation("triton-repository", "kserve", "/v2/repository/index", False),
    Operation("python-openapi", "openai", "/openapi.json", False),
    Operation("vllm-classify", "openai", "/classify", False),
)
OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _ALL}

OWN = ("llamacpp-", "python-", "triton-", "vllm-")  # how the names begin of what clients cannot ask for

# Paths that clients use, also other spellings of the field (Cohere, Jina, vLLM).


def known(serves: Iterable[str]) -> list[str]:
    """What an engine serves in the words of clients, sorted; llama.cpp ranks in its own way, which is translated."""
    words = {"rerank" if name == "llamacpp-rerank" else name for name in serves}
    return sorted(word for word in words if not word.startswith(OWN))


PATHS: dict[str, Operation] = {o.path: o for o in _ALL if o.where != "path" and not o.name.startswith(OWN)} | {
    "/rerank": OPERATIONS["rerank"],
    "/v2/rerank": OPERATIONS["rerank"],
    "/score": OPERATIONS["score"],
    "/classify": OPERATIONS["classify"],
    "/predict": OPERATIONS["predict"],
    "/v1/tokenize": OPERATIONS["tokenize"],
    "/v1/detokenize": OPERATIONS["detokenize"],
}
MEMBER = "/models/"  # in a path, what parts a route's name from that of one of the models which its engine has
_INFER = {
    "infer": OPERATIONS["infer"],
    "generate": OPERATIONS["generate"],
    "generate_stream": OPERATIONS["generate-stream"],
}


def place(path: str) -> tuple[Operation, str] | None:
    """The operation at a path and, where the path names it, the model; None when there is none."""
    found = PATHS.get(path)
    if found is not None:
        return found, ""
    if path.startswith("/v2/models/"):
        model, _, verb = path.removeprefix("/v2/models/").rpartition("/")
        operation = _INFER.get(verb)
        if operation is not None and model:
            name, versions, _ = model.partition("/versions/")
            return operation, name if versions else model
    return None


def dialect_of(path: str) -> Dialect:
    """The dialect that an error on ``path`` is told in."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith("/api/") and not path.startswith("/api/v1/"):
        return "ollama"
    return "kserve" if path == "/v2" or (path.startswith("/v2/") and path != "/v2/rerank") else "openai"
