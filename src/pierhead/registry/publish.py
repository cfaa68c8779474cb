"""A model of the store to a registry: its blobs, its config, then its manifest, which makes it visible."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import msgspec

from pierhead.config import SourceSettings
from pierhead.events import Listener, PushDone, PushPlanned, PushProgress
from pierhead.registry import referrers
from pierhead.registry.client import Registry, check_plain
from pierhead.registry.credentials import find_login
from pierhead.registry.name import ImageName
from pierhead.registry.push import push_blob
from pierhead.registry.uploads import Uploads
from pierhead.registry.wire import Retry
from pierhead.store.index import Descriptor
from pierhead.store.layout import Store
from pierhead.store.manifest import Manifest
from pierhead.store.media import FILEPATH
from pierhead.store.model import ModelRecord

AT_ONCE = 3  # blobs
REPORT_EVERY = 0.1


class _Progress:
    """Tells a listener how far one file is, ten times a second at most; its first word says what was there before."""

    def __init__(self, listener: Listener, model: str, file: str, total: int, digest: str = "") -> None:
        self._listener = listener
        self._about = {"name": model, "file": file, "digest": digest}
        self._total = total
        self._last = -REPORT_EVERY
        self._resumed = -1

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        self._resumed = done if self._resumed < 0 else self._resumed
        if done == self._total or now - self._last >= REPORT_EVERY:
            self._last = now
            self._listener(PushProgress(**self._about, done=done, total=self._total, resumed=self._resumed))


async def push_model(
    store: Store,
    model: str,
    target: ImageName,
    *,
    settings: SourceSettings,
    env: Mapping[str, str],
    listener: Listener,
    retry: Retry | None = None,
    uploads: Uploads | None = None,
) -> PushDone:
    """Send ``model`` to ``target``; what the registry has is not sent again, and ``uploads`` go on where they stopped.

    NotFound, AccessDenied or SourceUnavailable.
    """
    check_plain(target)
    hold = store.hold(model)
    (record,) = await asyncio.to_thread(hold.__enter__)
    try:
        login = await asyncio.to_thread(find_login, target.host, env)
        async with Registry(target, settings, login, retry=retry) as registry:
            return await _push(store, model, record, registry, listener, uploads)
    finally:
        await asyncio.to_thread(hold.__exit__, None, None, None)


async def _push(
    store: Store,
    model: str,
    record: ModelRecord,
    registry: Registry,
    listener: Listener,
    uploads: Uploads | None,
) -> PushDone:
    target = registry.name
    body = await asyncio.to_thread(store.blob_path(record.digest).read_bytes)
    manifest = msgspec.json.decode(body, type=Manifest)
    mount = _same_host(record.source, target)
    slots = asyncio.Semaphore(AT_ONCE)
    sent = 0

    async def one(part: Descriptor, name: str) -> None:
        nonlocal sent
        report = _Progress(listener, model, name, part.size, part.digest)
        async with slots:
            path = store.blob_path(part.digest)
            moved = await push_blob(registry, part.digest, path, part.size, report, mount, uploads)
        sent += moved

    parts = {d.digest: d for d in (*manifest.layers, manifest.config)}
    listener(PushPlanned(name=model, target=str(target), total=sum(d.size for d in parts.values())))
    tasks = [asyncio.create_task(one(d, d.annotations.get(FILEPATH) or d.digest[7:19])) for d in parts.values()]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await registry.put_manifest(target.target, manifest.media_type, body)
    for attachment in await asyncio.to_thread(referrers.kept, store, record.digest):
        await referrers.push(registry, record.digest, attachment)
    done = PushDone(name=str(target), digest=record.digest, sent=sent)
    listener(done)
    return done


def _same_host(source: str, target: ImageName) -> str:
    """The repository of the same registry that the model came from, if it did."""
    rest = source.removeprefix(f"oci://{target.host}/")
    if rest == source:
        return ""
    repository = rest.partition("@")[0].partition(":")[0]
    return repository if repository != target.repository else ""
