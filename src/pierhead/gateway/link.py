"""The link between daemon and gateway: typed messages, one JSON object a line, on the gateway's admin socket.

The gateway listens, so that a daemon that dies and comes back finds it. The daemon sends whole snapshots; the gateway
sends what it needs and what it saw.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

OPENAI = ("chat", "completions", "embeddings", "rerank")


class Credential(msgspec.Struct, frozen=True):
    """A header that lets the gateway in at a provider; what it says is never shown."""

    header: str
    value: str

    def __repr__(self) -> str:
        return f"Credential({self.header!r})"


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's API, reached over TCP: where it is and what each request to it carries.

    ``path`` comes before an operation's own path without its ``/v1``. ``ca_file`` is trusted beside the system's
    authorities; ``timeout`` are seconds to the first byte of an answer (0: the gateway's own limits).
    """

    provider: str
    host: str
    port: int
    tls: bool = True
    path: str = "/v1"
    dialect: Literal["openai", "anthropic"] = "openai"
    credential: Credential | None = None
    headers: tuple[tuple[str, str], ...] = ()
    ca_file: str = ""
    timeout: float = 0.0


class Endpoint(msgspec.Struct, frozen=True):
    """One replica that answers: its id and its socket, a host path (or ``tcp://host:port``).

    ``call_prefix`` is what an answer must begin with for a tool call to be sure; "" where the engine sees to that.
    ``serves`` are the operations (see ``gateway.operations``) that it answers natively, ``slots`` how many requests it
    works on at a time (0: not known, so no bound), ``context`` its tokens per request (0: not known). ``model`` is the
    name that it wants to be asked for, where it minds. ``remote`` tells of a provider; then ``socket`` is its address.
    ``revision`` are the first digits of its model's digest ("" for a provider). ``front`` are members, as JSON with a
    comma behind each, that it wants in every request's body: which of its LoRAs count.
    """

    replica: str
    socket: str
    call_prefix: str = ""
    serves: tuple[str, ...] = OPENAI
    slots: int = 0
    context: int = 0
    model: str = ""
    remote: Remote | None = None
    revision: str = ""
    front: str = ""


class Share(msgspec.Struct, frozen=True):
    """A route's destination: the name of a route without a plan, and its weight."""

    model: str
    weight: float = 1.0


class Match(msgspec.Struct, frozen=True):
    """The key's id, or a ``header`` (lower case), is ``value``, or begins with it."""

    value: str
    header: str = ""
    prefix: bool = False


class Rule(msgspec.Struct, frozen=True):
    """Requests that fulfil all of ``when`` are split among ``to``."""

    when: tuple[Match, ...]
    to: tuple[Share, ...]


Trouble = Literal["error", "overload", "timeout", "context"]


class Fallback(msgspec.Struct, frozen=True):
    """Who is asked next, after which kinds of trouble."""

    model: str
    on: tuple[Trouble, ...] = ("error", "overload", "timeout")


