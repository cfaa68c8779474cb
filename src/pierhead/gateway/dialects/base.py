"""The seam of the dialects: a translation of one request and its answer, without I/O; knows no dialect by itself.

``steps`` is a generator: it yields what must be asked or loaded first, is sent each answer, and returns what to do
last. So a translation that needs the engine's tokenizer or a stored response stays pure, and its test plays the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pierhead.gateway.ask import Ask
from pierhead.gateway.faults import Fault
from pierhead.gateway.operations import Operation
from pierhead.gateway.usage import NOTHING, Usage

JSON = b"application/json"
SSE = b"text/event-stream"
NDJSON = b"application/x-ndjson"


class Call(NamedTuple):
    """Ask the chosen engine first; the generator is sent the body of its 2xx answer, or its Fault is raised there."""

    operation: str
    body: bytes


class Load(NamedTuple):
    """Read what an earlier answer stored (see ``Save``); the generator is sent its bytes, or None."""

    key: str


class Keep(NamedTuple):
    """Have the model stay loaded for so many seconds after its last request from now on (negative: for ever)."""

    seconds: float


class Send(NamedTuple):
    """The request that the engine gets in the end; ``stream`` says that its answer will be server-sent events."""

    operation: str
    body: bytes
    stream: bool = False


class Reply(NamedTuple):
    """The answer is known without asking further; ``spent`` is what calls for it used (``translate`` fills it in).

    ``headers`` are whole lines, for what the media type alone does not tell.
    """

    body: bytes
    status: int = 200
    kind: bytes = JSON
    headers: bytes = b""
    spent: Usage = NOTHING


class Save(NamedTuple):
    """What is to be found again by ``key`` later, by the same API key only.

    ``append``: the body is put behind what is there, if anything is.
    """

    key: str
    body: bytes
    append: bool = False


Steps = Generator[Call | Load | Keep, bytes | None, Send | Reply]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a translation may know beside the body.

    ``id`` is the request's id and ``created`` its Unix time in seconds, both for fields that an answer must have.
    ``nonce`` is a word that no other request has, not even where a client chose the ids.
    ``serves`` are the operations that the chosen engine answers natively, ``context`` its tokens per request (0: not
    known), ``cap`` the most tokens that the answer may have (0: no bound; a smaller wish of the client counts),
    ``call_prefix`` see ``link.Endpoint``, ``card`` the model's entry of ``/v1/models``. ``headers`` has lower
    case names and lacks credentials. ``started`` is when the request came, on the ``clock`` (monotonic seconds).
    """

    operation: Operation
    ask: Ask
    model: str  # as the client spelt it
    id: str
    created: int
    serves: frozenset[str]
    context: int = 0
    cap: int = 0
    call_prefix: str = ""
    nonce: str = ""
    card: dict[str, Any] = field(default_factory=dict[str, Any])
    headers: dict[str, str] = field(default_factory=dict[str, str])
    started: float = 0.0
    clock: Callable[[], float] = time.monotonic


class Translation(Protocol):
    """One request on its way to an engine that speaks otherwise, and the answer on its way back.

    ``kind`` is the media type of a streamed answer. ``saves`` is looked at after the answer was given whole.
    """

    kind: bytes
    saves: tuple[Save, ...]

    def steps(self, body: bytes) -> Steps:
        """What to do with the request; Fault 400 or 501 for what cannot be expressed."""
        ...

    def answer(self, body: bytes, usage: Usage) -> bytes | Reply:
        """The client's whole answer, from the engine's (a 2xx)."""
        ...

    def events(self, data: bytes) -> bytes:
        """The client's part of a stream, from whole server-sent events of the engine; b"" when nothing is due yet."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The last bytes of a stream that ended well."""
        ...


class Early(Protocol):
    """Answers what needs no engine; ``facts`` say nothing of one. None: it needs one."""

    def __call__(self, body: bytes, facts: Facts) -> tuple[Keep, Reply] | None: ...


@runtime_checkable
class Failing(Protocol):
    """A translation that tells a failure in the middle of a stream by an event of its own."""

    def failed(self, fault: Fault) -> bytes: ...


class Make(Protocol):
    """Makes a translation; None when the engine serves nothing that this operation could be expressed in."""

    def __call__(self, facts: Facts) -> Translation | None: ...
