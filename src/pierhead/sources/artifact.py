"""Models in OCI registries: the manifest is the plan, and it enters the store as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from pierhead.config import SourceSettings
from pierhead.errors import CorruptData
from pierhead.events import Listener, ignore
from pierhead.refs import Reference
from pierhead.registry.client import Registry
from pierhead.registry.manifests import Finder, digest_of
from pierhead.registry.mirrors import PASSED, Mirrors
from pierhead.registry.name import ImageName, image_name
from pierhead.registry.referrers import Attachment, fetch_all
from pierhead.registry.transfer import pull_blob
from pierhead.registry.wire import Retry
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.landing import Landing
from pierhead.store.blobs import DIGEST
from pierhead.store.index import Descriptor
from pierhead.store.manifest import Manifest
from pierhead.store.sound import sound_files, sound_manifest


class Artifacts:
    """Registries of the OCI distribution standard; one connection pool for each repository that is asked."""

    def __init__(
        self, settings: SourceSettings, env: Mapping[str, str], retry: Retry | None, listener: Listener = ignore
    ) -> None:
        self._settings = settings
        self._env = env
        self._retry = retry
        self._listener = listener
        self._open: list[Mirrors] = []

    async def close(self) -> None:
        for mirrors in self._open:
            await mirrors.__aexit__(None, None, None)

    async def plan(self, reference: Reference) -> PullPlan:
        name = image_name(reference)
        mirrors = await self.repository(name)
        where = str(name)
        body = await Finder(mirrors.first, where, lambda found: _sound(found, where)).find(name.target)
        found = sound_manifest(body, where)
        config = await mirrors.first(lambda registry: _config(registry, found.config, where))
        files = _files(mirrors, found, config, where)
        tag = f":{name.tag}" if name.tag else ""
        source = f"oci://{name.host}/{name.repository}{tag}@{digest_of(body)}"
        return PullPlan(reference.repo, source, files, {}, body, config)

    async def current(self, reference: Reference) -> str:
        """The digest that the tag points to now."""
        name = image_name(reference)
        mirrors = await self.repository(name)
        kind, digest = await mirrors.first(lambda registry: registry.head(name.target))
        if DIGEST.fullmatch(digest) and not kind.endswith(("index.v1+json", "list.v2+json")):
            return digest
        where = str(name)
        return digest_of(await Finder(mirrors.first, where, lambda found: _sound(found, where)).find(name.target))

    async def repository(self, name: ImageName) -> Mirrors:
        """A repository with its mirrors, and the logins that are kept for their hosts; closed with the others."""
        mirrors = await Mirrors.open(name, self._settings, self._env, retry=self._retry, listener=self._listener)
        self._open.append(mirrors)
        return mirrors

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        wanted = min(length, (file.size or 0) - offset)
        return await _mirrors(file).first(lambda registry: registry.part(file.digest, offset, wanted))

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        landing, mirrors = cast("Landing", sink), _mirrors(file)
        for registry in mirrors.each():
            before = landing.offset
            try:
                await self._fetch(registry, file, landing)
            except PASSED as exc:
                if registry is mirrors.own:
                    raise
                mirrors.pass_over(registry, exc)
            else:
                if landing.digest == file.digest or (registry is mirrors.own and not before):
                    return  # a commit says what is wrong with bytes that came all from the registry itself
                await landing.restart()
                mirrors.pass_over(registry, CorruptData("it sends other bytes than the manifest names"))
        await self._fetch(mirrors.own, file, landing)  # of what had landed before some was wrong

    async def _fetch(self, registry: Registry, file: RemoteFile, sink: Landing) -> None:
        if sink.done is not None:  # another pull brought it
            return
        connections = self._settings.registry_connections
        await pull_blob(registry, file.digest, file.size or 0, sink.offset, sink.write_all, connections)

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""

    async def said(self, plan: PullPlan) -> list[Attachment]:
        """The signatures and other referrers of a planned artifact."""
        return await fetch_all(_mirrors(plan.files[0]).own, digest_of(plan.manifest))


def _mirrors(file: RemoteFile) -> Mirrors:
    return cast("Mirrors", file.opaque)


def _sound(body: bytes, where: str) -> None:
    sound_manifest(body, where)


async def _config(registry: Registry, part: Descriptor, where: str) -> bytes:
    config = await registry.small(part.digest)
    if digest_of(config) != part.digest:
        raise CorruptData(f"{where} sends another config than its manifest names", hint="Try again.")
    return config


def _files(mirrors: Mirrors, found: Manifest, config: bytes, where: str) -> tuple[RemoteFile, ...]:
    early = not mirrors.mirrored  # what a mirror sends first may be a lie that only the whole digest tells
    return tuple(
        RemoteFile(
            f.name, f.digest, f.size, f.digest, f.role, opaque=mirrors, format=f.format, packing=f.packing, early=early
        )
        for f in sound_files(found, config, where)
    )
