"""Models in OCI registries: the manifest is the plan, and it enters the store as it is."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import cast

import msgspec

from pierhead.config import SourceSettings
from pierhead.errors import CorruptData, UsageError
from pierhead.refs import Reference
from pierhead.registry.client import Registry
from pierhead.registry.credentials import find_login
from pierhead.registry.name import ImageName, image_name
from pierhead.registry.referrers import Attachment, fetch_all
from pierhead.registry.transfer import pull_blob
from pierhead.registry.wire import Retry
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.store.blobs import DIGEST
from pierhead.store.index import Descriptor
from pierhead.store.layers import check_filepath, config_of, files_of
from pierhead.store.manifest import Manifest
from pierhead.store.media import FILEPATH, GGUF, kind_of

MAX_LAYERS = 4096


class _List(msgspec.Struct):
    manifests: list[Descriptor] = []


class Artifacts:
    """Registries of the OCI distribution standard; one connection pool for each repository that is asked."""

    def __init__(self, settings: SourceSettings, env: Mapping[str, str], retry: Retry | None) -> None:
        self._settings = settings
        self._env = env
        self._retry = retry
        self._open: list[Registry] = []

    async def close(self) -> None:
        for registry in self._open:
            await registry.__aexit__(None, None, None)

    async def plan(self, reference: Reference) -> PullPlan:
        name = image_name(reference)
        registry = await self.registry(name)
        body = await _manifest(registry, name.target)
        where = str(name)
        try:
            found = msgspec.json.decode(body, type=Manifest)
        except msgspec.DecodeError as exc:
            raise CorruptData(f"{where} has no manifest that can be read: {exc}") from exc
        _check(found, where)
        if found.config.size > 4 << 20:
            raise CorruptData(f"the config of {where} is larger than a config may be")
        config = await registry.small(found.config.digest)
        if _digest(config) != found.config.digest:
            raise CorruptData(f"{where} sends another config than its manifest names", hint="Try again.")
        digest = _digest(body)
        files = _files(registry, found, config, where)
        tag = f":{name.tag}" if name.tag else ""
        source = f"oci://{name.host}/{name.repository}{tag}@{digest}"
        return PullPlan(reference.repo, source, files, {}, body, config)

    async def registry(self, name: ImageName) -> Registry:
        """A repository, with the login that is kept for its host; closed with the others."""
        login = await asyncio.to_thread(find_login, name.host, self._env)
        registry = Registry(name, self._settings, login, retry=self._retry)
        self._open.append(registry)
        return registry

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        registry = cast("Registry", file.opaque)
        end = min(offset + length, file.size or 0)
        found: list[bytes] = []

        async def attempt() -> bytes:
            found.clear()
            got, skip = 0, 0
            headers = {"Range": f"bytes={offset}-{end - 1}"}
            async with registry.request("GET", registry.url("blobs", file.digest), headers=headers) as response:
                skip = offset if response.status == 200 else 0
                async for chunk in response.content.iter_any():
                    found.append(chunk[skip:])
                    got += len(found[-1])
                    skip = max(0, skip - len(chunk))
                    if got >= end - offset:
                        break
            return b"".join(found)[: end - offset]

        return await registry.repeat(attempt) if end > offset else b""

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        registry = cast("Registry", file.opaque)
        connections = self._settings.registry_connections
        await pull_blob(registry, file.digest, file.size or 0, sink.offset, sink.write_all, connections)

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""

    async def said(self, plan: PullPlan) -> list[Attachment]:
        """The signatures and other referrers of a planned artifact."""
        registry = cast("Registry", plan.files[0].opaque)
        return await fetch_all(registry, _digest(plan.manifest))


async def _manifest(registry: Registry, target: str) -> bytes:
    """The manifest's bytes; of a list, those of its first entry."""
    kind, body = await registry.manifest(target)
    if target.startswith("sha256:") and _digest(body) != target:
        raise CorruptData(f"{registry.name} sends another manifest than the digest names", hint="Try again.")
    if not kind.endswith(("index.v1+json", "list.v2+json")):
        return body
    try:
        entries = msgspec.json.decode(body, type=_List).manifests
    except msgspec.DecodeError as exc:
        raise CorruptData(f"{registry.name} has no manifest that can be read: {exc}") from exc
    if not entries or not DIGEST.fullmatch(entries[0].digest):
        raise CorruptData(f"{registry.name} is a list without a model")
    _, inner = await registry.manifest(entries[0].digest)
    if _digest(inner) != entries[0].digest:
        raise CorruptData(f"{registry.name} sends another manifest than its list names", hint="Try again.")
    return inner


def _check(found: Manifest, where: str) -> None:
    if len(found.layers) > MAX_LAYERS:
        raise CorruptData(f"{where} has more than {MAX_LAYERS} layers")
    for one in (found.config, *found.layers):
        if not DIGEST.fullmatch(one.digest) or not 0 <= one.size < 1 << 63:
            raise CorruptData(f"{where} has a manifest with a part that is not named by a sha256 digest and a size")
    paths = [check_filepath(x.annotations[FILEPATH]) for x in found.layers if x.annotations.get(FILEPATH)]
    if len(set(paths)) != len(paths):
        raise CorruptData(f"{where} has two files of one name")
    odd = sorted({x.media_type for x in found.layers if kind_of(x.media_type) is None})
    if odd:
        raise UsageError(
            f"{where} has layers of a kind that cannot be used: {', '.join(odd)[:300]}",
            hint="Models can be pulled as Docker's or CNCF ModelPack's artifacts.",
        )


def _files(registry: Registry, found: Manifest, config: bytes, where: str) -> tuple[RemoteFile, ...]:
    files = files_of(found.layers, config_of(config))
    if not any(f.role in ("weights", "code") or f.packing != "raw" for f in files):
        raise UsageError(f"{where} holds no model's weights", hint=f"A model has a layer of type {GGUF}.")
    return tuple(
        RemoteFile(f.name, f.digest, f.size, f.digest, f.role, opaque=registry, format=f.format, packing=f.packing)
        for f in files
    )


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
