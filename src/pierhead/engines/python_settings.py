"""The Python engine's settings by name: data."""

from __future__ import annotations

from pierhead.engines.setting_table import Setting, Table

_SETTINGS = {
    "max_batch_size": Setting(int, 1, 1, 65536),
    "batch_delay_ms": Setting(float, 0.0, 0, 60_000),
    "concurrency": Setting(int, 1, 1, 1024),
    "parallel": Setting(int, 0, 0, 65536),
    "threads": Setting(int, 0, 0, 1024),
    "memory": Setting(int, 0, 0, 1 << 50, bytes=True),
}
_ALIASES = {
    "batch_delay": "batch_delay_ms",
    "max_delay_ms": "batch_delay_ms",
    "max_concurrency": "concurrency",
}
TABLE = Table("a Python model", _SETTINGS, _ALIASES)
