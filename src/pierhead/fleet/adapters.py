"""LoRA adapters of replicas whose engines load them while they run: their files, and what the engine is told."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pierhead.engines.base import Adapter, Beside, Loading
from pierhead.errors import CorruptData, PierError
from pierhead.fleet.layers import Layers
from pierhead.runtimes.asking import ask

if TYPE_CHECKING:
    from pierhead.fleet.replica import Replica

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
_MOST = 1 << 20  # bytes of an adapter's config
_TIMEOUT = 120.0


class Fitter:
    """Gives replicas the adapters that their model's settings name. ``lend`` finds one in the store.

    Each is put into a folder of its own below ``root``/REPLICA, which the engine sees, and read only once, under a name
    that tells it, its version and its scale: an engine may keep what it worked out for a name. The engine itself is
    asked what it has, so nothing need be remembered.
    """

    def __init__(self, lend: Callable[[str], Beside], layers: Layers, root: Path) -> None:
        self._lend = lend
        self._layers = layers
        self._root = root
        self._busy: dict[str, asyncio.Lock] = {}

    def prepare(self, replica: Replica) -> None:
        """Make the folder that its engine is to see, where it loads adapters; it goes with the replica."""
        if replica.plan is not None and (loading := replica.plan.spec.loading) is not None:
            _folder(Path(loading.folder))
            replica.life.lease.callback(shutil.rmtree, loading.folder, ignore_errors=True)
            replica.life.lease.callback(self._busy.pop, replica.id, None)

    async def fit(self, replica: Replica) -> None:
        """Load what is missing and unload the rest; what cannot be loaded is told in ``replica.refused``."""
        plan, instance = replica.plan, replica.instance
        loading = plan.spec.loading if plan is not None else None
        if loading is None or instance is None:
            return
        async with self._busy.setdefault(replica.id, asyncio.Lock()):
            try:
                await self._fit(replica, instance.socket, loading)
            except OSError as exc:
                log.warning("replica %s: its adapters cannot be seen to: %s", replica.id, exc)

    def tidy(self, living: Iterable[str]) -> None:
        """Remove the folders of replicas that are not there any more. Blocking."""
        kept = set(living)
        for folder in self._root.iterdir() if self._root.is_dir() else ():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    async def _fit(self, replica: Replica, socket: str, loading: Loading) -> None:
        there = await _loaded(socket)
        found: dict[str, Adapter] = {}
        refused: dict[str, str] = {}
        for name, scale in self._layers.adapters(replica.life.model).items():
            try:
                adapter = await asyncio.to_thread(self._put, name, scale, Path(loading.folder))
                if adapter.model not in there:
                    await _load(socket, loading, adapter.model)
                found[adapter.model] = adapter
            except PierError as exc:
                refused[name] = exc.message
                log.warning("replica %s does not get the adapter %s: %s", replica.id, name, exc.message)
        replica.adapters, replica.refused = tuple(found.values()), refused
        for model in there - set(found):
            if (Path(loading.folder) / model).is_dir():  # others are the model's own
                await ask(socket, "POST", loading.unload, {"lora_name": model}, _TIMEOUT)
                await asyncio.to_thread(shutil.rmtree, Path(loading.folder) / model, ignore_errors=True)

    def _put(self, name: str, scale: float, root: Path) -> Adapter:
        """Lay an adapter's files out where the engine sees them; CorruptData for one that cannot be used."""
        lent = self._lend(name)
        key = hashlib.sha256(json.dumps([name, sorted((f.name, f.digest) for f in lent.files), scale]).encode())
        target = root / f"lora-{key.hexdigest()[:20]}"
        if not target.is_dir():
            making = root / f".{target.name}"
            shutil.rmtree(making, ignore_errors=True)
            _folder(making)
            for file in lent.files:
                if file.role == "lora" and "/" not in file.name and file.name != CONFIG:
                    _link(lent.folder / file.name, making / file.name)
            (making / CONFIG).write_text(json.dumps(_scaled(lent.folder / CONFIG, name, scale)))
            (making / CONFIG).chmod(0o644)
            making.rename(target)
        return Adapter(name, model=target.name)


async def _loaded(socket: str) -> set[str]:
    """The names of the adapters that an engine has."""
    status, answer = await ask(socket, "GET", "/v1/models")
    data: Any = cast("dict[str, Any]", answer).get("data") if status == 200 and isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise OSError(f"the engine does not say what it has (status {status})")
    return {str(one.get("id")) for one in cast("list[dict[str, Any]]", data) if one.get("parent")}


async def _load(socket: str, loading: Loading, name: str) -> None:
    """CorruptData with the engine's own words when it does not take it."""
    status, answer = await ask(socket, "POST", loading.load, {"lora_name": name, "lora_path": name}, _TIMEOUT)
    if status != 200:
        told: Any = cast("dict[str, Any]", answer).get("error", answer) if isinstance(answer, dict) else answer
        words: Any = cast("dict[str, Any]", told).get("message", told) if isinstance(told, dict) else told
        raise CorruptData(
            f"the engine does not take it: {str(words)[:500]}", hint="`pier logs` shows the engine's log."
        )


def _scaled(config: Path, name: str, scale: float) -> dict[str, Any]:
    """The adapter's config, whose alpha is how strongly it counts."""
    try:
        found: Any = json.loads(config.read_bytes()[:_MOST])
        alpha = float(found["lora_alpha"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
        raise CorruptData(f"'{name}' is no adapter that this engine can load: {exc!r}") from exc
    patterns = {k: float(v) * scale for k, v in dict(found.get("alpha_pattern") or {}).items()}
    return {**found, "lora_alpha": alpha * scale, "alpha_pattern": patterns}


def _folder(place: Path) -> None:
    """A folder that an engine may read, whoever it runs as."""
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o755)


def _link(source: Path, target: Path) -> None:
    """The same file under another name where that can be, else a copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
