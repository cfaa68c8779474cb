"""Models behind a plain address; its ETag, date and size keep parts of different files from being mixed."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from pierhead.errors import CorruptData
from pierhead.refs import Reference, default_name
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.http import Http, Remote, redact
from pierhead.store.media import format_of


class Web:
    """Any web server."""

    def __init__(self, http: Http) -> None:
        self._http = http
        self._started: set[str] = set()

    async def plan(self, reference: Reference) -> PullPlan:
        remote = await self._http.probe(reference.path, digest=reference.digest)
        if remote.size == 0:
            raise CorruptData(f"{redact(reference.path)} is empty")
        place = redact(reference.path)
        key = reference.digest or f"{place} {remote.size} {remote.validator}"
        file = RemoteFile(_file_name(remote), key, remote.size, reference.digest, opaque=remote)
        source = place + (f"#sha256={reference.digest.removeprefix('sha256:')}" if reference.digest else "")
        return PullPlan(default_name(reference), source, (file,))

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        return await self._http.read(file.opaque, offset, length)

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        remote: Remote = file.opaque
        known = bool(remote.validator or remote.digest)
        if sink.offset and not known and file.key not in self._started:
            await sink.restart()  # nothing tells whether these are bytes of the same file
        self._started.add(file.key)
        await self._http.download(remote, sink)


def _file_name(remote: Remote) -> str:
    """The server's name for the file, else the last part of the address; a .gguf where it is not one of Whisper's."""
    given = remote.filename.replace("\\", "/")
    name = PurePosixPath(given or unquote(urlsplit(remote.url).path)).name
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:200] or "model"
    return clean if clean.lower().endswith(".gguf") or format_of(clean) == "ggml" else f"{clean}.gguf"
