"""The only exception tree of Pierhead; adapters map foreign exceptions to it once, at their edge."""

from __future__ import annotations

from typing import Any, ClassVar


class PierError(Exception):
    """A failure a person can act on: what failed, why (``detail``) and what to type next (``hint``).

    ``code`` is a stable machine word, ``http_status`` what an API answers and ``exit_code`` what ``pier`` exits with.
    ``data`` carries JSON-safe facts (numbers, choices) for ``--json`` and the API envelope.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, data: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data: dict[str, Any] = data or {}

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form: ``{"code", "message", "hint", "data", "http_status", "exit_code"}``."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "data": self.data,
            "http_status": self.http_status,
            "exit_code": self.exit_code,
        }


class UsageError(PierError):
    """The request itself is wrong: a bad reference, option, setting or value."""

    code = "usage"
    http_status = 400
    exit_code = 2


class BadReference(UsageError):
    """A reference that cannot be parsed."""

    code = "bad_reference"


class ConfigError(UsageError):
    """A settings file or variable that cannot be read, parsed or understood."""

    code = "config"


class NotFound(PierError):
    """A model, replica, key or file that is not there."""

    code = "not_found"
    http_status = 404
    exit_code = 3


class Conflict(PierError):
    """The thing exists already, is in use, or changed meanwhile."""

    code = "conflict"
    http_status = 409
    exit_code = 4


class CorruptData(PierError):
    """Bytes that do not match their digest, their header or their format."""

    code = "corrupt"
    http_status = 422
    exit_code = 5


class SourceUnavailable(PierError):
    """A source could not be reached or refused to serve."""

    code = "source_unavailable"
    http_status = 502
    exit_code = 6


class AccessDenied(PierError):
    """Permission is missing: a key, a token, a file mode, the Docker socket."""

    code = "access_denied"
    http_status = 403
    exit_code = 7


class OutOfSpace(PierError):
    """The disk is full or a quota is reached."""

    code = "out_of_space"
    http_status = 507
    exit_code = 8


class OutOfMemory(PierError):
    """The model does not fit in the memory that is free."""

    code = "out_of_memory"
    http_status = 507
    exit_code = 9


class RuntimeUnavailable(PierError):
    """A runtime (Docker, sandbox) that cannot be used on this machine."""

    code = "runtime_unavailable"
    http_status = 503
    exit_code = 10


class EngineFailed(PierError):
    """An engine that did not start, crashed or answered nonsense; ``data["log"]`` holds its last lines."""

    code = "engine_failed"
    http_status = 502
    exit_code = 11


class DaemonUnavailable(PierError):
    """No daemon answers, or one of another version that cannot be used."""

    code = "daemon_unavailable"
    http_status = 503
    exit_code = 12


class AddressInUse(Conflict):
    """A TCP port or socket path that another program holds."""

    code = "address_in_use"


class Timeout(PierError):
    """A deadline passed."""

    code = "timeout"
    http_status = 504
    exit_code = 13


class UnsafeContent(PierError):
    """A model whose files would run code of their author when they are loaded; ``data["findings"]`` names them."""

    code = "unsafe_content"
    http_status = 422
    exit_code = 14


class Untrusted(PierError):
    """A model whose signatures are missing, do not hold, or are not those that the policy asks for."""

    code = "untrusted"
    http_status = 403
    exit_code = 15


_BY_CODE: dict[str, type[PierError]] = {}


def _index(cls: type[PierError]) -> None:
    _BY_CODE[cls.code] = cls
    for sub in cls.__subclasses__():
        _index(sub)


_index(PierError)


def from_dict(raw: dict[str, Any]) -> PierError:
    """Rebuild the error that ``to_dict`` described; an unknown code becomes a plain ``PierError``."""
    cls = _BY_CODE.get(str(raw.get("code")), PierError)
    hint = raw.get("hint")
    data = raw.get("data")
    return cls(
        str(raw.get("message", "unknown error")),
        hint=hint if isinstance(hint, str) else None,
        data=data if isinstance(data, dict) else None,  # pyright: ignore[reportUnknownArgumentType]
    )
