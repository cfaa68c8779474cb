"""Typed progress and lifecycle events: what bars, logs and the control API read; not a message bus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec


class Event(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """Root of all events; on the wire a JSON object with ``type``, one per line (NDJSON)."""


class PullPlanned(Event, frozen=True, tag="pull_planned"):
    """A pull knows what it will fetch: ``total`` bytes (0 when unknown) of ``name`` from ``source``."""

    name: str
    source: str
    total: int


class PullProgress(Event, frozen=True, tag="pull_progress"):
    """``done`` of ``total`` bytes of one file are in the store; ``resumed`` of them were there before.

    ``digest`` is what the file will have, where its source says so.
    """

    name: str
    file: str
    done: int
    total: int
    resumed: int = 0
    digest: str = ""


class PullDone(Event, frozen=True, tag="pull_done"):
    """The model is committed under ``name`` with manifest ``digest``; ``cached`` when nothing was fetched."""

    name: str
    digest: str
    size: int
    cached: bool = False


class PushPlanned(Event, frozen=True, tag="push_planned"):
    """A push knows what it will send: at most ``total`` bytes of ``name`` to ``target``."""

    name: str
    target: str
    total: int


class PushProgress(Event, frozen=True, tag="push_progress"):
    """``done`` of ``total`` bytes of one file are in the registry; ``resumed`` of them were there before."""

    name: str
    file: str
    done: int
    total: int
    resumed: int = 0
    digest: str = ""


class PushDone(Event, frozen=True, tag="push_done"):
    """The registry has the model under ``name`` with manifest ``digest``; ``sent`` bytes of blobs had to go there.

    A hub keeps files instead of the manifest: in ``commit``, to be seen at ``url``.
    """

    name: str
    digest: str
    sent: int
    commit: str = ""
    url: str = ""


class Note(Event, frozen=True, tag="note"):
    """Something the user should know but need not act on at once; ``level`` is ``info`` or ``warning``."""

    message: str
    level: str = "info"


class Phase(Event, frozen=True, tag="phase"):
    """A replica moved on: ``state`` is a fleet state; ``elapsed_s`` since the start was asked for."""

    replica: str
    state: str
    detail: str = ""
    elapsed_s: float = 0.0


class BuildProgress(Event, frozen=True, tag="build_progress"):
    """One step of an engine image build."""

    image: str
    step: str
    done: int = 0
    total: int = 0


class Ready(Event, frozen=True, tag="ready"):
    """A replica answers; ``socket`` is its unix socket on this host."""

    replica: str
    model: str
    runtime: str
    socket: str
    context: int
    elapsed_s: float = 0.0


class Failed(Event, frozen=True, tag="failed"):
    """The work ended in an error; ``error`` is ``PierError.to_dict()``."""

    error: dict[str, Any]


AnyEvent = (
    PullPlanned
    | PullProgress
    | PullDone
    | PushPlanned
    | PushProgress
    | PushDone
    | Note
    | Phase
    | BuildProgress
    | Ready
    | Failed
)
Listener = Callable[[AnyEvent], None]


def ignore(event: AnyEvent) -> None:
    """A listener that wants nothing."""


encode: Callable[[AnyEvent], bytes] = msgspec.json.Encoder().encode
decode: Callable[[bytes | str], AnyEvent] = msgspec.json.Decoder(AnyEvent).decode
