"""Fetches every engine's metrics and labels them with model and replica; bounded in time and size."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from pierhead.gateway.faults import Fault
from pierhead.gateway.fetch import fetch
from pierhead.gateway.metrics import escape
from pierhead.gateway.upstream import Target

_TIMEOUT = 2.0
_MAX = 1 << 20
_REQUEST = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n"
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?\s*\Z")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|Inf|NaN)\Z", re.IGNORECASE)
_LABELS = re.compile(r'(?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*",?)*\Z')
_META = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) [^\r\n]*\Z")
_OWN = "pierhead_"
_LINES, _LONGEST = 20_000, 8192  # of one engine, and characters of one line: more is no engine's, and takes time


async def _fetch(target: Target) -> bytes:
    try:
        return await fetch(target, _REQUEST, limit=_MAX, timeout=_TIMEOUT)
    except Fault:
        return b""


def relabel(text: str, model: str, replica: str) -> Iterable[tuple[str, str]]:
    """(family, line) for each well-formed line; an engine can add samples, never break or imitate others'."""
    extra = f'model="{escape(model)}",replica="{escape(replica)}"'
    for line in text.split("\n", _LINES)[:_LINES]:
        if len(line) > _LONGEST:
            continue
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
    return await asyncio.to_thread(_merged, targets, texts)


def _merged(targets: list[tuple[str, Target]], texts: list[bytes]) -> str:
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
