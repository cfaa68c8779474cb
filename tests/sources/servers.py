"""Servers that behave like the real ones, and worse; tiny models to serve; a puller to kill."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import os
import random
import re
import struct
import zipfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from pierhead import events
from pierhead.config import SourceSettings
from pierhead.paths import Paths
from pierhead.sources.http import Retry
from pierhead.sources.pull import inspect_remote, pull
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord

FAST = Retry(attempts=4, first=0.01, most=0.05)
LFS = (".gguf", ".safetensors", ".onnx", ".onnx_data", "tokenizer.json")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_gguf(size: int = 300_000, seed: int = 1, *, noise: bool = True, **metadata: Any) -> bytes:
    """A valid GGUF of about ``size`` bytes: a llama without layers; ``noise`` keeps it from being compressed."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = {"general.architecture": "llama", "general.name": "Tiny", "llama.context_length": 512, **metadata}
    body = b""
    for key, value in pairs.items():
        body += text(key)
        body += struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    elements = max(64, size // 4)
    tensors = 1
    body += text(f"token_embd.weight.{seed}") + struct.pack("<IQIQ", 1, elements, 0, 0)
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(pairs)) + body
    head += bytes(-len(head) % 32)
    filler = random.Random(seed)
    return head + (filler.randbytes(elements * 4) if noise else bytes([seed % 251]) * (elements * 4))


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Served:
    """One file of a server, and how badly the server behaves with it."""

    data: bytes = b""
    etag: str | None = '"v1"'
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)  # answered first, one per request
    headers: dict[str, str] = field(default_factory=dict)
    drops: list[int] = field(default_factory=list)  # cut the connection after so many bytes, one per long request
    hold: tuple[int, asyncio.Event] | None = None  # stop after so many bytes until the event
    chunked: bool = False
    redirect: str = ""
    gate: Callable[[web.Request], web.Response | None] | None = None


@dataclass
class Server:
    """A web server of files by path; it remembers every request and counts the bytes of bodies it sent."""

    files: dict[str, Served] = field(default_factory=dict)
    requests: list[web.Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""
    reached: asyncio.Event = field(default_factory=asyncio.Event)  # a hold was reached
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None  # instead of files

    def add(self, path: str, data: bytes = b"", **behaviour: Any) -> str:
        self.files[path] = Served(data, **behaviour)
        return self.url + path

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self.answer is not None:
            return await self.answer(request)
        self.requests.append(request)
        path = request.path
        file = self.files.get(path)
        if file is None:
            return web.Response(status=404)
        if file.gate and (refused := file.gate(request)) is not None:
            return refused
        if file.statuses:
            return web.Response(status=file.statuses.pop(0), headers=file.headers)
        if file.redirect:
            return web.Response(status=302, headers={"Location": file.redirect, **file.headers})
        return await self._body(request, file)

    async def _body(self, request: web.Request, file: Served) -> web.StreamResponse:
        headers = {"ETag": file.etag} if file.etag else {}
        if file.ranges:
            headers["Accept-Ranges"] = "bytes"
        start, end = 0, len(file.data)
        status = 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")) if file.ranges else None
        if asked and request.headers.get("If-Range", file.etag) == file.etag:
            start = int(asked[1])
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            if start >= len(file.data):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(file.data)}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(file.data)}"
        response = web.StreamResponse(status=status, headers={**headers, **file.headers})
        if file.chunked:
            response.enable_chunked_encoding()
        else:
            response.content_length = end - start
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            if request.method == "HEAD":
                return response
            await self._pour(request, response, file, start, end)
        return response

    async def _pour(
        self, request: web.Request, response: web.StreamResponse, file: Served, start: int, end: int
    ) -> None:
        ours = request.headers.get("User-Agent") == "pierhead"  # not uv or pip
        long = ours and end - start > 100_000
        drop = file.drops.pop(0) if long and file.drops else None
        at = start
        while at < end:
            step = min(16384, end - at)
            if file.hold and at < file.hold[0] <= at + step and not file.hold[1].is_set() and long:
                self.reached.set()
                await file.hold[1].wait()
            if drop is not None and at - start + step > drop:
                assert request.transport
                request.transport.close()
                return
            await response.write(file.data[at : at + step])
            at += step
            if ours:
                self.sent[request.path] = self.sent.get(request.path, 0) + step
        await response.write_eof()

    def asked(self, path: str) -> list[str]:
        """The Range headers of requests for a path."""
        return [r.headers.get("Range", "") for r in self.requests if r.path == path]


