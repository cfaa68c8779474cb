"""What an earlier daemon left running: finds it, and ends what should not run; looks after none of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pierhead.errors import PierError
from pierhead.fleet import record as records
from pierhead.fleet.holdings import Models
from pierhead.runtimes.base import Instance, Runtime
from pierhead.store.model import ModelRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A replica that runs, what was written down about it, and its model."""

    id: str
    instance: Instance
    runtime: Runtime
    saved: records.ReplicaRecord
    model: ModelRecord


async def find(runtimes: Mapping[str, Runtime], store: Models, folder: Path) -> list[Found]:
    """The replicas that can be taken over; those that cannot are ended."""
    found: list[Found] = []
    for name, runtime in runtimes.items():
        try:
            for replica in await runtime.list():
                one = await _look(name, runtime, replica, store, folder / replica)
                if one is not None:
                    found.append(one)
        except PierError as exc:
            log.warning("cannot adopt from the %s runtime: %s", name, exc)
    return found


async def end(replica: str, instance: Instance) -> None:
    """End what nobody goes on with."""
    log.info("ending replica %s, which an earlier daemon left", replica)
    await instance.stop(0)


async def _look(name: str, runtime: Runtime, replica: str, store: Models, folder: Path) -> Found | None:
    saved = records.load(folder)
    model: ModelRecord | None = None
    if saved is not None and saved.runtime == name:
        with contextlib.suppress(PierError):
            model = store.get(saved.digest)
    instance = await runtime.adopt(replica)
    if instance is None:
        return None
    if saved is None or model is None or await _ended(instance):
        await end(replica, instance)
        return None
    return Found(replica, instance, runtime, saved, model)


async def _ended(instance: Instance) -> bool:
    """Whether the program has ended already."""
    waiting = asyncio.ensure_future(instance.wait())
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return bool(done)
