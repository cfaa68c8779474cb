"""Which requests of Ollama's API the daemon answers, and what they need: reading is free, changing is not; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from pierhead.gateway.faults import Fault

if TYPE_CHECKING:
    from pierhead.gateway.holder import Holder

SCOPE = b"x-pierhead-models"  # patterns, as of a shell; of several such headers all hold

_READS = frozenset(
    {("GET", "/api/tags"), ("GET", "/api/ps"), ("GET", "/api/version"), ("POST", "/api/show")}
    | {("HEAD", "/api/tags"), ("HEAD", "/api/version")}
)
_CHANGES = frozenset(
    {("POST", f"/api/{verb}") for verb in ("pull", "push", "create", "copy")} | {("DELETE", "/api/delete")}
)
_PATHS = {path for _, path in _READS | _CHANGES}
_BLOBS = "/api/blobs/"


def kind(method: str, path: str) -> Literal["", "read", "change"]:
    """What a request does; "" for all that is not Ollama's management. Fault 405 for a method that a path lacks."""
    if (method, path) in _READS:
        return "read"
    if (method, path) in _CHANGES or (path.startswith(_BLOBS) and method in ("HEAD", "POST")):
        return "change"
    known = allowed(path)
    if known:
        text = f"{path[:200]} answers {', '.join(known)} only."
        raise Fault(405, "method_not_allowed", text, headers=((b"allow", ", ".join(known).encode()),))
    return ""


def allowed(path: str) -> tuple[str, ...]:
    """The methods of one of these paths; none for other paths."""
    if path.startswith(_BLOBS):
        return ("HEAD", "POST")
    return tuple(sorted(method for method, known in _READS | _CHANGES if known == path)) if path in _PATHS else ()


def scope(holder: Holder, what: str) -> bytes:
    """The header line that tells the daemon which models the key may see; Fault 403 when it may not do this."""
    if what != "read":
        holder.require_admin()
        return b""
    grants = holder.grants
    if grants.dialects and "ollama" not in grants.dialects:
        raise Fault(403, "dialect_not_allowed", "the API key may not use Ollama's API.")
    patterns = ",".join(quote(pattern) for pattern in grants.models)
    return b"%b: %b\r\n" % (SCOPE, patterns.encode()) if patterns else b""


def pours(method: str, path: str) -> bool:
    """Whether the body goes to the daemon as it comes, whatever its length: a blob."""
    return method == "POST" and path.startswith(_BLOBS)
