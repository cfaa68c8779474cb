"""Media types of models, Docker's and CNCF ModelPack's, and what a layer of each is; pure.

Sources: the model specification of Docker Model Runner and the CNCF model-spec.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

from pierhead.formats.python_model import FORMAT as PYTHON
from pierhead.formats.python_model import NAME as PYTHON_MODEL
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
FILE_METADATA = "org.cncf.model.file.metadata+json"
UNTESTED = "org.cncf.model.file.mediatype.untested"
TITLE = "org.opencontainers.image.title"  # the same path, for tools that know no models (oras)
REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"
SOURCE = "ai.pierhead.source"
REVISION = "ai.pierhead.revision"  # the branch, tag or commit of a hub that was asked for, where one was
ROLE = "ai.pierhead.role"  # of a layer whose type does not tell it: there are fewer types than roles
SETTINGS = "ai.pierhead.settings"  # JSON, of a manifest: how the model is to run (``store.model.Packaged``)
SCALE = "ai.pierhead.scale"  # of a LoRA's layer: how strongly it counts
UNSAFE = "ai.pierhead.allowed-unsafe"  # what a user let in although it runs code
MADE_BY = "ai.pierhead.made-by"  # the program that made a model out of its base, and how
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
_GGML = re.compile(r"(?:^|[-_.])ggml[-_.](?:.*\.)?bin$|\.ggml$")  # as whisper.cpp names its models
_FORMATS = {
    ".gguf": "gguf",
    ".safetensors": "safetensors",
    ".onnx": "onnx",
    ".dduf": "dduf",
    **dict.fromkeys((".onnx_data", ".onnx.data"), "data"),  # weights that another file describes
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "pytorch"),
    **dict.fromkeys((".h5", ".keras"), "keras"),
    **dict.fromkeys((".engine", ".plan"), "tensorrt"),
    **dict.fromkeys((".npz", ".npy"), "numpy"),
    **dict.fromkeys((".pkl", ".pickle", ".joblib"), "pickle"),
}
HEAVY: frozenset[Role] = frozenset({"weights", "draft", "lora", "mmproj"})
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
    elif media_type == FILE and format_of(filepath) in ("onnx", "openvino", "ggml"):
        known = Kind("weights", format_of(filepath))  # Docker has no type of its own for these
    if role in _ROLES and role != known.role:
        format = known.format or (format_of(filepath) if role in HEAVY else "")
        known = known._replace(role=role, format=format)  # pyright: ignore[reportArgumentType]
    if known.role == "code" and filepath == PYTHON_MODEL:
        known = known._replace(format=PYTHON)
    return known


def format_of(filepath: str) -> str:
    """The weights' format that a path's ending tells; empty where it tells none.

    OpenVINO keeps a graph in ``openvino_….xml`` and its numbers in the ``.bin`` beside it; whisper.cpp's models are
    called ``ggml-….bin``, and of those Silero's only tell speech from silence.
    """
    name = filepath.rpartition("/")[2].lower()
    if _GGML.search(name):
        return "data" if "silero" in name else "ggml"
    if filepath.rpartition("/")[2].startswith("openvino_"):
        return {"xml": "openvino", "bin": "data"}.get(filepath.rpartition(".")[2], "")
    return next((found for ending, found in _FORMATS.items() if filepath.lower().endswith(ending)), "")


_MEDIA: dict[tuple[Role, str], str] = {
    ("weights", "gguf"): GGUF,
    ("draft", "gguf"): GGUF,
    ("lora", "gguf"): LORA,
    ("weights", "safetensors"): SAFETENSORS,
    ("weights", "dduf"): DDUF,
    ("mmproj", "gguf"): MMPROJ,
    ("license", ""): LICENSE,
    ("template", ""): TEMPLATE,
}


def docker_type(role: Role, format: str = "") -> str:
    """Docker's media type for a file; the role of one that it does not tell goes into the ``ROLE`` annotation."""
    return _MEDIA.get((role, format), FILE)


def needs_role(media_type: str, filepath: str, role: Role) -> bool:
    """Whether a reader could not tell a layer's role from its type and path alone."""
    kind = kind_of(media_type, filepath)
    return kind is None or kind.role != role
