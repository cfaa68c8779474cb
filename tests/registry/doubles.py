"""A registry that misbehaves as it is told; it counts requests and remembers what was sent to it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from aiohttp import web

DATA = random.Random(7).randbytes(300_000)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
Answer = web.StreamResponse | None
Handler = Callable[["Double", web.Request], "Answer | Awaitable[Answer]"]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


OCI = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def manifest_of(*layers: bytes, config: bytes = b"{}", kind: str = "", **layer: object) -> dict[str, Any]:
    """A manifest of Docker's kind; keywords change each layer's descriptor."""
    kind = kind or "application/vnd.docker.ai.gguf.v3"
    about = {"mediaType": "application/vnd.docker.ai.model.config.v0.1+json"}
    return {
        "schemaVersion": 2,
        "mediaType": OCI,
        "config": {**about, "digest": digest_of(config), "size": len(config)},
        "layers": [{"mediaType": kind, "digest": digest_of(x), "size": len(x), **layer} for x in layers],
    }


class Double:
    """Serves its manifests and blobs, else ``data``; ``behave`` may answer instead, or return None to let it."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}  # by tag and by digest
        self.behave: Handler | None = None
        self.requests: list[web.Request] = []
        self.sent = 0  # bytes of blobs
        self.ranges = True
        self.host = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if self.behave is not None:
            said = self.behave(self, request)
            said = await said if said is not None and not isinstance(said, web.StreamResponse) else said
            if said is not None:
                return said
        target = request.path.rpartition("/")[2]
        if "/manifests/" in request.path:
            found = self.manifests.get(target)
            kind = INDEX if found and b'"manifests"' in found else OCI
            return web.Response(body=found, content_type=kind) if found else web.Response(status=404)
        if "/referrers/" in request.path or (self.manifests and target not in self.blobs):
            return web.Response(status=404)
        return await self.body(request)

    def add(self, tag: str, manifest: object, *blobs: bytes) -> str:
        """Publish a manifest and what it names; its digest."""
        body = json.dumps(manifest).encode()
        self.manifests[tag] = self.manifests[digest_of(body)] = body
        self.blobs.update({digest_of(blob): blob for blob in (*blobs, b"{}")})
        return digest_of(body)

    def content(self, request: web.Request) -> bytes:
        """What there is at a path."""
        return self.blobs.get(request.path.rpartition("/")[2], self.data)

    def wanted(self, request: web.Request) -> tuple[int, int]:
        """The part that a request asks for: first byte, and the one after the last."""
        size = len(self.content(request))
        asked = request.headers.get("Range")
        if not asked or not self.ranges:
            return 0, size
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1, size)

    async def body(
        self,
        request: web.Request,
        *,
        cut: int | None = None,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
    ) -> web.StreamResponse:
        """The part that is asked for; after ``cut`` bytes of it the connection breaks."""
        start, end = self.wanted(request)
        content = self.content(request)
        part = content[start:end] if data is None else data
        found = {"Content-Length": str(len(part)), **(headers or {})}
        status = 200
        if request.headers.get("Range") and self.ranges:
            status = 206
            found = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}", **found}
        response = web.StreamResponse(status=status, headers=found)
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            await response.write(part[:cut])
            self.sent += len(part[:cut])
        if cut is not None:
            break_off(request)
        return response


def break_off(request: web.Request) -> None:
    """Cut the connection."""
    if request.transport is not None:
        request.transport.abort()


@contextlib.asynccontextmanager
async def serving(double: Double, host: str = "127.0.0.1", ssl_context: Any = None) -> AsyncGenerator[Double]:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{rest:.*}", double.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, 0, ssl_context=ssl_context)
    await site.start()
    double.host = f"{host}:{runner.addresses[0][1]}"
    try:
        yield double
    finally:
        await runner.cleanup()


def guarded(realm: str, *, token: str = "t0ken", password: str = "", refresh: str = "", lives: int = 0) -> Handler:
    """A registry that wants a token from ``realm`` (``{base}`` is itself).

    ``password`` is the only one that is taken; a token is good for ``lives`` requests (0: for ever).
    """
    made: list[str] = []
    uses: dict[str, int] = {}

    def behave(double: Double, request: web.Request) -> Answer:
        if request.path == "/token":
            given = base64.b64decode(request.headers.get("Authorization", "").removeprefix("Basic ") or b"").decode()
            if password and given.partition(":")[2] != password:
                return web.Response(status=401)
            made.append(f"{token}{len(made) or ''}" if lives else token)
            return web.json_response({"token": made[-1], **({"refresh_token": refresh} if refresh else {})})
        shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
        uses[shown] = uses.get(shown, 0) + 1
        good = shown in made if lives else shown == "t0ken"
        if good and (not lives or uses[shown] <= lives):
            return None
        scope = ',scope="repository:a/b:pull"' if request.path != "/v2/" else ""
        challenge = (
            f'Bearer realm="{realm.format(base=double.host, port=double.host.rpartition(":")[2])}",service="s"{scope}'
        )
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    return behave
