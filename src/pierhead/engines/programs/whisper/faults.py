"""What this server refuses: a request with a status of HTTP, or a model with a reason to read."""

from __future__ import annotations


class Unusable(Exception):
    """The model or its settings cannot be served; the text is the one line that a person reads."""


class Failed(Exception):
    """The engine could not do its work; the text is the engine's own reason."""


class Refused(Exception):
    """A request that is not answered; ``status`` is of HTTP, ``code`` a word for programs, ``param`` the field."""

    def __init__(self, status: int, message: str, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


def bad(message: str, param: str | None = None, code: str = "invalid_request") -> Refused:
    """The client's mistake."""
    return Refused(400, message, code, param)
