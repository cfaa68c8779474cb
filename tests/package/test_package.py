"""What is packaged: files, folders and other models, and what of them is read, copied and written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.formats.foreign import llama_folder

from pierhead.errors import CorruptData, NotFound, UnsafeContent, UsageError
from pierhead.package import inputs
from pierhead.package.build import package
from pierhead.package.recipe import Recipe
from pierhead.store.layout import Store
from pierhead.store.media import CNCF_CONFIG, CONFIG, CONFIG_V02, MEMORY, UNSAFE
from pierhead.store.model import ModelRecord, Packaged

from .conftest import write_lora, write_model

pytestmark = pytest.mark.timeout(60)
TIME = "2026-01-02T03:04:05Z"


def made(store: Store, base: Any, *extras: inputs.Input, name: str = "mine", **more: Any) -> ModelRecord:
    return package(store, Recipe(name=name, base=base, created=TIME, extras=extras, **more))


def documents(store: Store, record: ModelRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = json.loads(store.blob_path(record.digest).read_bytes())
    return manifest, json.loads(store.blob_path(manifest["config"]["digest"]).read_bytes())


def io_bytes() -> tuple[int, int]:
    """Bytes that this process has asked to read and to write, from the kernel's counters."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["rchar"]), int(found["wchar"])


# --- sources ------------------------------------------------------------------------------------------------------


def test_a_gguf_becomes_docker_s_first_artifact(store: Store, tmp_path: Path) -> None:
    record = made(store, inputs.detect(write_model(tmp_path / "m.gguf")))

    manifest, config = documents(store, record)
    assert record.config_type == CONFIG == manifest["artifactType"]
    assert [layer["mediaType"] for layer in manifest["layers"]] == ["application/vnd.docker.ai.gguf.v3"]
    assert config["config"]["format"] == "gguf"
    assert config["config"]["context_size"] == 2048
    assert config["config"]["parameters"] == "16.38K"
    assert config["config"]["size"] == "64.44KiB"
    assert config["config"]["gguf"]["general.architecture"] == "llama"
    assert all(isinstance(value, str) for value in config["config"]["gguf"].values())
    assert config["rootfs"]["diff_ids"] == [manifest["layers"][0]["digest"]]
    assert config["descriptor"]["created"] == TIME
    assert record.name == "mine"


def test_the_parts_of_a_split_gguf_are_found_beside_it(store: Store, tmp_path: Path) -> None:
    for number in range(3):
        write_model(tmp_path / f"m-{number + 1:05d}-of-00003.gguf", split=(number, 3))

    record = made(store, inputs.detect(tmp_path / "m-00002-of-00003.gguf"))

    assert [f.name for f in record.files] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    (tmp_path / "m-00001-of-00003.gguf").unlink()
    with pytest.raises(NotFound, match="m-00001-of-00003"):
        inputs.detect(tmp_path / "m-00002-of-00003.gguf")


def test_a_folder_with_safetensors_keeps_its_paths_in_docker_s_second_artifact(store: Store, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m", shards=2)
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("x")
    (folder / "LICENSE").write_text("MIT")
    (folder / "README.md").write_text("# m")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / "pytorch_model.bin").write_bytes(b"the same again")

    record = made(store, inputs.detect(folder))

    manifest, config = documents(store, record)
    assert record.config_type == CONFIG_V02
    roles = {f.name: f.role for f in record.files}
    assert roles["model-00001-of-00002.safetensors"] == "weights"
    assert (roles["LICENSE"], roles["README.md"], roles["sub/notes.txt"]) == ("license", "doc", "config")
    assert ".git/config" not in roles
    assert "pytorch_model.bin" not in roles
    assert config["config"]["safetensors"]["tensor_count"] == "2"
    assert config["config"]["architecture"] == "llama"
    laid = store.materialize(record)
    assert (laid / "sub" / "notes.txt").read_text() == "x"
    assert sorted(os.listdir(laid)) == sorted({name.split("/")[0] for name in roles})
    assert len(manifest["layers"]) == len(roles)


