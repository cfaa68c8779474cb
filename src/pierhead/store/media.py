"""Media types of models, Docker's and CNCF ModelPack's, and what a layer of each is; pure.

Sources: the model specification of Docker Model Runner and the CNCF model-spec.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from pierhead.store.model import Role

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"

# --- Docker ---
DOCKER = "application/vnd.docker.ai."
CONFIG = f"{DOCKER}model.config.v0.1+json"
CONFIG_V02 = f"{DOCKER}model.config.v0.2+json"
GGUF = f"{DOCKER}gguf.v3"
LORA = f"{DOCKER}gguf.v3.lora"
SAFETENSORS = f"{DOCKER}safetensors"
DDUF = f"{DOCKER}dduf"
MMPROJ = f"{DOCKER}mmproj"
LICENSE = f"{DOCKER}license"
TEMPLATE = f"{DOCKER}chat.template.jinja"
FILE = f"{DOCKER}model.file"
VLLM_TAR = f"{DOCKER}vllm.config.tar"
DIR_TAR = f"{DOCKER}dir.tar"

# --- CNCF ModelPack ---
CNCF = "application/vnd.cncf.model."
CNCF_ARTIFACT = f"{CNCF}manifest.v1+json"
CNCF_CONFIG = f"{CNCF}config.v1+json"

# --- annotations ---
FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # the same path, for tools that know no models (oras)
REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"
SOURCE = "ai.pierhead.source"
ROLE = "ai.pierhead.role"  # of a CNCF layer, whose types know fewer roles than we do
MEMORY = "ai.pierhead.memory"  # JSON: the memory that a weights layer's model needs

Packing = Literal["raw", "tar", "tar+gzip", "tar+zstd"]


class Kind(NamedTuple):
    """What a layer is: its role, the format of its weights (empty for other roles), and how its bytes are packed."""

    role: Role
    format: str = ""
    packing: Packing = "raw"


_DOCKER: dict[str, Kind] = {
    GGUF: Kind("weights", "gguf"),
    LORA: Kind("lora", "gguf"),
    SAFETENSORS: Kind("weights", "safetensors"),
    DDUF: Kind("weights", "dduf"),
    MMPROJ: Kind("mmproj", "gguf"),
    LICENSE: Kind("license"),
    TEMPLATE: Kind("template"),
    FILE: Kind("other"),
    VLLM_TAR: Kind("config", packing="tar"),
    DIR_TAR: Kind("other", packing="tar"),
}
_CNCF_ROLES: dict[str, Role] = {
    "weight": "weights",
    "weight.config": "config",
    "doc": "doc",
    "code": "code",
    "dataset": "dataset",
}
_PACKINGS: tuple[Packing, ...] = ("raw", "tar", "tar+gzip", "tar+zstd")
_FORMATS = {".gguf": "gguf", ".safetensors": "safetensors", ".onnx": "onnx", ".dduf": "dduf"}
_ROLES: frozenset[str] = frozenset(get_args(Role))


def kind_of(media_type: str, filepath: str = "", role: str = "") -> Kind | None:
    """What a layer is, from its type, its path and our ``ROLE`` annotation; None for a type that is nobody's here.

    CNCF's raw weights and Docker's plain files do not tell a format: the path's ending does.
    """
    known = _DOCKER.get(media_type)
    if known is None and media_type.startswith(CNCF):
        name, _, packing = media_type.removeprefix(CNCF).partition(".v1.")
        if name in _CNCF_ROLES and packing in _PACKINGS:
            known = Kind(_CNCF_ROLES[name], packing=packing)
    if known is None:
        return None
    if known.role == "weights" and not known.format:
        known = known._replace(format=format_of(filepath))
    elif media_type == FILE and format_of(filepath) == "onnx":
        known = Kind("weights", "onnx")  # Docker has no type of its own for these
    if role in _ROLES and media_type.startswith((CNCF, FILE)):
        known = known._replace(role=role)  # pyright: ignore[reportArgumentType]
    return known


def format_of(filepath: str) -> str:
    """The weights' format that a path's ending tells; empty where it tells none."""
    return next((found for ending, found in _FORMATS.items() if filepath.lower().endswith(ending)), "")


MEDIA: dict[Role, str] = {
    "weights": GGUF,
    "draft": GGUF,
    "lora": LORA,
    "mmproj": MMPROJ,
    "license": LICENSE,
    "template": TEMPLATE,
    "config": FILE,
    "doc": FILE,
    "code": FILE,
    "dataset": FILE,
    "other": FILE,
}
