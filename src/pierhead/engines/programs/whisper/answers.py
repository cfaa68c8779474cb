"""Answers in the forms of OpenAI's routes for sound: JSON short and long, plain text, subtitles, events; pure."""

from __future__ import annotations

import math
import zlib
from typing import Any

import msgspec

from .asks import Ask
from .hall import Heard
from .languages import NAMES
from .whisper import Segment, Token, words

encode = msgspec.json.Encoder().encode
_KINDS = {"json": "application/json", "verbose_json": "application/json", "vtt": "text/vtt; charset=utf-8"}


def whole(heard: Heard, ask: Ask) -> tuple[bytes, bytes]:
    """The body of an answer and its content type."""
    kind = _KINDS.get(ask.form, "text/plain; charset=utf-8").encode()
    if ask.form == "text":
        return f"{heard.text}\n".encode(), kind
    if ask.form == "srt":
        return subtitles(heard, ",", numbered=True).encode(), kind
    if ask.form == "vtt":
        return f"WEBVTT\n\n{subtitles(heard, '.')}".encode(), kind
    return encode(_verbose(heard, ask) if ask.form == "verbose_json" else _plain(heard, ask)), kind


def _plain(heard: Heard, ask: Ask) -> dict[str, Any]:
    tokens = [token for segment in heard.segments for token in segment.tokens]
    more: dict[str, Any] = {"logprobs": [logprob(token) for token in tokens]} if ask.logprobs else {}
    return {"text": heard.text, **more, "usage": usage(heard)}


def _verbose(heard: Heard, ask: Ask) -> dict[str, Any]:
    told: dict[str, Any] = {
        "task": "translate" if ask.wish.translate else "transcribe",
        "language": NAMES.get(heard.language, heard.language),
        "duration": round(heard.duration, 3),
        "text": heard.text,
    }
    if ask.segments:
        told["segments"] = [_segment(number, segment, ask) for number, segment in enumerate(heard.segments)]
    if ask.wish.words:
        found = [word for segment in heard.segments for word in words(segment, heard.language)]
        told["words"] = [{"word": w, "start": round(start, 2), "end": round(end, 2)} for w, start, end in found]
    return told | {"usage": usage(heard)}


def _segment(number: int, segment: Segment, ask: Ask) -> dict[str, Any]:
    text = segment.text.encode()
    logprobs = [token.logprob for token in segment.tokens]
    return {
        "id": number,
        "seek": int(segment.start // 30) * 3000,
        "start": round(segment.start, 2),
        "end": round(segment.end, 2),
        "text": segment.text,
        "tokens": [token.id for token in segment.tokens],
        "temperature": ask.wish.temperature,
        "avg_logprob": round(sum(logprobs) / len(logprobs), 6) if logprobs else 0.0,
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 6) if text else 0.0,
        "no_speech_prob": 0.0,  # the binding does not tell it
    }


def usage(heard: Heard) -> dict[str, Any]:
    """OpenAI counts whole seconds of Whisper's."""
    return {"type": "duration", "seconds": math.ceil(heard.duration)}


def logprob(token: Token) -> dict[str, Any]:
    """One token and how sure the model was."""
    text = token.text.decode("utf-8", "replace")
    return {"token": text, "bytes": list(token.text), "logprob": round(token.logprob, 6)}


def subtitles(heard: Heard, point: str, *, numbered: bool = False) -> str:
    """SRT's or WebVTT's cues; a blank line or an arrow of the text would end or fake one."""
    cues: list[str] = []
    for number, segment in enumerate(heard.segments, 1):
        text = " ".join(segment.text.split()).replace("-->", "->")
        if point == ".":
            text = text.replace("&", "&amp;").replace("<", "&lt;")
        head = f"{number}\n" if numbered else ""
        cues.append(f"{head}{moment(segment.start, point)} --> {moment(segment.end, point)}\n{text}\n\n")
    return "".join(cues)


def moment(seconds: float, point: str) -> str:
    """``00:01:02.345``."""
    total = max(0, round(seconds * 1000))
    minutes, rest = divmod(total, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def delta(segment: Segment, ask: Ask, *, first: bool) -> bytes:
    """An event: more text."""
    text = segment.text.lstrip() if first else segment.text
    told: dict[str, Any] = {"type": "transcript.text.delta", "delta": text}
    return event(told | ({"logprobs": [logprob(t) for t in segment.tokens]} if ask.logprobs else {}))


def done(heard: Heard, ask: Ask) -> bytes:
    """The last event: all of it."""
    return event({"type": "transcript.text.done", **_plain(heard, ask)})


def event(told: dict[str, Any]) -> bytes:
    """As server-sent events are written."""
    return b"data: " + encode(told) + b"\n\n"
