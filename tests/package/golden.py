"""Artifacts as other tools write them, made from their specifications: documents and blobs, and a registry for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from tests.formats.foreign import LLAMA, safetensors
from tests.store.tars import pack, tar

from .conftest import write_model

DOCKER = "application/vnd.docker.ai."
CNCF = "application/vnd.cncf.model."
WEIGHTS = safetensors({"model.layers.0.mlp.weight": ("BF16", [64, 320], 64 * 320 * 2)}, {"format": "pt"})
CONFIG_JSON = json.dumps(LLAMA).encode()
TEMPLATE = b"{% for m in messages %}{{ m['content'] }}{% endfor %}"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Artifact:
    """One artifact on its way to a registry."""

    config_type: str
    config: dict[str, Any]
    artifact_type: str = ""
    layers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    diff_ids: list[str] = field(default_factory=list[str])

    def add(self, kind: str, data: bytes, path: str = "", *, plain: bytes | None = None, **annotations: str) -> None:
        """A layer; ``plain`` is what is compressed in it."""
        told = {"org.cncf.model.filepath": path, **annotations} if path else annotations
        layer: dict[str, Any] = {"mediaType": kind, "size": len(data), "digest": digest(data)}
        self.layers.append({**layer, "annotations": told} if told else layer)
        self.blobs[digest(data)] = data
        self.diff_ids.append(digest(data if plain is None else plain))

    def manifest(self) -> bytes:
        key, inner = ("modelfs", "diffIds") if self.config_type.startswith(CNCF) else ("rootfs", "diff_ids")
        kind = "layers" if key == "modelfs" else "rootfs"
        config = json.dumps({**self.config, key: {"type": kind, inner: self.diff_ids}}).encode()
        self.blobs[digest(config)] = config
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": self.config_type, "size": len(config), "digest": digest(config)},
            "layers": self.layers,
        }
        return json.dumps({**document, **({"artifactType": self.artifact_type} if self.artifact_type else {})}).encode()


def docker(version: str, format: str, **config: Any) -> Artifact:
    about = {"format": format, "parameters": "16.38K", "architecture": "llama", "size": "64.56KiB", **config}
    created = {"created": "2025-05-01T10:00:00.123456789+02:00"}
    return Artifact(f"{DOCKER}model.config.{version}+json", {"config": about, "descriptor": created})


def cncf(format: str) -> Artifact:
    config = {"descriptor": {"createdAt": "2025-01-01T00:00:00Z", "name": "tiny"}, "config": {"format": format}}
    return Artifact(f"{CNCF}config.v1+json", config, f"{CNCF}manifest.v1+json")


def docker_gguf(folder: Path) -> Artifact:
    """v0.1, without annotations, as its first writers made them."""
    made = docker("v0.1", "gguf", quantization="F32", context_size=512, gguf={"general.architecture": "llama"})
    made.add(f"{DOCKER}gguf.v3", write_model(folder / "a.gguf").read_bytes())
    made.add(f"{DOCKER}license", b"MIT")
    made.add(f"{DOCKER}chat.template.jinja", TEMPLATE)
    made.add(f"{DOCKER}mmproj", write_model(folder / "p.gguf", "clip", kind="mmproj").read_bytes())
    return made


def docker_split(folder: Path) -> Artifact:
    made = docker("v0.1", "gguf", context_size=2048)
    for number in range(2):
        made.add(f"{DOCKER}gguf.v3", write_model(folder / f"{number}.gguf", split=(number, 2)).read_bytes())
    return made


def docker_safetensors(folder: Path) -> Artifact:
    """v0.1, whose small files are in archives."""
    made = docker("v0.1", "safetensors", safetensors={"tensor_count": "1"})
    made.add(f"{DOCKER}safetensors", WEIGHTS, "model.safetensors")
    made.add(f"{DOCKER}vllm.config.tar", tar([("config.json", CONFIG_JSON), ("tokenizer.json", b"{}")]))
    made.add(f"{DOCKER}dir.tar", tar([("encoder/config.json", b"{}"), ("encoder/deep/x.txt", b"x")]))
    return made


def docker_folder(folder: Path) -> Artifact:
    """v0.2, a layer for each file."""
    made = docker("v0.2", "safetensors")
    made.add(
        f"{DOCKER}safetensors", WEIGHTS, "model.safetensors", **{"org.cncf.model.file.mediatype.untested": "false"}
    )
    made.add(f"{DOCKER}model.file", CONFIG_JSON, "config.json")
    made.add(f"{DOCKER}model.file", b"x", "encoder/deep/x.txt")
    return made


def docker_dduf(folder: Path) -> Artifact:
    from tests.formats.foreign import dduf

    made = docker("v0.1", "dduf", architecture="diffusers", diffusers={"layout": "dduf", "dduf_file": "m.dduf"})
    members = {"model_index.json": b'{"_class_name": "FluxPipeline"}', "unet/model.safetensors": WEIGHTS}
    made.add(f"{DOCKER}dduf", dduf(folder / "m.dduf", members).read_bytes(), "m.dduf")
    return made


def cncf_raw(folder: Path) -> Artifact:
    made = cncf("safetensors")
    made.add(f"{CNCF}weight.v1.raw", WEIGHTS, "model.safetensors")
    made.add(f"{CNCF}weight.config.v1.raw", CONFIG_JSON, "config.json")
    made.add(f"{CNCF}doc.v1.raw", b"# tiny", "README.md")
    made.add(f"{CNCF}code.v1.raw", b"pass", "modeling.py")
    made.add(f"{CNCF}dataset.v1.raw", b"{}", "data/train.jsonl")
    return made


def cncf_gguf(folder: Path) -> Artifact:
    made = cncf("gguf")
    made.add(f"{CNCF}weight.v1.raw", write_model(folder / "a.gguf").read_bytes(), "tiny.gguf")
    return made


def cncf_packed(packing: str) -> Any:
    def make(folder: Path) -> Artifact:
        made = cncf("safetensors")
        for kind, entries in (
            ("weight", [("model.safetensors", WEIGHTS)]),
            ("weight.config", [("config.json", CONFIG_JSON), ("tokenizer.json", b"{}")]),
            ("doc", [("README.md", b"# tiny")]),
        ):
            plain = tar(entries)
            made.add(f"{CNCF}{kind}.v1.{packing}", pack(plain, packing), plain=plain)
        return made

    return make


@contextlib.asynccontextmanager
async def registry(artifact: Artifact) -> AsyncGenerator[str]:
    """A registry that has it; the reference to pull."""
    manifest = artifact.manifest()

    async def answer(request: web.Request) -> web.StreamResponse:
        kind, name = request.path.split("/")[-2:]
        if kind == "manifests" and name in ("v1", digest(manifest)):
            return web.Response(body=manifest, content_type="application/vnd.oci.image.manifest.v1+json")
        data = artifact.blobs.get(name) if kind == "blobs" else None
        if data is None:
            return web.Response(status=404)
        asked = request.headers.get("Range")
        if not asked:
            return web.Response(body=data)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1]
        told = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
        return web.Response(status=206, body=part, headers=told)

    app = web.Application()
    app.router.add_get("/{rest:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"oci://127.0.0.1:{runner.addresses[0][1]}/team/tiny:v1"
    finally:
        await runner.cleanup()
