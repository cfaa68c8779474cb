"""One answer as it streams: thinking dimmed on stderr, the text on stdout; and its timings."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import click

from pierhead.cli.chatapi import Stream
from pierhead.cli.output import printable, say

_TIMINGS = {
    "load_s": ("load", "s"),
    "first_token_s": ("first token", "s"),
    "total_s": ("total", "s"),
    "prompt_tokens": ("prompt", "tokens"),
    "prompt_per_second": ("prompt speed", "tokens/s"),
    "completion_tokens": ("answer", "tokens"),
    "predicted_per_second": ("answer speed", "tokens/s"),
}


@dataclass
class Answer:
    """What came so far; an answer that was interrupted keeps what it has."""

    text: str = ""
    thinking: str = ""
    finish: str | None = None
    timings: dict[str, float] = field(default_factory=dict[str, float])


def receive(stream: Stream, answer: Answer, *, quiet: bool = False, show_thinking: bool = True) -> None:
    """Fill ``answer`` from ``stream`` until it ends, and print it unless ``quiet``."""
    show = _Show(quiet, show_thinking and sys.stderr.isatty())
    try:
        for event in stream:
            for choice in event.get("choices", ()):
                delta: dict[str, Any] = choice.get("delta") or {}
                thought, text = delta.get("reasoning_content") or "", delta.get("content") or ""
                if (thought or text) and "first_token_s" not in answer.timings:
                    answer.timings["first_token_s"] = time.monotonic() - stream.asked
                answer.thinking += thought
                answer.text += text
                answer.finish = choice.get("finish_reason") or answer.finish
                show.piece(thought, text)
            _figures(event, answer.timings)
        answer.timings["total_s"] = time.monotonic() - stream.asked
    finally:
        stream.close()
        show.end()


class _Show:
    """Prints pieces; every answer ends with a line end."""

    def __init__(self, quiet: bool, thinking: bool) -> None:
        self._quiet = quiet
        self._thinking = thinking
        self._thought = False
        self._last = "\n"
        self._plain = sys.stdout.isatty()

    def piece(self, thought: str, text: str) -> None:
        if self._quiet:
            return
        if thought and self._thinking:
            self._thought = True
            click.echo(click.style(printable(thought), dim=True), err=True, nl=False)
        if not text:
            return
        if self._thought:
            self._thought = False
            click.echo("\n", err=True)
        self._last = text
        sys.stdout.write(printable(text) if self._plain else text)
        sys.stdout.flush()

    def end(self) -> None:
        if self._thought:
            click.echo(err=True)
        if not self._last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()


def _figures(event: dict[str, Any], timings: dict[str, float]) -> None:
    usage: dict[str, Any] = event.get("usage") or {}
    engine: dict[str, Any] = event.get("timings") or {}
    timings |= {k: usage[k] for k in ("prompt_tokens", "completion_tokens") if k in usage}
    timings |= {k: engine[k] for k in ("prompt_per_second", "predicted_per_second") if k in engine}


def show_timings(timings: dict[str, float]) -> None:
    """The timings of one answer, on stderr."""
    for key, (label, unit) in _TIMINGS.items():
        if key in timings:
            value = timings[key]
            number = f"{value:,.0f}" if unit == "tokens" else f"{value:,.1f}" if "/" in unit else f"{value:,.3f}"
            say(f"  {label:<13} {number:>9} {unit}")
