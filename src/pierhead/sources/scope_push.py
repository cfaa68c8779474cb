"""A model to ModelScope: large files by its batch protocol, each in one request, then one commit.

Its API knows no parts, no resuming inside a file and no guard against a change meanwhile; what it has already is passed
over.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from pierhead.errors import Conflict, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.refs import Reference
from pierhead.sources.hub_push import Choose, Place, Pushed, Report
from pierhead.sources.modelscope import ModelScope
from pierhead.sources.outgoing import Outgoing
from pierhead.sources.sender import Sender
from pierhead.sources.variant import name_of

PUBLIC, PRIVATE = 5, 1
INLINE = 64 << 10  # bytes of a file that goes into the commit itself
_ALWAYS_INLINE = frozenset({"readme.md", ".gitattributes", "configuration.json", "config.json"})
_ALWAYS_LARGE = (".safetensors", ".onnx", ".model", ".bin", ".tar", ".zip", ".gz", ".npz", ".npy")
AT_ONCE = 2


class _Action(msgspec.Struct):
    href: str = ""


class _Object(msgspec.Struct):
    oid: str
    actions: dict[str, _Action] | None = None


class _Batch(msgspec.Struct):
    objects: list[_Object] = []


class _Wrapped(msgspec.Struct, rename="pascal"):
    data: _Batch | None = None


class ScopePush:
    """One push; ``scope`` lists what is there."""

    def __init__(self, sender: Sender, scope: ModelScope, place: Place, choose: Choose, report: Report) -> None:
        self._sender = sender
        self._scope = scope
        self._place = place
        self._choose = choose
        self._report = report
        self._api = f"{sender.address}/api/v1/repos/models/{place.repo}"
        self._sent = 0

    async def run(self) -> Pushed:
        there = await self._there()
        files = self._choose(frozenset(there))
        page = f"{self._sender.address}/models/{self._place.repo}"
        changed = [f for f in files if there.get(f.path) != f.sha256]
        if not changed:
            return Pushed("", page, 0)
        await self._upload([f for f in changed if _large(f)])
        await self._commit(changed)
        return Pushed("", page, self._sent)

    async def _there(self) -> dict[str, str]:
        """What the branch holds, by path; the repository is made where that is wanted."""
        reference = Reference("ms", self._place.repo, revision=self._place.branch)
        for attempt in (1, 2):
            try:
                return {f.path: f.sha256 for f in await self._scope.files(reference, self._place.branch)}
            except NotFound:
                if attempt == 2 or not self._place.create:
                    raise
                await self._new_repository()
        raise AssertionError

    async def _new_repository(self) -> None:
        owner, _, name = self._place.repo.partition("/")
        body = {"Path": owner, "Name": name, "Visibility": PRIVATE if self._place.private else PUBLIC}
        with contextlib.suppress(Conflict):
            _accepted(await self._sender.json("POST", f"{self._sender.address}/api/v1/models", body), "the repository")

    async def _upload(self, files: Sequence[Outgoing]) -> None:
        wanted = {f.sha256: f for f in files}
        if not wanted:
            return
        body = {"operation": "upload", "objects": [{"oid": f.sha256, "size": f.size} for f in wanted.values()]}
        answer = await self._sender.json("POST", f"{self._api}/info/lfs/objects/batch", body)
        try:
            found = msgspec.convert(answer, _Wrapped).data or msgspec.convert(answer, _Batch)
        except msgspec.ValidationError as exc:
            raise SourceUnavailable(f"{self._sender.host} does not answer like ModelScope: {exc}") from exc
        urls = {o.oid: o.actions["upload"].href for o in found.objects if o.actions and o.actions.get("upload")}
        slots = asyncio.Semaphore(AT_ONCE)
        try:
            async with asyncio.TaskGroup() as group:
                for oid, file in wanted.items():
                    if urls.get(oid):
                        group.create_task(self._put(file, urls[oid], slots))
                    else:
                        self._report(file.path, file.size, file.size)
        except ExceptionGroup as failed:  # of files that went together one error is told
            first = next((e for e in failed.exceptions if isinstance(e, PierError)), None)
            if first is None:
                raise
            raise first from first.__cause__

    async def _put(self, file: Outgoing, url: str, slots: asyncio.Semaphore) -> None:
        def sent(count: int) -> None:
            self._report(file.path, count, file.size)

        async with slots:
            _, answer = await self._sender.send(
                "PUT",
                url,
                lambda: file.stream(0, file.size, sent),
                headers={"Content-Length": str(file.size)},
                trusted=_own(url, self._sender.host),
            )
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            _accepted(msgspec.json.decode(answer), file.path)
        self._sent += file.size

    async def _commit(self, files: Sequence[Outgoing]) -> None:
        actions = await asyncio.to_thread(lambda: [_action(file) for file in files])
        body = {"commit_message": self._place.message, "actions": actions}
        url = f"{self._api}/commit/{quote(self._place.branch, safe='')}"
        _accepted(await self._sender.json("POST", url, body), "the commit")


def _action(file: Outgoing) -> dict[str, str | int]:
    large = _large(file)
    return {
        "action": "create",
        "path": file.path,
        "type": "lfs" if large else "normal",
        "size": file.size,
        "sha256": file.sha256 if large else "",
        "content": "" if large else base64.b64encode(file.read()).decode(),
        "encoding": "" if large else "base64",
    }


def _large(file: Outgoing) -> bool:
    if name_of(file.path).lower() in _ALWAYS_INLINE or file.size == 0:
        return False
    return file.size > INLINE or file.path.lower().endswith(_ALWAYS_LARGE)


def _own(url: str, host: str) -> bool:
    """Whether an address is the service's own, under another name of its domain: such ones want the token too."""
    domain = host.removeprefix("www.")
    found = urlsplit(url)
    return found.scheme == "https" and (found.hostname or "").endswith(f".{domain}") and "." in domain


def _accepted(answer: Any, what: str) -> None:
    """The service says no with status 200, too."""
    if isinstance(answer, dict) and (answer.get("Success") is False or answer.get("Code") not in (None, 200, "200")):  # pyright: ignore[reportUnknownMemberType]
        said = str(answer.get("Message") or answer.get("Code"))[:300]  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        raise UsageError(f"ModelScope does not take {what}: {said}", hint="See what it says, then try again.")
