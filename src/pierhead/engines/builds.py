"""What an engine has built from a model once for each kind of machine: the wish, the machine and the key; pure."""

from __future__ import annotations

import hashlib

import msgspec

VERSION = 1


class Gpu(msgspec.Struct, frozen=True, order=True):
    """A GPU as ``nvidia-smi`` tells of it; ``capability`` is that of its computing, such as 9.0."""

    name: str
    driver: str
    capability: str


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """A job before the first start: ``argv`` writes into ``$(OUTPUT)``, which the engine finds at ``$(BUILT)``.

    ``tool`` and ``version`` are what builds, ``settings`` what it is told (a result for others is another result);
    ``devices`` and limits are the launch spec's own. ``timeout`` in seconds.
    """

    tool: str
    version: str
    argv: tuple[str, ...]
    settings: dict[str, str] = {}
    timeout: float = 4 * 3600.0


def key(build: Build, model: str, gpus: tuple[Gpu, ...], machine: str) -> str:
    """The name of a result: equal for the same model digest, tool, settings, processor and GPUs in whatever order."""
    inputs = [VERSION, model, build.tool, build.version, sorted(build.settings.items()), sorted(gpus), machine]
    return hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()
