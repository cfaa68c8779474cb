"""Models as Ollama makes them: manifest and blobs, its folder on disk, and a registry that behaves like its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

TYPE = "application/vnd.ollama.image."
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def encoded(value: Any) -> bytes:
    """JSON as Go's encoder writes it: compact, with a line's end."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


@dataclass
class OllamaModel:
    """Layers in order as (type, content); ``spoil`` changes the manifest's document before it is written."""

    layers: list[tuple[str, bytes]]
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    spoil: Callable[[dict[str, Any]], None] = lambda document: None

    @property
    def config_bytes(self) -> bytes:
        about = {"model_format": "gguf", "model_family": "llama", "model_families": ["llama"], "model_type": "134.52M"}
        end = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
        return encoded({**about, "file_type": "Q4_1", **self.config, **end})

    @property
    def manifest(self) -> bytes:
        def part(kind: str, data: bytes) -> dict[str, Any]:
            return {"mediaType": kind, "digest": digest(data), "size": len(data)}

        layers = [part(kind if "/" in kind else TYPE + kind, data) for kind, data in self.layers]
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER,
            "config": part(CONFIG, self.config_bytes),
            "layers": layers,
        }
        self.spoil(document)
        return encoded(document)

    @property
    def blobs(self) -> dict[str, bytes]:
        return {digest(data): data for data in (self.config_bytes, *(data for _, data in self.layers))}

    def write(self, root: Path, name: str = "registry.ollama.ai/library/tiny/latest") -> Path:
        """Put it into a folder as Ollama keeps it; the manifest's path."""
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        for key, data in self.blobs.items():
            (root / "blobs" / key.replace(":", "-")).write_bytes(data)
        path = root / "manifests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.manifest)
        return path


@dataclass
class OllamaRegistry:
    """``registry.ollama.ai`` in small: manifests by name, blobs behind a redirect to storage on another origin.

    With ``token`` every request to the registry itself wants it; storage never sees it.
    """

    models: dict[str, OllamaModel] = field(default_factory=dict[str, OllamaModel])  # by "space/model:tag"
    token: str = ""
    closed: bool = False  # nobody gets a token
    base: str = ""
    storage: str = ""
    requests: list[web.Request] = field(default_factory=list[web.Request])
    stored: list[web.Request] = field(default_factory=list[web.Request])
    wrong: dict[str, bytes] = field(default_factory=dict[str, bytes])  # served instead, by digest

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if request.path == "/token" and self.closed:
            return web.Response(status=401)
        if request.path == "/token":
            return web.json_response({"token": self.token})
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            scope = f"repository:{'/'.join(request.path.split('/')[2:4])}:pull"
            challenge = f'Bearer realm="http://{self.base}/token",service="ollama.com",scope="{scope}"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        if found := re.fullmatch(r"/v2/([^/]+/[^/]+)/manifests/([^/]+)", request.path):
            model = self.models.get(f"{found[1]}:{found[2]}")
            return web.Response(body=model.manifest, content_type=DOCKER) if model else _unknown("MANIFEST")
        if found := re.fullmatch(r"/v2/([^/]+/[^/]+)/blobs/(sha256:[0-9a-f]{64})", request.path):
            if any(found[2] in m.blobs for n, m in self.models.items() if n.startswith(f"{found[1]}:")):
                place = f"http://{self.storage}/ollama/{found[2].replace(':', '/')}?X-Amz-Signature=a%2Fb"
                return web.Response(status=307, headers={"Location": place})
            return _unknown("BLOB")
        return web.Response(status=404, text="404 page not found")

    async def store(self, request: web.Request) -> web.StreamResponse:
        self.stored.append(request)
        key = "sha256:" + request.path.rsplit("/", 1)[-1]
        data = self.wrong.get(key) or next((m.blobs[key] for m in self.models.values() if key in m.blobs), None)
        if data is None or request.query.get("X-Amz-Signature") != "a/b":
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked is None:
            return web.Response(body=data)
        start, end = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if start > end:
            return web.Response(status=416)
        headers = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        return web.Response(status=206, body=data[start : end + 1], headers=headers)


def _unknown(what: str) -> web.Response:
    words = f"{what.lower()} unknown"
    return web.json_response({"errors": [{"code": f"{what}_UNKNOWN", "message": words}]}, status=404)


@contextlib.asynccontextmanager
async def ollama_registry() -> AsyncGenerator[OllamaRegistry]:
    """The registry and its storage, each on a port of its own."""
    found = OllamaRegistry()
    async with contextlib.AsyncExitStack() as stack:
        for name, handler in (("base", found.answer), ("storage", found.store)):
            app = web.Application()
            app.router.add_get("/{rest:.*}", handler)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            setattr(found, name, f"127.0.0.1:{runner.addresses[0][1]}")
        yield found
