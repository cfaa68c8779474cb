"""Fetches every engine's metrics and labels them with model and replica; bounded in time and size."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from pierhead.gateway.metrics import escape
from pierhead.gateway.upstream import Answer, Target

_TIMEOUT = 2.0
_MAX = 1 << 20
_REQUEST = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?\s*\Z")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|Inf|NaN)\Z", re.IGNORECASE)
_LABELS = re.compile(r'(?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*",?)*\Z')
_META = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) [^\r\n]*\Z")
_OWN = "pierhead_"


class _Fetch:
    """Receives one small answer."""

    def __init__(self) -> None:
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pieces: list[bytes] = []
        self._size = 0
        self._status = 0

    def on_whole(self, answer: Answer, body: bytes) -> None:
        self._finish(body if answer.head.status == 200 else b"")

    def on_head(self, answer: Answer) -> None:
        self._status = answer.head.status

    def on_piece(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > _MAX:
            self._finish(b"")
        else:
            self._pieces.append(piece)

    def on_end(self) -> None:
        self._finish(b"".join(self._pieces) if self._status == 200 else b"")

    def on_lost(self, reason: str, pristine: bool) -> None:
        self._finish(b"")

    def _finish(self, body: bytes) -> None:
        if not self.done.done():
            self.done.set_result(body)


async def _fetch(target: Target) -> bytes:
    try:
        async with asyncio.timeout(_TIMEOUT):
            conn = await target.connect(_TIMEOUT)
            fetch = _Fetch()
            try:
                conn.begin(fetch, _REQUEST + b"\r\n", (b"",), False)
                return await fetch.done
            finally:
                conn.close()
    except (OSError, TimeoutError):
        return b""


def relabel(text: str, model: str, replica: str) -> Iterable[tuple[str, str]]:
    """(family, line) for each well-formed line; an engine can add samples, never break or imitate others'."""
    extra = f'model="{escape(model)}",replica="{escape(replica)}"'
    for line in text.split("\n"):
        meta = _META.match(line)
        if meta and not meta[2].startswith(_OWN):
            yield meta[2], line
            continue
        sample = _SAMPLE.match(line)
        if not sample or sample[1].startswith(_OWN) or not _NUMBER.match(sample[3]):
            continue
        labels = sample[2] or ""
        if not _LABELS.match(labels):
            continue
        kept = re.sub(r"(?:^|(?<=,))(model|replica)=", r"engine_\1=", labels).rstrip(",")
        yield sample[1], f"{sample[1]}{{{extra}{',' + kept if kept else ''}}} {sample[3]}"


async def scrape(targets: list[tuple[str, Target]]) -> str:
    """The metrics of all engines as one text, families together; an engine that does not answer is left out."""
    texts = await asyncio.gather(*(_fetch(target) for _, target in targets))
    meta: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for (model, target), raw in zip(targets, texts, strict=True):
        for name, line in relabel(raw.decode("utf-8", "replace"), model, target.replica):
            if line.startswith("# "):
                meta.setdefault(name, {}).setdefault(line[:6], line)
            else:
                samples.setdefault(name, []).append(line)
    out: list[str] = []
    for name in dict.fromkeys((*meta, *samples)):
        out += meta.get(name, {}).values()
        out += samples.get(name, ())
    up = [f'pierhead_replica_up{{model="{escape(m)}",replica="{escape(t.replica)}"}} {int(bool(raw))}'
          for (m, t), raw in zip(targets, texts, strict=True)]  # fmt: skip
    out += ["# HELP pierhead_replica_up Whether the engine gave its metrics.", "# TYPE pierhead_replica_up gauge", *up]
    return "\n".join(out) + "\n"
