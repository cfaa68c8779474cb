"""The error envelope of the OpenAI API, which also says whether gateway, engine or provider failed; sends nothing."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, Literal, cast

import msgspec

from pierhead.gateway.operations import Dialect

Source = Literal["gateway", "engine", "provider"]
OVERLOADED = 529  # Anthropic's status where others say 503
REASONS = {int(s): s.phrase.encode() for s in HTTPStatus} | {OVERLOADED: b"Overloaded"}
_ANTHROPIC = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


# What is wrong with a request, as Pydantic tells it and servers hand it on.
_WRONG = re.compile(r"""'loc': \('body',? ?([^)]{0,300})\), 'msg': (['"])(.{1,500}?)\2""")


class Fault(Exception):
    """An answer that is an error: HTTP ``status``, OpenAI ``type`` and ``code``, and a hint of what to do."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str = "",
        source: Source = "gateway",
        hint: str | None = None,
        param: str | None = None,
        data: dict[str, Any] | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type or _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
        self.source: Source = source
        self.hint = hint
        self.param = param
        self.data = data or {}
        self.headers = headers

    @property
    def cannot(self) -> bool:
        """Whether the model's engine has no such operation."""
        return self.status == 404 and self.code == "not_supported"

    def status_in(self, dialect: Dialect) -> int:
        """The status that a dialect's clients expect."""
        if self.cannot and dialect in ("ollama", "kserve"):  # their 404 says that there is no such model
            return 400
        return OVERLOADED if dialect == "anthropic" and self.status == 503 else self.status

    def body(self, dialect: Dialect = "openai", request_id: bytes = b"") -> bytes:
        """A dialect's JSON envelope; OpenAI's is ``{"error": {"message", "type", "param", "code", "source", …}}``."""
        text = self.message
        if self.hint:
            text += f" {self.hint}" if text.endswith((".", "!", "?", ":")) else f". {self.hint}"
        if dialect == "anthropic":
            error = {"type": _ANTHROPIC.get(self.status) or _family(self.status), "message": text}
            return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id.decode("latin-1")})
        if dialect == "ollama" and self.code == "model_not_found":  # in the words that Ollama's clients look for
            text = f"model '{self.data.get('model', '')}' not found. {self.hint}"
        if dialect in ("ollama", "kserve"):
            return msgspec.json.encode({"error": text})
        full: dict[str, Any] = {k: v for k, v in self.data.items() if k != "model"}
        full |= {"message": text, "type": self.type, "param": self.param, "code": self.code, "source": self.source}
        if self.hint:
            full["hint"] = self.hint
        return msgspec.json.encode({"error": full}, order="deterministic")

    def event(self, dialect: Dialect = "openai", request_id: bytes = b"") -> bytes:
        """The same as the last piece of a stream that began well."""
        if dialect == "ollama":
            return self.body(dialect) + b"\n"
        name = b"event: error\n" if dialect == "anthropic" else b""
        return name + b"data: " + self.body(dialect, request_id) + b"\n\n"


def _family(status: int) -> str:
    return "invalid_request_error" if status < 500 else "api_error"


def from_pier_error(raw: dict[str, Any]) -> Fault:
    """The fault for a ``PierError.to_dict()`` that the daemon sent."""
    status = raw.get("http_status")
    hint = raw.get("hint")
    code = str(raw.get("code") or "internal")
    data: Any = raw.get("data")
    return Fault(
        status if isinstance(status, int) and 400 <= status < 600 else 500,
        code,
        str(raw.get("message") or "the daemon could not start the model"),
        source="engine" if code in ("engine_failed", "out_of_memory") else "gateway",
        hint=hint if isinstance(hint, str) else None,
        data=cast("dict[str, Any]", data) if isinstance(data, dict) else None,
    )


def from_engine(status: int, raw: bytes) -> Fault:
    """An engine's own error body in the one envelope; numbers it gave beside the message are kept."""
    try:
        parsed: Any = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        parsed = None
    error: Any = cast("dict[str, Any]", parsed).get("error", parsed) if isinstance(parsed, dict) else parsed
    if not isinstance(error, dict):
        text = error if isinstance(error, str) else raw[:2000].decode("utf-8", "replace").strip()
        return Fault(status, "engine_error", text or f"the engine answered {status}", source="engine")
    return _normalized(status, cast("dict[str, Any]", error))


def _normalized(status: int, error: dict[str, Any]) -> Fault:
    kind = str(error.get("type") or "")
    code: Any = error.get("code")
    numbers = {k: v for k, v in error.items() if k.startswith("n_") and isinstance(v, int | float)}
    if kind == "exceed_context_size_error":
        kind, code = "invalid_request_error", "context_length_exceeded"
    elif kind == "not_supported_error":
        kind, code = "invalid_request_error", "not_supported"
    elif not kind.islower():  # a name of the engine's own, as BadRequestError
        kind = ""
    message = str(error.get("message") or f"the engine answered {status}")
    if (wrong := _WRONG.search(message)) is not None:
        place = ".".join(wrong[1].replace("'", "").split(", "))
        message = f"{place}: {wrong[3]}" if place else wrong[3]
    if status == 500 and "input is not supported" in message:  # llama.cpp says so of images and sound
        message = message.partition(" - hint")[0]
        status, kind, code = 400, "invalid_request_error", "not_supported"
    if not isinstance(code, str):
        code = "invalid_request" if status < 500 else "engine_error"
    param = error.get("param")
    return Fault(
        status,
        code,
        message,
        type=kind,
        source="engine",
        param=param if isinstance(param, str) else None,
        data=numbers,
    )


def engine_failed(reason: str, model: str = "") -> Fault:
    """The engine broke off, or does not answer; the log of a ``model`` here may say why."""
    hint = f"`pier logs {model}` may show why." if model else None
    return Fault(502, "engine_failed", f"{reason}.", source="engine", hint=hint)


def bad_request(message: str, *, code: str = "bad_request", status: int = 400, param: str | None = None) -> Fault:
    """The client's request cannot be served as it is."""
    return Fault(status, code, message, param=param)
