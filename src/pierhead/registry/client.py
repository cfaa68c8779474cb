"""One repository of one registry: its manifests, its small blobs, the addresses of the rest; no word of models."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from pierhead.config import SourceSettings
from pierhead.errors import CorruptData, UsageError
from pierhead.registry.connections import Resolver
from pierhead.registry.credentials import Login
from pierhead.registry.host import Host
from pierhead.registry.name import ImageName
from pierhead.registry.places import Place, own_place
from pierhead.registry.tokens import limited
from pierhead.registry.wire import Retry, persist, redact

MAX_DOCUMENT = 4 << 20  # the least that the standard asks registries to take
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
T = TypeVar("T")


class Registry:
    """A repository at its registry or, with ``place``, at a mirror; use as an async context manager."""

    def __init__(
        self,
        name: ImageName,
        settings: SourceSettings,
        login: Login,
        *,
        retry: Retry | None = None,
        place: Place | None = None,
        resolver: Resolver = aiohttp.ThreadedResolver,
    ) -> None:
        self.name = name
        self.retry = retry or Retry()
        self.place = place or own_place(name.host, settings)
        self.patience = settings.read_timeout
        self.base = self.place.base
        self._host = Host(self.place, settings, login, resolver=resolver)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._host.close()

    def url(self, kind: str, rest: str) -> str:
        """The address of a manifest, blob, upload or list of this repository."""
        return f"{self.base}/v2/{self.name.repository}/{kind}/{rest}"

    async def manifest(self, target: str) -> tuple[str, bytes]:
        """The manifest that a tag or digest points to: its media type and its very bytes."""
        return await self.repeat(lambda: self._manifest(target))

    async def _manifest(self, target: str) -> tuple[str, bytes]:
        async with self.request("GET", self.url("manifests", target), headers={"Accept": ", ".join(MANIFESTS)}) as got:
            body = await limited(got, MAX_DOCUMENT, redact(str(got.url)))
            return got.content_type, body

    async def put_manifest(self, target: str, media_type: str, body: bytes) -> str:
        """Publish a manifest under a tag or its digest; the subject that the registry took note of, if it does so."""

        async def attempt() -> str:
            url = self.url("manifests", target)
            async with self.request("PUT", url, push=True, headers={"Content-Type": media_type}, data=body) as answer:
                return answer.headers.get("OCI-Subject", "")

        return await self.repeat(attempt)

    async def head(self, target: str) -> tuple[str, str]:
        """Media type and digest of what a tag points to; empty where the registry tells them only with the manifest."""

        async def attempt() -> tuple[str, str]:
            headers = {"Accept": ", ".join(MANIFESTS)}
            async with self.request("HEAD", self.url("manifests", target), headers=headers) as got:
                return got.content_type, got.headers.get("Docker-Content-Digest", "")

        return await self.repeat(attempt)

    async def small(self, digest: str, limit: int = MAX_DOCUMENT) -> bytes:
        """A whole small blob, such as a config; the caller checks its digest."""

        async def attempt() -> bytes:
            async with self.request("GET", self.url("blobs", digest)) as got:
                return await limited(got, limit, redact(str(got.url)))

        return await self.repeat(attempt)

    async def part(self, digest: str, offset: int, length: int) -> bytes:
        """``length`` bytes of a blob, by range; where ranges do not work the beginning is read and passed over."""

        async def attempt() -> bytes:
            data, end = bytearray(), offset + length
            headers = {"Range": f"bytes={offset}-{end - 1}"}
            async with self.request("GET", self.url("blobs", digest), headers=headers) as got:
                skip = offset if got.status == 200 else 0
                async for chunk in got.content.iter_any():
                    data += chunk[skip:]
                    skip = max(0, skip - len(chunk))
                    if len(data) >= length:
                        break
            if len(data) < length:
                raise CorruptData(f"the blob {digest[:19]} of {self.name} is shorter than its manifest says")
            return bytes(data[:length])

        return await self.repeat(attempt) if length > 0 else b""

    async def repeat(self, attempt: Callable[[], Awaitable[T]], landed: Callable[[], int] = lambda: 0) -> T:
        """Until it succeeds, or fails in a way that will not pass."""
        return await persist(self.retry, attempt, landed)

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        push: bool = False,
        headers: Mapping[str, str] | None = None,
        data: Any = None,
        missing_ok: bool = False,
        accept: tuple[int, ...] = (),
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One request; Again for what may pass, PierError for the rest.

        With ``missing_ok`` a 404 is an answer like others; so are the statuses in ``accept``.
        """
        scope = f"repository:{self.name.repository}:{'pull,push' if push else 'pull'}"
        accept = (*accept, 404) if missing_ok else accept
        async with self._host.request(method, url, scope=scope, headers=headers, data=data, accept=accept) as response:
            yield response


def check_plain(name: ImageName) -> None:
    """UsageError for a name that cannot be pushed to."""
    if name.digest:
        raise UsageError(f"{name} names a digest; a push needs a tag", hint=f"Write {name.host}/{name.repository}:tag.")
