"""CNCF ModelPack as we write it, held against the rules of its specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.formats.foreign import llama_folder
from tests.formats.test_onnx import real

from pierhead.package import inputs
from pierhead.package.build import package
from pierhead.package.recipe import Recipe
from pierhead.store.layout import Store

from .conftest import write_lora, write_model

pytestmark = pytest.mark.timeout(60)

TEXTS = {"type": "array", "items": {"type": "string"}}
MODALITIES = {"type": "array", "items": {"enum": ["text", "image", "audio", "video", "embedding", "other"]}}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object that may hold these and nothing else."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


WORD = {"type": "string"}
TIME = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$",
}
CONFIG = closed(
    ["descriptor", "config", "modelfs"],
    descriptor=closed(
        [],
        createdAt=TIME,
        authors=TEXTS,
        datasetsURL=TEXTS,
        licenses=TEXTS,
        name={"type": "string", "minLength": 1},
        **dict.fromkeys(
            ("family", "docURL", "sourceURL", "version", "revision", "vendor", "title", "description"), WORD
        ),
    ),
    config=closed(
        [],
        architecture=WORD,
        format=WORD,
        precision=WORD,
        quantization=WORD,
        paramSize={"type": "string", "pattern": r"^\d+(\.\d)?[QqTtBbMmKk]?$"},
        capabilities=closed(
            [],
            inputTypes=MODALITIES,
            outputTypes=MODALITIES,
            knowledgeCutoff=TIME,
            **{key: {"type": "boolean"} for key in ("reasoning", "toolUsage", "reward")},
            languages={"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2}$"}},
        ),
    ),
    modelfs=closed(
        ["type", "diffIds"],
        type={"enum": ["layers"]},
        diffIds={"type": "array", "items": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}, "minItems": 1},
    ),
)
LAYER = r"^application/vnd\.cncf\.model\.(weight|weight\.config|doc|code|dataset)\.v1\.(raw|tar|tar\+gzip|tar\+zstd)$"
FILE_METADATA = closed(
    ["name", "mode", "uid", "gid", "size", "mtime", "typeflag"],
    name=WORD,
    mtime=TIME,
    **{key: {"type": "integer", "minimum": 0} for key in ("mode", "uid", "gid", "size", "typeflag")},
)


def written(tmp_path: Path, base: inputs.Inputs, *extras: inputs.Input) -> tuple[dict[str, Any], dict[str, Any]]:
    store = Store.open(tmp_path / "store")
    recipe = Recipe(name="tiny", base=base, created="2026-01-02T03:04:05Z", extras=extras, format="cncf")
    record = package(store, recipe)
    manifest = json.loads(store.blob_path(record.digest).read_bytes())
    return manifest, json.loads(store.blob_path(manifest["config"]["digest"]).read_bytes())


def sources(tmp_path: Path) -> dict[str, inputs.Inputs]:
    (tmp_path / "o").mkdir()
    return {
        "gguf": inputs.detect(write_model(tmp_path / "m.gguf")),
        "safetensors": inputs.detect(llama_folder(tmp_path / "m", shards=2, template="{{ x }}")),
        "onnx": inputs.detect(real(tmp_path / "o" / "model.onnx", external=True)),
    }


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "onnx"])
def test_the_config_keeps_to_the_schema(kind: str, tmp_path: Path) -> None:
    manifest, config = written(tmp_path, sources(tmp_path)[kind])

    jsonschema.validate(config, CONFIG, format_checker=jsonschema.FormatChecker())
    assert config["config"]["format"] == kind
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    assert config["descriptor"]["createdAt"] == "2026-01-02T03:04:05Z"


def test_precision_and_size_are_written_in_its_words(tmp_path: Path) -> None:
    config = written(tmp_path, sources(tmp_path)["safetensors"])[1]["config"]

    assert (config["precision"], config["paramSize"]) == ("bfloat16", "41k")


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "onnx"])
def test_the_manifest_names_its_types_and_each_file(kind: str, tmp_path: Path) -> None:
    manifest = written(tmp_path, sources(tmp_path)[kind])[0]

    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    for layer in manifest["layers"]:
        jsonschema.validate(layer["mediaType"], {"type": "string", "pattern": LAYER})
        told = layer["annotations"]
        about = json.loads(told["org.cncf.model.file.metadata+json"])
        jsonschema.validate(about, FILE_METADATA)
        assert about["size"] == layer["size"]
        assert about["name"] == told["org.cncf.model.filepath"].rsplit("/", 1)[-1]
        assert told["org.cncf.model.file.mediatype.untested"] in ("true", "false")


def test_roles_that_it_has_no_types_for_come_back(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    (tmp_path / "LICENSE").write_text("MIT")
    extras = (
        inputs.single(write_lora(tmp_path / "l.gguf"), "lora", format="gguf", scale=0.5),
        inputs.single(write_model(tmp_path / "eye.gguf", "clip", kind="mmproj"), "mmproj", format="gguf"),
        inputs.single(tmp_path / "t.jinja", "template"),
        inputs.single(tmp_path / "LICENSE", "license"),
    )
    written(tmp_path, sources(tmp_path)["gguf"], *extras)

    record = Store.open(tmp_path / "store").get("tiny")
    assert [(f.role, f.scale) for f in record.files] == [
        ("weights", 1.0), ("lora", 0.5), ("mmproj", 1.0), ("template", 1.0), ("license", 1.0),
    ]  # fmt: skip
