"""What a client is told when something fails: one readable sentence, never a traceback, which goes to the log."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

MAX_MESSAGE = 1000


class Fault(Exception):
    """An answer that is an error: its status, a sentence and a machine word."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message[:MAX_MESSAGE]
        self.param = param

    def body(self) -> dict[str, Any]:
        """The envelope that the gateway takes apart."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


def last_line(exc: BaseException) -> str:
    """The last line of a traceback: ``ValueError: no such label``."""
    lines = [line for line in "".join(traceback.format_exception_only(exc)).splitlines() if line.strip()]
    return (lines[-1].strip() if lines else type(exc).__name__)[:MAX_MESSAGE]


def place(exc: BaseException, folder: str) -> str:
    """Where in the model's own files it happened: ``model.py, line 12``; "" when it was not there."""
    if isinstance(exc, SyntaxError) and exc.filename and exc.filename.startswith(folder):
        return f"{os.path.relpath(exc.filename, folder)}, line {exc.lineno}"
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if f.filename.startswith(folder + os.sep)]
    return f"{os.path.relpath(frames[-1].filename, folder)}, line {frames[-1].lineno}" if frames else ""


def log(exc: BaseException) -> None:
    """The traceback for whoever reads the log, without the server's own frames before the model's."""
    ours = os.path.dirname(os.path.dirname(__file__)) + os.sep
    start = exc.__traceback__
    found = start
    while start is not None:
        if start.tb_frame.f_code.co_filename.startswith(ours):
            found = start.tb_next or found
        start = start.tb_next
    traceback.print_exception(type(exc), exc, found, file=sys.stderr)
    sys.stderr.flush()


def of(exc: Exception) -> Fault:
    """What a model's own exception means for the client; the traceback is logged.

    An exception with a ``status_code`` from 400 to 599 (as those of Starlette and FastAPI) chooses the status itself.
    """
    if isinstance(exc, Fault):
        return exc
    status = getattr(exc, "status_code", None)
    if isinstance(status, int) and 400 <= status < 600:
        detail = getattr(exc, "detail", None)
        return Fault(status, "refused_by_model", detail if isinstance(detail, str) else last_line(exc))
    log(exc)
    return Fault(500, "model_failed", f"the model failed: {last_line(exc)}")


def invalid(errors: Sequence[Any]) -> Fault:
    """What is wrong with a request, in one sentence that names the members."""
    told: list[str] = []
    first = ""
    for error in errors[:5]:
        path = ".".join(str(part) for part in error.get("loc", ()) if part != "body")
        first = first or path
        told.append(f"{path}: {error.get('msg', 'not valid')}" if path else str(error.get("msg", "not valid")))
    more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
    return Fault(422, "invalid_input", "; ".join(told) + more, first or None)
