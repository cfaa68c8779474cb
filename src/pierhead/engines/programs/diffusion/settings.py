"""What the server is told at its start: one JSON document on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """See ``engines.diffusion_settings``; ``files`` are the model's parts by what they are for, in its folder."""

    name: str = "model"
    files: dict[str, str] = field(default_factory=dict[str, str])
    threads: int = 1
    device: str = "cpu"
    type: str = ""
    mmap: bool = True
    flash_attention: bool = False
    vae_tiling: str = "auto"
    steps: int = 20
    cfg_scale: float = 7.0
    guidance: float = 3.5
    clip_skip: int = -1
    sampler: str = "auto"
    scheduler: str = "auto"
    strength: float = 0.75
    edits: str = "init"
    width: int = 512
    height: int = 512
    multiple: int = 64
    max_pixels: int = 1 << 20
    max_steps: int = 100
    max_n: int = 4
    queue: int = 16
    max_body: int = 64 << 20


def read(text: str) -> Settings:
    """The settings; TypeError for one that is not known."""
    given: dict[str, Any] = json.loads(text)
    return Settings(**given)