@contextlib.asynccontextmanager
async def serving(ssl_context: Any = None) -> AsyncGenerator[Server]:
    server = Server()
    runner = web.AppRunner(_app(server.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"{'https' if ssl_context else 'http'}://127.0.0.1:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()


def _app(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.Application:
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", handle)
    return app


@dataclass
class FakeHub:
    """A hub of Hugging Face's shape: an API, LFS files on another host, small files of its own."""

    server: Server
    cdn: Server

    def add(
        self,
        repo: str,
        files: dict[str, bytes],
        *,
        commit: str = COMMIT,
        revisions: tuple[str, ...] = ("main",),
        token: str = "",
        gated: bool = False,
        lie: dict[str, str] | None = None,
        bare: bool = False,  # a list without hashes, as mirrors have
    ) -> None:
        gate = _gate(token, gated) if token else None
        siblings: list[dict[str, Any]] = [{"rfilename": ".gitattributes", "size": 10, "blobId": "0" * 40}]
        for name, data in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            place = f"/{repo}/resolve/{commit}/{name}"
            if name.endswith(LFS):
                sha = (lie or {}).get(name) or hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 134}
                self.cdn.add(f"/lfs/{sha}", data)
                told = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
                target = f"{self.cdn.url}/lfs/{sha}?X-Amz-Signature=secret"
                self.server.add(place, redirect=target, gate=gate, headers=told)
            else:
                self.server.add(place, data, gate=gate, etag=f'"{blob}"')
            siblings.append({"rfilename": name} if bare else sibling)
        answer = {"id": repo, "sha": commit, "siblings": siblings, "gated": "manual" if gated else False}
        for revision in (*revisions, commit):
            api_gate = gate if not gated else None  # a gated repository shows its list of files to everyone
            path = f"/api/models/{repo}/revision/{revision}"
            self.server.add(path, web.json_response(answer).body, gate=api_gate)  # type: ignore[arg-type]


@dataclass
class FakeScope:
    """ModelScope: a list of files with hashes and commits, and files that lie on another host."""

    server: Server
    cdn: Server
    cut: int = 3000

    def add(self, repo: str, files: dict[str, bytes], *, commit: str = COMMIT, token: str = "") -> None:
        gate = _scope_gate(token) if token else None
        rows: list[dict[str, Any]] = []
        for number, (name, data) in enumerate(files.items()):
            sha = hashlib.sha256(data).hexdigest()
            rows.append(
                {
                    "Path": name, "Name": name.rsplit("/", 1)[-1], "Size": len(data), "Sha256": sha, "Type": "blob",
                    "Revision": commit if number == 0 else "e" * 40, "CommittedDate": 1_700_000_000 - number,
                    "IsLFS": len(data) > 65536, "Mode": "100644", "InCheck": False,
                }
            )  # fmt: skip
            self.cdn.add(f"/oss/{sha}", data)
        folders = {name.rpartition("/")[0] for name in files if "/" in name}
        rows += [{"Path": f, "Name": f, "Size": 0, "Sha256": "", "Type": "tree", "Revision": ""} for f in folders]

        def listed(request: web.Request) -> web.Response | None:
            root, whole = request.query.get("Root", ""), request.query["Recursive"] == "True"
            if gate and (refused := gate(request)):
                return refused
            if request.query["Revision"] not in ("master", commit):
                return web.json_response({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
            inside = [r for r in rows if not root or r["Path"].startswith(f"{root}/")]
            near = [r for r in inside if r["Path"].count("/") == (root.count("/") + 1 if root else 0)]
            shown = (inside if whole else near)[: self.cut]
            return web.json_response({"Code": 200, "Data": {"Files": shown}, "Success": True, "Message": "success"})

        def fetched(request: web.Request) -> web.Response | None:
            if gate and (refused := gate(request)):
                return refused
            sha = hashlib.sha256(files[request.query["FilePath"]]).hexdigest()
            assert request.query["Revision"] == commit
            target = f"{self.cdn.url}/oss/{sha}?Signature=secret"
            return web.Response(status=302, headers={"Location": target})

        self.server.add(f"/api/v1/models/{repo}/repo/files", gate=listed)
        self.server.add(f"/api/v1/models/{repo}/repo", gate=fetched)


def _scope_gate(token: str) -> Callable[[web.Request], web.Response | None]:
    def check(request: web.Request) -> web.Response | None:
        both = (
            request.headers.get("Authorization") == f"Bearer {token}" and request.cookies.get("m_session_id") == token
        )
        return None if both else web.json_response({"Code": 10010101003, "Success": False}, status=403)

    return check


def _gate(token: str, gated: bool) -> Callable[[web.Request], web.Response | None]:
    code = "GatedRepo" if gated else "RepoNotFound"

    def check(request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization")
        if given == f"Bearer {token}":
            return None
        status = 403 if given and gated else 401
        return web.Response(status=status, headers={"X-Error-Code": code})

    return check


def make_wheel(
    name: str,
    members: dict[str, bytes],
    *,
    version: str = "1.0",
    requires: tuple[str, ...] = (),
    stored: bool = False,
    record: bool = True,
) -> tuple[str, bytes]:
    """A real wheel: its file name and bytes."""
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {r}" for r in requires]
    files = {os.path.normpath(f"{plain}/{path}"): data for path, data in members.items()}
    files[f"{info}/METADATA"] = ("\n".join(lines) + "\n").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{path},sha256={_b64(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = ("\n".join([*rows, f"{info}/RECORD,,"]) if record else "").encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return f"{plain}-{version}-py3-none-any.whl", out.getvalue()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@dataclass
class FakeIndex:
    """A package index (PEP 503)."""

    server: Server

    @property
    def simple(self) -> str:
        return f"{self.server.url}/simple/"

    def add(self, name: str, wheel: tuple[str, bytes], *, sha256: str | None = None, **behaviour: Any) -> str:
        filename, data = wheel
        path = f"/files/{filename}"
        self.server.add(path, data, **behaviour)
        sha256 = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
        fragment = f"#sha256={sha256}" if sha256 else ""
        page = f'<!DOCTYPE html><html><body><a href="{path}{fragment}">{filename}</a></body></html>'
        html = {"headers": {"Content-Type": "text/html"}, "gate": behaviour.get("gate"), "etag": None, "ranges": False}
        self.server.add(f"/simple/{name}/", page.encode(), **html)
        return path


@dataclass
class Puller:
    """``pull`` with the folders, settings and environment of one throw-away installation."""

    paths: Paths
    settings: SourceSettings
    env: dict[str, str]
    store: Store
    events: list[events.AnyEvent] = field(default_factory=list)
    landed: asyncio.Event = field(default_factory=asyncio.Event)  # when ``mark`` bytes are in the store
    mark: int = 1 << 60

    def listen(self, event: events.AnyEvent) -> None:
        self.events.append(event)
        if isinstance(event, events.PullProgress) and event.done >= self.mark:
            self.landed.set()

    async def __call__(self, reference: str, **options: Any) -> ModelRecord:
        async with asyncio.timeout(60):
            return await pull(
                reference,
                store=self.store,
                settings=options.pop("settings", self.settings),
                paths=self.paths,
                listener=self.listen,
                env=self.env,
                retry=options.pop("retry", FAST),
                **options,
            )

    async def inspect(self, reference: str) -> dict[str, Any]:
        async with asyncio.timeout(60):
            return await inspect_remote(reference, settings=self.settings, paths=self.paths, env=self.env, retry=FAST)

    def of(self, kind: type[events.AnyEvent]) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind)]

    def content(self, record: ModelRecord, number: int = 0) -> bytes:
        return self.store.blob_path(record.files[number].digest).read_bytes()

    def leftovers(self) -> list[str]:
        """What an unfinished transfer left."""
        ingests = [p.name for p in (self.store.root / "ingest").glob("*.part") if p.stat().st_size]
        wheels = self.paths.cache / "wheels"
        return ingests + (
            [p.name for p in wheels.rglob("*") if p.is_file() and p.suffix != ".lock"] if wheels.exists() else []
        )


CHILD = """
import asyncio, os, sys, msgspec, resource
from pathlib import Path
from pierhead import events
from pierhead.config import SourceSettings
from pierhead.errors import PierError
from pierhead.paths import resolve
from pierhead.sources.http import Retry
from pierhead.sources.pull import pull
from pierhead.store.layout import Store

def say(event):
    sys.stdout.buffer.write(events.encode(event) + b"\\n")
    sys.stdout.buffer.flush()

limit = int(os.environ.get("CHILD_FSIZE", "0"))
if limit:
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
paths = resolve(os.environ)
settings = msgspec.json.decode(os.environ["CHILD_SETTINGS"], type=SourceSettings)
try:
    asyncio.run(pull(sys.argv[1], store=Store.open(paths.store), settings=settings, paths=paths, listener=say,
                     env=os.environ, retry=Retry(4, 0.01, 0.05)))
except PierError as error:
    say(events.Failed(error=error.to_dict()))
    sys.exit(error.exit_code)
"""


@dataclass
class Child:
    """A puller in a process of its own."""

    process: asyncio.subprocess.Process

    async def events(self) -> list[events.AnyEvent]:
        async with asyncio.timeout(60):
            out, _ = await self.process.communicate()
        return [events.decode(line) for line in out.splitlines()]

    async def next(self) -> events.AnyEvent:
        assert self.process.stdout
        async with asyncio.timeout(60):
            return events.decode(await self.process.stdout.readline())

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()
