"""The speech engine's settings by name: data."""

from __future__ import annotations

from pierhead.engines.setting_table import Setting, Table

_SETTINGS = {
    "file": Setting(str, ""),
    "vad": Setting(str, ""),
    "threads": Setting(int, 0, 0, 1024),
    "parallel": Setting(int, 1, 1, 64),
    "queue": Setting(int, 16, 0, 1 << 16),
    "language": Setting(str, "auto"),
    "translate": Setting(bool, False),
    "temperature": Setting(float, 0.0, 0, 1),
    "fallback": Setting(bool, True),
    "beam_size": Setting(int, 1, 1, 8),
    "best_of": Setting(int, 5, 1, 8),
    "suppress_non_speech": Setting(bool, False),
    "flash_attention": Setting(bool, True),
    "max_seconds": Setting(int, 7200, 1, 86_400),
    "max_body_mb": Setting(int, 25, 1, 1024),
}
_ALIASES = {
    "model": "file",
    "vad_model": "vad",
    "n_threads": "threads",
    "workers": "parallel",
    "processors": "parallel",
    "instances": "parallel",
    "max_queue": "queue",
    "queue_size": "queue",
    "lang": "language",
    "beams": "beam_size",
    "beam": "beam_size",
    "flash_attn": "flash_attention",
    "suppress_nst": "suppress_non_speech",
    "max_duration": "max_seconds",
    "max_body": "max_body_mb",
}
TABLE = Table("the speech engine", _SETTINGS, _ALIASES)