def test_the_first_artifact_packs_a_folder_s_small_files_into_archives(store: Store, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.json").write_text("{}")

    first = made(store, inputs.detect(folder), format="docker-v0.1")
    again = made(store, inputs.detect(folder), format="docker-v0.1", name="again")

    assert first.config_type == CONFIG
    kinds = sorted(f.media_type.removeprefix("application/vnd.docker.ai.") for f in first.files)
    assert kinds == ["dir.tar", "safetensors", "vllm.config.tar"]
    assert first.digest == again.digest
    laid = store.materialize(first)
    assert (laid / "sub" / "a.json").read_text() == "{}"
    assert json.loads((laid / "config.json").read_text())["model_type"] == "llama"
    assert {f.name for f in first.laid_out} >= {"config.json", "sub/a.json", "model.safetensors"}


def test_an_onnx_file_takes_its_weights_along(store: Store, tmp_path: Path) -> None:
    from tests.formats.test_onnx import real

    real(tmp_path / "model.onnx", external=True)

    record = made(store, inputs.detect(tmp_path / "model.onnx"))

    assert {f.name: (f.role, f.format) for f in record.files} == {
        "model.onnx": ("weights", "onnx"),
        "model.onnx_data": ("weights", "data"),
    }
    assert record.metadata["format"] == "onnx"


def test_a_model_of_one_s_own_is_packaged_as_it_is(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "model.py").write_text("def predict(x): return x")
    (folder / "weights.pt").write_bytes(b"w" * 1000)

    with pytest.raises(UnsafeContent, match=r"weights\.pt") as caught:
        made(store, inputs.custom(folder))
    assert "--allow-unsafe" in (caught.value.hint or "")
    assert not list(store.blobs.folder.iterdir())
    record = made(store, inputs.custom(folder), allow_unsafe=True)

    assert {f.name: f.role for f in record.files} == {"model.py": "code", "weights.pt": "weights"}
    assert record.metadata["format"] == "pytorch"
    assert record.metadata["weights_bytes"] == 1000
    assert "weights.pt" in record.annotations[UNSAFE]
    assert "weights.pt" in made(store, record, name="other").annotations[UNSAFE]


@pytest.mark.parametrize(
    ("name", "data"), [("m.gguf", b"GGUF but not really"), ("m.onnx", b"<html>"), ("m.safetensors", b"x" * 100)]
)
def test_what_is_no_model_is_refused_and_nothing_is_kept(store: Store, tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)

    with pytest.raises(CorruptData, match=name):
        made(store, inputs.detect(tmp_path / name))
    assert not list(store.blobs.folder.iterdir())


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    (tmp_path / "secret").write_text("key")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")

    with pytest.raises(UsageError, match=r"notes\.txt"):
        inputs.detect(folder)


def test_links_of_a_hub_s_cache_are_followed(store: Store, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "snapshots" / "abc")
    (tmp_path / "blobs").mkdir()
    os.rename(folder / "model.safetensors", tmp_path / "blobs" / "x")
    (folder / "model.safetensors").symlink_to("../../blobs/x")

    assert "model.safetensors" in {f.name for f in made(store, inputs.detect(folder)).files}


# --- the same again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["docker", "docker-v0.2", "cncf"])
def test_the_same_files_give_the_same_digest_in_another_store(tmp_path: Path, shape: Any) -> None:
    digests: set[str] = set()
    for number in range(2):
        folder = llama_folder(tmp_path / f"place{number}" / "m")
        os.utime(folder / "config.json", (number, number))
        store = Store.open(tmp_path / f"store{number}")
        digests.add(made(store, inputs.detect(folder), format=shape).digest)
    assert len(digests) == 1


def test_packaging_the_same_again_gives_the_model_that_is_there(store: Store, tmp_path: Path) -> None:
    base = inputs.detect(write_model(tmp_path / "m.gguf"))
    first = made(store, base)

    later = package(store, Recipe(name="mine", base=base, created="2027-01-01T00:00:00Z"))

    assert (later.digest, later.created) == (first.digest, TIME)
    assert len(store.history("mine")) == 1


# --- from another model -------------------------------------------------------------------------------------------


def test_adding_a_lora_reads_and_writes_nothing_of_the_weights(store: Store, tmp_path: Path) -> None:
    weights = 64 << 20
    base = made(store, inputs.detect(write_model(tmp_path / "m.gguf", size=weights >> 10)), name="base")
    lora = inputs.single(write_lora(tmp_path / "style.gguf"), "lora", format="gguf", scale=0.5)
    read, written = io_bytes()

    record = made(store, base, lora, name="styled")

    more_read, more_written = (after - before for after, before in zip(io_bytes(), (read, written), strict=True))
    assert more_read < 1 << 20
    assert more_written < 1 << 20
    assert [(f.role, f.scale) for f in record.files] == [("weights", 1.0), ("lora", 0.5)]
    assert record.files[0].digest == base.files[0].digest
    assert record.metadata["parameters"] == base.metadata["parameters"]
    assert documents(store, record)[1]["config"]["gguf"]["general.architecture"] == "llama"


def test_a_template_takes_the_place_of_the_one_before(store: Store, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jinja").write_text(f"{name}: {{{{ messages[0].content }}}}")
    base = made(store, inputs.detect(write_model(tmp_path / "m.gguf")), name="base")

    def template(name: str) -> inputs.Input:
        return inputs.single(tmp_path / f"{name}.jinja", "template", name="template.jinja")

    first = made(store, base, template("one"), name="first")
    second = made(store, first, template("two"), name="second")

    assert [f.name for f in second.files] == ["m.gguf", "template.jinja"]
    assert second.metadata["chat_template"].startswith("two")


def test_licences_are_kept_side_by_side_and_none_twice(store: Store, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "LICENSE").write_text(name)
    texts = [inputs.single(tmp_path / name / "LICENSE", "license") for name in ("a", "b", "a")]

    record = made(store, inputs.detect(write_model(tmp_path / "m.gguf")), *texts)

    assert sorted(f.name for f in record.files if f.role == "license") == ["LICENSE", "LICENSE-2"]


def test_settings_of_a_base_hold_until_others_are_given(store: Store, tmp_path: Path) -> None:
    base = made(
        store,
        inputs.detect(write_model(tmp_path / "m.gguf")),
        name="base",
        packaged=Packaged(context=1024, options={"sampling.temp": 0.1, "n_batch": 64}, system="Be brief."),
    )

    record = made(store, base, name="new", packaged=Packaged(options={"sampling.temp": 0.9}))

    assert record.packaged == Packaged(1024, {"sampling.temp": 0.9, "n_batch": 64}, "Be brief.")
    assert documents(store, record)[1]["config"]["context_size"] == 1024


def test_a_model_changes_its_specification_without_its_blobs(store: Store, tmp_path: Path) -> None:
    base = made(store, inputs.detect(llama_folder(tmp_path / "m")), name="docker")

    cncf = made(store, base, name="cncf", format="cncf")
    back = made(store, cncf, name="back", format="docker")
    kept = made(store, cncf, name="kept")

    assert (cncf.config_type, back.config_type, kept.config_type) == (CNCF_CONFIG, CONFIG_V02, CNCF_CONFIG)
    shape = [(f.name, f.role, f.format, f.digest) for f in base.files]
    assert shape == [(f.name, f.role, f.format, f.digest) for f in cncf.files]
    assert shape == [(f.name, f.role, f.format, f.digest) for f in back.files]


@pytest.mark.parametrize(
    ("role", "make", "reason"),
    [
        ("lora", lambda p: write_lora(p, "gemma3"), "gemma3"),
        ("lora", write_model, "not a LoRA"),
        ("mmproj", write_model, "not a projector"),
        ("lora", lambda p: p.write_bytes(b"nothing") and p, "GGUF"),
    ],
)
def test_what_does_not_fit_the_model_is_not_added(
    store: Store, tmp_path: Path, role: Any, make: Any, reason: str
) -> None:
    base = made(store, inputs.detect(write_model(tmp_path / "m.gguf")), name="base")
    extra = inputs.single(make(tmp_path / "extra.gguf"), role, format="gguf")

    with pytest.raises((CorruptData, UsageError), match=reason):
        made(store, base, extra, name="bad")
    assert not [record for record in store.models() if record.name == "bad"]


def test_a_go_template_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("{{ if .System }}{{ .System }}{{ end }}")
    extra = inputs.single(tmp_path / "t", "template", name="template.jinja")

    with pytest.raises(UsageError, match="Go"):
        made(store, inputs.detect(write_model(tmp_path / "m.gguf")), extra)


# --- what a scheduler reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["docker", "cncf"])
def test_weights_layers_carry_the_memory_that_the_model_needs(store: Store, tmp_path: Path, shape: Any) -> None:
    record = made(store, inputs.detect(write_model(tmp_path / "m.gguf")), format=shape)

    layer = documents(store, record)[0]["layers"][0]
    told = json.loads(layer["annotations"][MEMORY])
    assert told["weights"] == record.metadata["weights_bytes"]
    assert told["kv_per_token"] == 2 * 2 * 16 * 2  # K and V, heads, their width, f16
    assert told["context"] == 2048
    assert told["kv_cache"] == 2048 * told["kv_per_token"]
    assert told["total"] == sum(told[key] for key in ("weights", "kv_cache", "compute", "overhead"))


def test_a_record_survives_being_written_as_json(store: Store, tmp_path: Path) -> None:
    record = made(store, inputs.detect(llama_folder(tmp_path / "m")), packaged=Packaged(context=64))

    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(record)), ModelRecord) == record
