"""What the server is told; the launch plan has checked it."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``piece`` is how many seconds of sound are worked on at a time, ``max_body`` is in bytes."""

    name: str
    file: str
    vad: str = ""
    parallel: int = 1
    threads: int = 1
    queue: int = 16
    language: str = "auto"
    translate: bool = False
    temperature: float = 0.0
    fallback: bool = True
    beam_size: int = 1
    best_of: int = 5
    suppress_non_speech: bool = False
    flash_attention: bool = True
    max_seconds: int = 7200
    piece: int = 600
    max_body: int = 25 << 20
