"""A model to Hugging Face, or a hub of its shape: large files by Git LFS's batch protocol, then one commit.

The hub's own client hashes each file once more before it sends it, or speaks a storage protocol of its own in a binary
library; here digests are known and files go out from where they lie.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import msgspec

from pierhead.errors import AccessDenied, Conflict, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.registry.wire import origin
from pierhead.sources.outgoing import SAMPLE, Outgoing
from pierhead.sources.sender import Sender

MAX_INLINE = 64 << 20  # bytes of a file that goes into the commit itself
BATCH = 256  # files of one question
AT_ONCE = 4  # requests that carry bytes
TRIES = 5  # commits that come too late, and addresses for uploads that expire
_LFS = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}
T = TypeVar("T")
Report = Callable[[str, int, int], None]  # path, bytes there, bytes in all
Choose = Callable[[frozenset[str]], list[Outgoing]]  # the files to send to a repository that has these paths


class _Sibling(msgspec.Struct):
    rfilename: str


class _Info(msgspec.Struct):
    sha: str = ""
    siblings: list[_Sibling] = []


class _Mode(msgspec.Struct, rename="camel"):
    path: str
    upload_mode: Literal["lfs", "regular"]
    should_ignore: bool = False
    oid: str | None = None


class _Modes(msgspec.Struct):
    files: list[_Mode]


class _Action(msgspec.Struct):
    href: str
    header: dict[str, str | int] = {}


class _Problem(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Object(msgspec.Struct):
    oid: str
    actions: dict[str, _Action] | None = None
    error: _Problem | None = None


class _Batch(msgspec.Struct):
    objects: list[_Object]


class _Committed(msgspec.Struct, rename="camel"):
    commit_oid: str
    commit_url: str = ""


@dataclass(frozen=True)
class Place:
    """Where a model goes; ``create`` makes what is not there."""

    repo: str
    branch: str = "main"
    private: bool = False
    create: bool = True
    message: str = "Upload a model with Pierhead"


@dataclass(frozen=True)
class Pushed:
    """The commit that holds the model; ``sent`` bytes of large files had to go there."""

    commit: str
    url: str
    sent: int


class HubPush:
    """One push; ``choose`` is asked again when the repository changed meanwhile."""

    def __init__(self, sender: Sender, place: Place, choose: Choose, report: Report) -> None:
        self._sender = sender
        self._place = place
        self._choose = choose
        self._report = report
        self._api = f"{sender.address}/api/models/{place.repo}"
        self._branch = quote(place.branch, safe="")
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._sent = 0

    async def run(self) -> Pushed:
        """Send what is not there and commit it at once; Conflict when others keep changing the branch."""
        page = f"{self._sender.address}/{self._place.repo}"
        for _ in range(TRIES):
            info = await self._info()
            files = self._choose(frozenset(s.rfilename for s in info.siblings))
            modes = await self._modes(files)
            changed = [f for f in files if not modes[f.path].should_ignore and not await _same(f, modes[f.path])]
            if not changed:
                return Pushed(info.sha, f"{page}/commit/{info.sha}", self._sent)
            await self._upload([f for f in changed if _large(f, modes[f.path])])
            try:
                made = await self._commit(changed, modes, info.sha)
            except (Conflict, _Lost):
                continue
            return Pushed(made.commit_oid, made.commit_url or f"{page}/commit/{made.commit_oid}", self._sent)
        raise Conflict(f"{page} keeps changing while it is written to", hint="Try again.")

    # --- the repository -------------------------------------------------------------------------------------------

    async def _info(self) -> _Info:
        """What the branch holds now; the repository and the branch are made where that is wanted."""
        url = f"{self._api}/revision/{self._branch}"
        for attempt in (1, 2, 3):
            try:
                return msgspec.convert(await self._sender.json("GET", url), _Info)
            except (NotFound, AccessDenied) as exc:
                branch = exc.data.get("error_code") == "RevisionNotFound"
                if attempt == 3 or exc.data.get("status") == 403 or not self._place.create:
                    raise self._refused(exc, branch) from exc
                await (self._new_branch() if branch else self._new_repository())
            except msgspec.ValidationError as exc:
                raise SourceUnavailable(f"{self._sender.host} does not answer like a model hub: {exc}") from exc
        raise AssertionError

    def _refused(self, exc: PierError, branch: bool) -> PierError:
        repo, host = self._place.repo, self._sender.host
        if branch:
            return NotFound(f"{repo} on {host} has no branch '{self._place.branch}'", hint="Leave out --no-create.")
        if isinstance(exc, NotFound):
            return NotFound(f"{host} has no repository {repo}", hint="Leave out --no-create, or check the name.")
        return AccessDenied(
            f"{repo} on {host} cannot be reached with your token",
            hint="Check the name, and that the token may write there.",
        )

    async def _new_repository(self) -> None:
        owner, _, name = self._place.repo.partition("/")
        body = {"type": "model", "name": name, "organization": owner, "private": self._place.private}
        with contextlib.suppress(Conflict):  # it is there, or somebody else made it just now
            await self._sender.json("POST", f"{self._sender.address}/api/repos/create", body)

    async def _new_branch(self) -> None:
        with contextlib.suppress(Conflict):
            await self._sender.json("POST", f"{self._api}/branch/{self._branch}", {})

    async def _modes(self, files: Sequence[Outgoing]) -> dict[str, _Mode]:
        """How the hub wants each file, and what it has under that name."""
        found: dict[str, _Mode] = {}
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            asked = await asyncio.to_thread(_described, some)
            answer = await self._sender.json("POST", f"{self._api}/preupload/{self._branch}", {"files": asked})
            found |= {mode.path: mode for mode in _read(answer, _Modes, self._sender.host).files}
        if huge := [f.path for f in files if f.path in found and _inline(f, found[f.path]) and f.size > MAX_INLINE]:
            raise SourceUnavailable(f"{self._sender.host} wants {huge[0]} inside a commit, for which it is too large")
        if missing := [f.path for f in files if f.path not in found]:
            raise SourceUnavailable(f"{self._sender.host} does not say how to send {missing[0]}")
        return found

    async def _commit(self, files: Sequence[Outgoing], modes: dict[str, _Mode], parent: str) -> _Committed:
        header = {"summary": self._place.message, "description": ""} | ({"parentCommit": parent} if parent else {})
        lines: list[object] = [{"key": "header", "value": header}]
        for file in files:
            if _large(file, modes[file.path]):
                value = {"path": file.path, "algo": "sha256", "oid": file.sha256, "size": file.size}
                lines.append({"key": "lfsFile", "value": value})
            else:
                content = base64.b64encode(await asyncio.to_thread(file.read)).decode()
                lines.append({"key": "file", "value": {"content": content, "path": file.path, "encoding": "base64"}})
        body = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        url = f"{self._api}/commit/{self._branch}"
        try:
            _, answer = await self._sender.send(
                "POST", url, lambda: body, headers={"Content-Type": "application/x-ndjson"}, once=True
            )
        except SourceUnavailable as exc:  # it may have been made all the same: look before it is sent again
            await self._sender.retry.pause(1, None)
            raise _Lost from exc
        try:
            return msgspec.json.decode(answer, type=_Committed)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise SourceUnavailable(f"{self._sender.host} does not say what it committed") from exc

    # --- large files ----------------------------------------------------------------------------------------------

    async def _upload(self, files: Sequence[Outgoing]) -> None:
        """All objects that the hub lacks; equal ones once."""
        wanted = {f.sha256: f for f in files}
        for attempt in range(1, TRIES + 1):
            failed: list[PierError] = []
            for start in range(0, len(wanted), BATCH):
                some = list(wanted.values())[start : start + BATCH]
                objects = await self._batch(some)
                results = await _gather([self._object(wanted[o.oid], o) for o in objects if o.oid in wanted])
                failed += [r for r in results if isinstance(r, PierError)]
            if not failed:
                return
            if attempt == TRIES or any(not _expired(error) for error in failed):
                raise next((e for e in failed if not _expired(e)), failed[0])

    async def _batch(self, files: Sequence[Outgoing]) -> list[_Object]:
        body = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": f.sha256, "size": f.size} for f in files],
            "hash_algo": "sha256",
            "ref": {"name": self._place.branch},
        }
        url = f"{self._sender.address}/{self._place.repo}.git/info/lfs/objects/batch"
        return _read(await self._sender.json("POST", url, body, _LFS), _Batch, self._sender.host).objects

    async def _object(self, file: Outgoing, found: _Object) -> None:
        if found.error is not None:
            raise UsageError(f"{self._sender.host} does not take {file.path}: {found.error.message[:300]}")
        upload = (found.actions or {}).get("upload")
        if upload is None:
            self._report(file.path, file.size, file.size)
            return
        if "chunk_size" in upload.header:
            await self._parts(file, upload)
        else:
            headers = {k: str(v) for k, v in upload.header.items() if k.lower() != "authorization"}
            await self._put(file, upload.href, 0, file.size, {}, headers)
        self._sent += file.size
        verify = (found.actions or {}).get("verify")
        if verify is not None and origin(verify.href) == origin(self._sender.address):
            await self._sender.json("POST", verify.href, {"oid": file.sha256, "size": file.size}, _LFS)

    async def _parts(self, file: Outgoing, upload: _Action) -> None:
        """A large object in parts, some at a time; the hub puts them together when all are there."""
        step = int(upload.header["chunk_size"]) if str(upload.header["chunk_size"]).isdigit() else 0
        urls = [str(url) for _, url in sorted((int(n), url) for n, url in upload.header.items() if n.isdigit())]
        if step <= 0 or len(urls) != -(-file.size // step):
            raise SourceUnavailable(f"{self._sender.host} gives no usable addresses for the parts of {file.path}")
        done: dict[int, int] = {}

        async def one(number: int, url: str) -> str:
            start = number * step
            etag = await self._put(file, url, start, min(start + step, file.size), done, {})
            if not etag:
                raise SourceUnavailable(f"the storage of {self._sender.host} does not confirm part {number + 1}")
            return etag

        results = await _gather([one(number, url) for number, url in enumerate(urls)])
        parts: list[dict[str, object]] = []
        for number, etag in enumerate(results):
            if isinstance(etag, PierError):
                raise etag
            parts.append({"partNumber": number + 1, "etag": etag})
        await self._sender.json("POST", upload.href, {"oid": file.sha256, "parts": parts}, _LFS)

    async def _put(
        self, file: Outgoing, url: str, start: int, end: int, done: dict[int, int], headers: dict[str, str]
    ) -> str:
        def sent(count: int) -> None:
            done[start] = count
            self._report(file.path, sum(done.values()), file.size)

        async with self._slots:
            length = {"Content-Length": str(end - start)}
            answer, _ = await self._sender.send(
                "PUT", url, lambda: file.stream(start, end, sent), headers={**headers, **length}
            )
        return answer.get("ETag", "")


class _Lost(Exception):  # control flow: whether the hub committed is not known
    """The answer to a commit did not come."""


async def _gather(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T | PierError]:
    """Run all; a PierError is a result like others, so that what is under way can end. Others stop all."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        results = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    found: list[T | PierError] = []
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, PierError):
            raise result
        found.append(result)
    return found


def _read(answer: object, kind: type[T], host: str) -> T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as exc:
        raise SourceUnavailable(f"{host} does not answer like a model hub: {exc}") from exc


def _described(files: Sequence[Outgoing]) -> list[dict[str, str | int]]:
    return [{"path": f.path, "sample": base64.b64encode(f.read(SAMPLE)).decode(), "size": f.size} for f in files]


def _large(file: Outgoing, mode: _Mode) -> bool:
    return mode.upload_mode == "lfs" and file.size > 0  # storage takes no empty objects


def _inline(file: Outgoing, mode: _Mode) -> bool:
    return not mode.should_ignore and not _large(file, mode)


async def _same(file: Outgoing, mode: _Mode) -> bool:
    """Whether the hub has these very bytes under that name."""
    if not mode.oid:
        return False
    return mode.oid == (file.sha256 if _large(file, mode) else await asyncio.to_thread(file.git_sha1))


def _expired(error: PierError) -> bool:
    """Whether a storage refused an address that the hub gave: a new one may do."""
    return not error.data.get("ours", True) and error.data.get("status") in (400, 401, 403, 404)
