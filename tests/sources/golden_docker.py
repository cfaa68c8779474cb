"""Artifacts as Docker Model Runner makes them, v0.1 and v0.2, and its folder of models on disk."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .golden_ollama import digest

TYPE = "application/vnd.docker.ai."
OCI = "application/vnd.oci.image.manifest.v1+json"
CREATED = "2025-06-01T12:00:00.123456789Z"


def encoded(value: Any) -> bytes:
    """JSON as Go's ``json.Marshal`` writes it: compact, no line's end."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def tar_of(files: dict[str, bytes]) -> bytes:
    """An uncompressed archive, as ``vllm.config.tar`` and ``dir.tar`` are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@dataclass
class DockerModel:
    """Layers in order as (type, path, content); ``paths`` off is how the first versions wrote them."""

    layers: list[tuple[str, str, bytes]]
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    version: str = "v0.1"
    paths: bool = True

    @property
    def config_bytes(self) -> bytes:
        about = {"format": "gguf", "quantization": "Q4_1", "parameters": "134.52M", "architecture": "llama"}
        return encoded(
            {
                "config": {**about, "size": "98.36MB", **self.config},
                "descriptor": {"created": CREATED},
                "rootfs": {"type": "rootfs", "diff_ids": [digest(data) for _, _, data in self.layers]},
            }
        )

    def _layer(self, kind: str, path: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"mediaType": TYPE + kind, "size": len(data), "digest": digest(data)}
        if self.paths:
            about = {"name": path.rpartition("/")[2], "mode": 420, "uid": 0, "gid": 0, "size": len(data)}
            found["annotations"] = {
                "org.cncf.model.file.mediatype.untested": "false",
                "org.cncf.model.file.metadata+json": json.dumps({**about, "mtime": CREATED, "typeflag": 0}),
                "org.cncf.model.filepath": path,
            }
        return found

    @property
    def manifest(self) -> bytes:
        config = {"mediaType": f"{TYPE}model.config.{self.version}+json", "size": len(self.config_bytes)}
        return encoded(
            {
                "schemaVersion": 2,
                "mediaType": OCI,
                "config": {**config, "digest": digest(self.config_bytes)},
                "layers": [self._layer(*layer) for layer in self.layers],
            }
        )

    @property
    def id(self) -> str:
        return digest(self.manifest)

    @property
    def blobs(self) -> dict[str, bytes]:
        return {digest(data): data for data in (self.config_bytes, *(data for _, _, data in self.layers))}


def write_docker(root: Path, models: list[tuple[DockerModel, list[str]]]) -> None:
    """A folder as Docker Model Runner keeps it, with these models and their tags."""
    write_artifacts(root, [(model.manifest, model.blobs, tags) for model, tags in models])


def write_artifacts(root: Path, artifacts: list[tuple[bytes, dict[str, bytes], list[str]]]) -> None:
    """The same from manifests, their blobs and tags."""
    for folder in ("blobs/sha256", "manifests/sha256"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for manifest, blobs, tags in artifacts:
        for key, data in blobs.items():
            (root / "blobs/sha256" / key[7:]).write_bytes(data)
        (root / "manifests/sha256" / digest(manifest)[7:]).write_bytes(manifest)
        document = json.loads(manifest)
        files = [part["digest"] for part in (*document["layers"], document["config"])]
        entries.append({"id": digest(manifest), "tags": tags or None, "files": files})
    (root / "layout.json").write_text(json.dumps({"version": "1.0.0"}, indent=2))
    (root / "models.json").write_text(json.dumps({"models": entries}, indent=2))
