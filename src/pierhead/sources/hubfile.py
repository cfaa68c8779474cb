"""Files of hubs, whichever: how a planned one is read, fetched and checked; plans nothing."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pierhead.errors import AccessDenied, CorruptData
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.http import Http, Remote, is_loopback
from pierhead.sources.select import Part

MAX_GIT = 16 << 20  # bytes of a file that git itself keeps; hubs want larger ones in LFS
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class _At:
    remote: Remote
    git_sha1: str = ""  # of a small file that is kept in git itself


def planned(part: Part, key: str, remote: Remote, git_sha1: str = "") -> RemoteFile:
    """A file of the chosen model; what the hub tells of its content is checked when it is fetched."""
    return RemoteFile(
        name=part.name,
        key=key,
        size=remote.size,
        digest=remote.digest,
        role=part.role,
        opaque=_At(remote, git_sha1),
        format=part.format,
    )


class HubFiles:
    """What all hubs share; ``address`` is where the token may go."""

    def __init__(self, http: Http, address: str, token: str = "") -> None:
        self.http = http
        self.address = address
        self.token = token

    @property
    def host(self) -> str:
        return urlsplit(self.address).hostname or self.address

    def token_for(self, url: str) -> str:
        """The token, except over plain http to another machine."""
        parts = urlsplit(url)
        return self.token if parts.scheme == "https" or is_loopback(parts.hostname or "") else ""

    def denied(self, file: RemoteFile, exc: AccessDenied) -> AccessDenied:
        """The hub's refusal to give a file, in the user's words."""
        return exc

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        at: _At = file.opaque
        try:
            return await self.http.read(at.remote, offset, length)
        except AccessDenied as exc:
            raise self.denied(file, exc) from exc

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        at: _At = file.opaque
        try:
            if at.git_sha1 and (file.size or 0) <= MAX_GIT:
                await self._small(file, at, sink)
            else:
                await self.http.download(at.remote, sink)
        except AccessDenied as exc:
            raise self.denied(file, exc) from exc

    async def _small(self, file: RemoteFile, at: _At, sink: Sink) -> None:
        """A file that git keeps itself: checked against its git object id."""
        data = await self.http.whole(at.remote.url, token=at.remote.token, limit=MAX_GIT)
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if found != at.git_sha1:
            raise CorruptData(f"{file.name} does not match the id that {self.host} gives", hint="Try again.")
        if sink.offset:
            await sink.restart()
        await sink.write(data)
