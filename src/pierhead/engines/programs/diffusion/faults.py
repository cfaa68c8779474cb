"""What this server refuses: a request with a status of HTTP, or a model with a reason to read."""

from __future__ import annotations

from typing import Any


class Unusable(Exception):
    """The model or its settings cannot be served; the text is the one line that a person reads."""


class Gone(Exception):
    """Nobody waits for this picture any more."""


class Refused(Exception):
    """A request that is not answered, in the words of OpenAI's errors; ``param`` names the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
