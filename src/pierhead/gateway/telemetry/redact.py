"""Takes out of requests and answers what no recording should keep: credentials, personal data, media; keeps no state.

Patterns that take too long are stopped, and then the text they were tried on is not kept at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

TIME_LIMIT = 0.1  # seconds for all patterns on one text, and for each character more
_PER_CHARACTER = 3e-6
DEPTH_MAX = 100
SLOW = "[redacted: a pattern took too long]"
_MEDIA_MIN = 512

_SECRET_NAMES = re.compile(
    r"(?i)(?:^|[_\-. ])(?:api[_-]?key|x-api-key|authorization|password|passwd|secret|client[_-]?secret|"
    r"access[_-]?token|refresh[_-]?token|bearer|cookie|private[_-]?key|token)$"
)
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "private key",
        re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,20000}(?:-----END [A-Z ]{0,30}KEY-----)?"),
    ),
    ("token", re.compile(r"(?i)\b(?:bearer|basic)\s{1,4}[A-Za-z0-9._~+/=-]{8,4096}")),
    ("token", re.compile(r"\beyJ[A-Za-z0-9_-]{5,4096}\.[A-Za-z0-9_-]{5,4096}\.[A-Za-z0-9_-]{0,4096}")),
    (
        "key",
        re.compile(
            r"\b(?:sk|pk|rk|pier|ghp|gho|ghs|ghu|glpat|hf|xox[abprs]|npm|pypi|AKIA|ASIA|AIza|ya29)"
            r"(?:[-_.][A-Za-z0-9_.-]{12,512}|[A-Z0-9]{12,40}\b|[A-Za-z0-9_-]{30,80})"
        ),
    ),
    ("key", re.compile(r"\bgithub_pat_[A-Za-z0-9_]{20,255}")),
    (
        "secret",
        re.compile(
            r"(?i)\b(?:api[_-]?key|password|passwd|secret|access[_-]?token)\b[\"']?\s{0,4}[:=]\s{0,4}[\"']?[^\s\"',;]{4,512}"
        ),
    ),
    (
        "e-mail",
        re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    ),
)
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")
_PHONE = re.compile(
    r"(?<![\w+])\+\d{1,3}(?:[ ./-]?\(?\d{1,12}\)?){1,6}(?![\w])"
    r"|(?<![\w.:/-])(?:\(\d{2,5}\)|0\d{1,5})(?:[ ./-]?\d{2,8}){1,4}(?![\w.:])"
    r"|(?<![\w.:/-])\d{3}[ .-]\d{3}[ .-]\d{4}(?![\w.:])"
)
_DATE = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(?:[ T]\d{1,2})?\Z")
_DATA_URL = re.compile(r"data:([A-Za-z0-9.+-]{1,60}/[A-Za-z0-9.+-]{1,60})[^,]{0,100},")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}\s?\Z")
_LETTERS = re.compile(r"[+/0-9]")


class _Late(Exception):
    """A pattern took too long."""


class Redactor:
    """``extra`` are patterns of the settings; ``media``: something was replaced that cannot be sent again."""

    def __init__(self, extra: Sequence[str] = ()) -> None:
        self._extra = [re.compile(pattern) for pattern in extra]
        self.media = False

    def body(self, raw: bytes) -> Any:
        """A JSON body as a cleaned value; other text as a cleaned string; b"" as None."""
        if not raw:
            return None
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            return self.text(raw.decode("utf-8", "replace"))
        return self.value(value)

    def value(self, value: Any, depth: int = 0) -> Any:
        """The same with every text in it cleaned."""
        if isinstance(value, str):
            return self._media(value) or self.text(value)
        if depth > DEPTH_MAX:
            return "[redacted: nested too deep]"
        if isinstance(value, list):
            return [self.value(item, depth + 1) for item in value]  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, dict):
            return {
                self.text(str(name)): "[redacted]"  # pyright: ignore[reportUnknownArgumentType]
                if isinstance(item, str) and _SECRET_NAMES.search(str(name))  # pyright: ignore[reportUnknownArgumentType]
                else self.value(item, depth + 1)
                for name, item in value.items()  # pyright: ignore[reportUnknownVariableType]
            }
        return value

    def text(self, text: str) -> str:
        """Plain text, cleaned."""
        return within(TIME_LIMIT + len(text) * _PER_CHARACTER, lambda: self._clean(text), SLOW)

    def _clean(self, text: str) -> str:
        for name, pattern in _PATTERNS:
            text = pattern.sub(lambda m, name=name: _named(name, m[0]), text)
        text = _CARD.sub(lambda m: "[card]" if luhn(m[0]) else m[0], text)
        text = _IBAN.sub(lambda m: "[account]" if iban(m[0]) else m[0], text)
        text = _PHONE.sub(_phone, text)
        for pattern in self._extra:
            text = pattern.sub("[redacted]", text)
        return text

    def _media(self, text: str) -> str:
        """What stands for an image or another file; "" when the text is none."""
        if len(text) < _MEDIA_MIN:
            return ""
        url = _DATA_URL.match(text)
        data = text[url.end() :] if url else text
        if not url and not (_BASE64.match(data) and _LETTERS.search(data, 0, 200)):
            return ""
        self.media = True
        try:
            raw = base64.b64decode(data + "=" * (-len(data) % 4), validate=False)
        except ValueError:
            raw = data.encode("utf-8", "replace")
        return f"[{url[1] if url else 'data'} sha256:{hashlib.sha256(raw).hexdigest()} {len(raw)} bytes]"


def _phone(match: re.Match[str]) -> str:
    digits = sum(c.isdigit() for c in match[0])
    return "[phone]" if 8 <= digits <= 15 and not _DATE.match(match[0]) else match[0]


def _named(name: str, text: str) -> str:
    """Keys have digits; words that begin like one have not."""
    return text if name == "key" and not any(c.isdigit() for c in text) else f"[{name}]"


def luhn(text: str) -> bool:
    """Whether digits have the check sum of a card's number."""
    digits = [int(c) for c in text if c.isdigit()][::-1]
    return sum(d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(digits)) % 10 == 0


def iban(text: str) -> bool:
    """Whether letters and digits have the check sum of an account's number."""
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def within(seconds: float, work: Callable[[], str], late: str) -> str:
    """``work()``, or ``late`` when it takes longer. In the main thread only: Python's patterns heed signals there."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Late:
        return late
    finally:
        signal.signal(signal.SIGALRM, before)
