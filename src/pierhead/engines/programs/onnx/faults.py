"""What this server refuses: a request with a status of HTTP, or a model with a reason to read."""

from __future__ import annotations


class Unusable(Exception):
    """The model or its settings cannot be served; the text is the one line that a person reads."""


class Refused(Exception):
    """A request that is not answered; ``status`` is of HTTP, ``code`` a word for programs."""

    def __init__(self, status: int, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def bad(message: str, code: str = "invalid_request") -> Refused:
    """The client's mistake."""
    return Refused(400, message, code)


def full(message: str) -> Refused:
    """Too much at a time; the client may come back."""
    return Refused(429, message, "queue_full")
