"""Repositories in formats of many files: pulled, inspected by range, taken from a folder; from ModelScope too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.formats.foreign import initializer, llama_folder, onnx_model, safetensors

from pierhead import events
from pierhead.errors import AccessDenied, CorruptData, NotFound, SourceUnavailable
from pierhead.sources.modelscope import DEFAULT, endpoint

from .servers import COMMIT, FakeHub, FakeScope, Puller, digest, make_gguf

REPO = "org/Tiny"
Q4, Q8 = make_gguf(200_000, 4), make_gguf(400_000, 8)


@pytest.fixture
def llama(tmp_path: Path) -> dict[str, bytes]:
    folder = llama_folder(tmp_path / "llama", shards=2, template="{{ messages }}")
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    return {**found, "README.md": b"# Tiny", "LICENSE": b"Apache", "pytorch_model.bin": b"\x80\x04", "a.png": b"png"}


KEPT = {
    "config.json": "config",
    "tokenizer.json": "config",
    "tokenizer_config.json": "config",
    "model.safetensors.index.json": "config",
    "model-00001-of-00002.safetensors": "weights",
    "model-00002-of-00002.safetensors": "weights",
    "README.md": "doc",
    "LICENSE": "license",
}


async def test_a_safetensors_repository_is_pulled_whole(hub: FakeHub, puller: Puller, llama: dict[str, bytes]) -> None:
    hub.add(REPO, llama)
    record = await puller(f"hf:{REPO}")
    assert {f.name: f.role for f in record.files} == KEPT
    assert all(puller.store.blob_path(f.digest).read_bytes() == llama[f.name] for f in record.files)
    assert record.metadata["format"] == "safetensors"
    assert record.metadata["architecture"] == "llama"
    assert record.metadata["chat_template"] == "{{ messages }}"
    assert record.source == f"hf:{REPO}@{COMMIT}"
    folder = puller.store.materialize(record)
    assert json.loads((folder / "config.json").read_bytes())["model_type"] == "llama"
    assert await puller(record.source, name=record.name) == record
    assert puller.leftovers() == []


async def test_a_mirror_that_lists_no_hashes_is_asked_for_those_of_each_file(
    hub: FakeHub, puller: Puller, llama: dict[str, bytes]
) -> None:
    hub.add(REPO, llama, bare=True)
    record = await puller(f"hf:{REPO}")
    assert {f.name: f.role for f in record.files} == KEPT
    assert not any(r.method == "HEAD" for r in hub.cdn.requests)
    hub.server.files[f"/{REPO}/resolve/{COMMIT}/config.json"].data = b'{"model_type": "other"}'
    with pytest.raises(CorruptData, match="does not match the id"):
        await puller(f"hf:{REPO}", name="again")


async def test_a_safetensors_repository_is_inspected_by_ranges(
    hub: FakeHub, puller: Puller, llama: dict[str, bytes]
) -> None:
    wide = safetensors({"model.embed.weight": ("BF16", [1024, 2048], 4 << 20)})
    hub.add(REPO, {**llama, "model-00001-of-00002.safetensors": wide})
    found = await puller.inspect(f"hf:{REPO}")
    assert found["metadata"]["architecture"] == "llama"
    assert found["metadata"]["split_count"] == 2
    assert sum(hub.cdn.sent.values()) < 500_000
    assert puller.store.models() == []


async def test_a_variant_of_an_onnx_repository_brings_its_weights_in_their_folder(hub: FakeHub, puller: Puller) -> None:
    graph = onnx_model(initializer("w", [4, 4], location="model_fp16.onnx_data"))
    files = {
        "config.json": b'{"model_type": "bert"}',
        "onnx/model.onnx": onnx_model(initializer("w", [4, 4], data=bytes(64))),
        "onnx/model_fp16.onnx": graph,
        "onnx/model_fp16.onnx_data": bytes(64),
        "tokenizer.json": b"{}",
    }
    hub.add(REPO, files)
    record = await puller(f"hf:{REPO}:fp16")
    assert {f.name for f in record.files} == {
        "config.json", "onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data", "tokenizer.json",
    }  # fmt: skip
    assert record.metadata["format"] == "onnx"
    assert record.source == f"hf:{REPO}:fp16@{COMMIT}"
    assert (puller.store.materialize(record) / "onnx" / "model_fp16.onnx_data").stat().st_size == 64
    plain = await puller(f"hf:{REPO}")
    assert [f.name for f in plain.files if f.role == "weights"] == ["onnx/model.onnx"]


async def test_a_link_to_a_file_of_a_hub_brings_its_model(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"q/Tiny-Q8_0.gguf": Q8, "q/Tiny-Q4_K_M.gguf": Q4})
    record = await puller(f"https://huggingface.co/{REPO}/blob/main/q/Tiny-Q8_0.gguf")
    assert puller.content(record) == Q8
    assert record.source == f"hf:{REPO}/q/Tiny-Q8_0.gguf@{COMMIT}"
    assert record.name == f"hf.co/{REPO}:q-tiny-q8_0"


async def test_a_folder_in_safetensors_is_taken_in_like_a_repository(puller: Puller, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "mine", shards=2)
    (folder / "optimizer.pt").write_bytes(b"\x80")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    record = await puller(str(folder))
    assert {f.name for f in record.files} == set(KEPT) - {"README.md", "LICENSE"}
    assert record.metadata["architecture"] == "llama"


# --- ModelScope ---------------------------------------------------------------------------------------------------


async def test_modelscope_models_are_pulled_by_quantization_and_pinned(scope: FakeScope, puller: Puller) -> None:
    scope.add(REPO, {"Tiny-Q8_0.gguf": Q8, "Tiny-Q4_K_M.gguf": Q4, "README.md": b"# hi", "LICENSE": b"Apache"})
    record = await puller(f"ms:{REPO}:q8_0")
    assert puller.content(record) == Q8
    assert record.name == f"modelscope.cn/{REPO}:q8_0"
    assert record.source == f"ms:{REPO}:q8_0@{COMMIT}"
    assert record.annotations["org.opencontainers.image.revision"] == COMMIT
    assert {f.role for f in record.files} == {"weights", "license"}
    assert puller.content(await puller(record.source, name="again")) == Q8


async def test_modelscope_repositories_of_many_files_are_pulled_whole(
    scope: FakeScope, puller: Puller, llama: dict[str, bytes]
) -> None:
    scope.add(REPO, llama)
    record = await puller(f"ms:{REPO}")
    assert {f.name: f.role for f in record.files} == KEPT


async def test_a_list_that_modelscope_cuts_off_is_asked_for_by_folder(
    scope: FakeScope, puller: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pierhead.sources.modelscope.CUT", 4)
    scope.cut = 4
    scope.add(REPO, {"a.json": b"{}", "b.json": b"{}", "d/x.json": b"{}", "q/Tiny-Q4_0.gguf": Q4, "q/c.json": b"{}"})
    assert puller.content(await puller(f"ms:{REPO}")) == Q4


async def test_modelscopes_token_goes_to_it_and_never_to_where_it_redirects(scope: FakeScope, puller: Puller) -> None:
    scope.add(REPO, {"Tiny-Q4_K_M.gguf": Q4}, token="ms_secret")
    with pytest.raises(AccessDenied, match="private") as caught:
        await puller(f"ms:{REPO}")
    assert "MODELSCOPE_API_TOKEN" in str(caught.value.hint)
    puller.env["MODELSCOPE_API_TOKEN"] = "ms_secret"
    record = await puller(f"ms:{REPO}")
    assert puller.content(record) == Q4
    assert scope.cdn.requests
    assert not any("Authorization" in r.headers or "Cookie" in r.headers for r in scope.cdn.requests)
    assert "secret" not in repr(puller.events) + repr(record)


async def test_a_file_whose_hash_differs_from_modelscopes_is_refused(scope: FakeScope, puller: Puller) -> None:
    scope.add(REPO, {"Tiny-Q4_K_M.gguf": Q4})
    scope.cdn.files["/oss/" + digest(Q4).removeprefix("sha256:")].data = Q4[:-1] + b"x"
    with pytest.raises(CorruptData, match="expected"):
        await puller(f"ms:{REPO}")
    assert puller.leftovers() == []


async def test_what_modelscope_does_not_have_is_not_found(scope: FakeScope, puller: Puller) -> None:
    scope.add(REPO, {"Tiny-Q4_K_M.gguf": Q4})
    with pytest.raises(NotFound, match="no repository org/none"):
        await puller("ms:org/none")
    with pytest.raises(NotFound, match="revision 'v9'"):
        await puller(f"ms:{REPO}@v9")


async def test_an_answer_that_is_not_modelscopes_is_an_unusable_source(scope: FakeScope, puller: Puller) -> None:
    scope.server.add(f"/api/v1/models/{REPO}/repo/files", b'{"Data": {"Files": 5}}')
    with pytest.raises(SourceUnavailable, match="ModelScope"):
        await puller(f"ms:{REPO}")
    scope.server.add(f"/api/v1/models/{REPO}/repo/files", b'{"Success": false, "Message": "busy"}')
    with pytest.raises(SourceUnavailable, match="busy"):
        await puller(f"ms:{REPO}")


async def test_a_cut_transfer_from_modelscope_goes_on(scope: FakeScope, puller: Puller) -> None:
    scope.add(REPO, {"Tiny-Q8_0.gguf": Q8})
    path = "/oss/" + digest(Q8).removeprefix("sha256:")
    scope.cdn.files[path].drops = [150_000, 120_000]
    assert puller.content(await puller(f"ms:{REPO}")) == Q8
    assert scope.cdn.sent[path] < len(Q8) + 200_000
    assert puller.of(events.PullDone)[-1].cached is False


def test_modelscopes_address_comes_from_the_setting_or_the_environment() -> None:
    assert endpoint(DEFAULT, {}) == DEFAULT
    assert endpoint(DEFAULT, {"MODELSCOPE_ENDPOINT": "www.modelscope.ai"}) == "https://www.modelscope.ai"
    assert endpoint("https://own/", {"MODELSCOPE_ENDPOINT": "https://mirror"}) == "https://own"