class Mirror(msgspec.Struct, frozen=True):
    """A ``share`` (0 to 1) of the requests is also sent to ``model``, within these bounds (0 tokens: no bound)."""

    model: str
    share: float
    tokens_per_day: int = 0
    requests_per_minute: int = 60
    concurrent: int = 4


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Which other routes answer for a route. ``timeout`` are seconds to an attempt's first byte (0: no bound).

    ``sticky`` is ``user``, ``conversation``, ``key``, the name of a header as ``header:NAME``, or "".
    """

    to: tuple[Share, ...]
    rules: tuple[Rule, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    sticky: str = ""
    timeout: float = 0.0
    mirror: Mirror | None = None


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A model name clients may send. Without endpoints its first request asks the daemon to start one.

    ``card`` is the ready-made entry for ``/v1/models`` (``id``, ``object``, ``created``, ``owned_by`` …) and ``docker``
    the one for Docker Model Runner's ``/models``. ``aliases`` are other accepted spellings of ``name``. A route with a
    ``plan`` has no endpoints: others answer for it. A ``hidden`` one answers for others only.
    """

    name: str
    aliases: tuple[str, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    card: dict[str, Any] = {}
    docker: dict[str, Any] = {}
    plan: Plan | None = None
    hidden: bool = False


class Budget(msgspec.Struct, frozen=True):
    """At most ``amount`` of ``unit`` (money in millionths of a US dollar) in each calendar day or month, in UTC."""

    amount: int
    unit: Literal["tokens", "usd", "requests"] = "tokens"
    window: Literal["day", "month"] = "day"


class Grants(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a key may do. Empty scopes allow every model and dialect, 0 is no limit.

    ``expires`` is Unix time (0: never). ``models`` are patterns as of a shell. ``rpm`` and ``tpm`` are requests
    and tokens per minute.
    """

    models: tuple[str, ...] = ()
    dialects: tuple[str, ...] = ()
    admin: bool = False
    expires: float = 0.0
    rpm: int = 0
    tpm: int = 0
    concurrent: int = 0
    priority: int = 0
    budgets: tuple[Budget, ...] = ()
    cache: bool = False


class Key(msgspec.Struct, frozen=True):
    """An accepted API key: its public id and the hex HMAC-SHA256 of its text under ``Snapshot.pepper``.

    ``old_mac`` is that of the text before it was rotated, which holds until ``old_until`` (Unix time).
    """

    id: str
    mac: str
    name: str = ""
    old_mac: str = ""
    old_until: float = 0.0
    grants: Grants = Grants()


class Price(msgspec.Struct, frozen=True):
    """What the models of a pattern cost, in millionths of a US dollar per million tokens."""

    pattern: str
    input: int
    output: int
    cached: int = -1  # as input


# --- daemon → gateway ---------------------------------------------------------------------------------------------


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", kw_only=True):
    """All that the gateway must know; replaces the one before. ``pepper`` is hex."""

    version: int
    routes: tuple[Route, ...] = ()
    keys: tuple[Key, ...] = ()
    pepper: str = ""
    prices: tuple[Price, ...] = ()  # the first whose pattern fits counts
    control_socket: str = ""  # upstream for /api/… (key needed over TCP)


class StartResult(msgspec.Struct, frozen=True, tag="start_result", kw_only=True):
    """The answer to EnsureReady ``id``: an endpoint, or ``error`` as ``PierError.to_dict()``."""

    id: int
    endpoint: Endpoint | None = None
    error: dict[str, Any] | None = None


class StartProgress(msgspec.Struct, frozen=True, tag="start_progress", kw_only=True):
    """How the start that EnsureReady ``id`` waits for gets on: the replica's ``state`` since ``elapsed_s`` seconds."""

    id: int
    state: str
    detail: str = ""
    elapsed_s: float = 0.0


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Accept nothing new, finish what runs, exit at the latest after ``grace`` seconds."""

    grace: float = 600.0


class HandOver(msgspec.Struct, frozen=True, tag="hand_over"):
    """Send the listening sockets (SCM_RIGHTS beside one Sockets line)."""


# --- gateway → daemon ---------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello", kw_only=True):
    """First line on every connection."""

    version: str
    pid: int
    listeners: tuple[str, ...]


class EnsureReady(msgspec.Struct, frozen=True, tag="ensure_ready", kw_only=True):
    """A request waits for this model (or saw ``failed`` replica break); answer with StartResult."""

    id: int
    model: str
    failed: str = ""


class KeepLoaded(msgspec.Struct, frozen=True, tag="keep_loaded", kw_only=True):
    """A client wants ``model`` to stay loaded for so many ``seconds`` after its last request (negative: for ever)."""

    model: str
    seconds: float


class Activity(msgspec.Struct, frozen=True):
    """What one replica did since the last report; ``open`` requests run now, ``last_used`` is Unix time."""

    replica: str
    open: int
    finished: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    last_used: float = 0.0


class Report(msgspec.Struct, frozen=True, tag="report", kw_only=True):
    """Sent about once a second while something changed, and soon after a replica went from busy to idle.

    Also sent after each snapshot, whose version is ``snapshot``, with every replica that has requests open: so the
    daemon knows that a route it withdrew gets no new request, and what is still open there.
    """

    connections: int
    snapshot: int = -1
    problems: tuple[str, ...] = ()  # what a person should see to
    activity: tuple[Activity, ...] = ()


class Sockets(msgspec.Struct, frozen=True, tag="sockets", kw_only=True):
    """The addresses, in the order of the file descriptors that travel with this line."""

    addresses: tuple[str, ...]


ToGateway = Snapshot | StartResult | StartProgress | Drain | HandOver
ToDaemon = Hello | EnsureReady | KeepLoaded | Report | Sockets
