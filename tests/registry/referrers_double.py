"""A small registry in memory that knows the referrers API, or not; a test may spoil its answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Callable

from aiohttp import web

INDEX = "application/vnd.oci.image.index.v1+json"


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Double:
    """``api``: it lists referrers itself, ``page`` of them at a time; ``behave`` answers first where it wants to."""

    def __init__(self, *, api: bool = True, page: int = 100, filters: bool = True) -> None:
        self.api, self.page, self.filters = api, page, filters
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}  # by digest and by tag
        self.behave: Callable[[web.Request], web.Response | None] | None = None
        self.seen: list[str] = []
        self.base = ""
        self._partial: dict[str, bytes] = {}

    def put(self, kind: str, body: bytes, tag: str = "") -> str:
        for target in {digest_of(body), tag} - {""}:
            self.manifests[target] = (kind, body)
        return digest_of(body)

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append(f"{request.method} {request.path}")
        if self.behave is not None and (said := self.behave(request)) is not None:
            return said
        kind, _, rest = request.path.partition("/a/b/")[2].partition("/")
        if kind == "manifests":
            return await self._manifest(request, rest)
        if kind == "blobs":
            return await self._blob(request, rest)
        return self._referrers(request, rest) if kind == "referrers" and self.api else web.Response(status=404)

    async def _manifest(self, request: web.Request, target: str) -> web.Response:
        if request.method == "PUT":
            body = await request.read()
            self.put(request.content_type, body, "" if target.startswith("sha256:") else target)
            subject = json.loads(body).get("subject")
            return web.Response(status=201, headers={"OCI-Subject": subject["digest"]} if subject and self.api else {})
        if target not in self.manifests:
            return web.Response(status=404)
        kind, body = self.manifests[target]
        return web.Response(body=body, content_type=kind)

    async def _blob(self, request: web.Request, rest: str) -> web.Response:
        if request.method == "POST":
            location = f"{request.path}{len(self._partial)}"
            self._partial[location] = b""
            return web.Response(status=202, headers={"Location": location})
        if request.method == "PATCH":
            self._partial[request.path] += await request.read()
            return web.Response(status=202)
        if request.method == "PUT":
            data = self._partial[request.path] + await request.read()
            if digest_of(data) != request.query["digest"]:
                return web.Response(status=400)
            self.blobs[request.query["digest"]] = data
            return web.Response(status=201)
        found = self.blobs.get(rest)
        return web.Response(status=404) if found is None else web.Response(body=found)

    def _referrers(self, request: web.Request, digest: str) -> web.Response:
        entries = []
        for target, (kind, body) in self.manifests.items():
            document = json.loads(body)
            if target.startswith("sha256:") and (document.get("subject") or {}).get("digest") == digest:
                artifact = document.get("artifactType") or document["config"]["mediaType"]
                entries.append({"mediaType": kind, "digest": target, "size": len(body), "artifactType": artifact})
        headers: dict[str, str] = {}
        wanted = request.query.get("artifactType")
        if wanted and self.filters:
            entries = [e for e in entries if e["artifactType"] == wanted]
            headers["OCI-Filters-Applied"] = "artifactType"
        start = int(request.query.get("last", "0"))
        if start + self.page < len(entries):
            headers["Link"] = f'<{request.path}?last={start + self.page}>; rel="next"'
        page = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries[start : start + self.page]}
        return web.Response(body=json.dumps(page).encode(), content_type=INDEX, headers=headers)


@contextlib.asynccontextmanager
async def serving(double: Double) -> AsyncGenerator[Double]:
    """On a loopback port until the block ends."""
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", double.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    double.base = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield double
    finally:
        await runner.cleanup()
