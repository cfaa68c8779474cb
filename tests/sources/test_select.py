"""Which files of a repository make the model: listings of the shapes that hubs have, and what is taken of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import CorruptData, NotFound, PierError, UsageError
from pierhead.sources.choose import Entry
from pierhead.sources.select import Selection, select

SHARDED = """
    .gitattributes LICENSE README.md USE_POLICY.md config.json generation_config.json
    model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json
    special_tokens_map.json tokenizer.json tokenizer_config.json chat_template.jinja figures/benchmark.png
    original/consolidated.00.pth original/params.json original/tokenizer.model
"""
MISTRAL = """
    README.md config.json consolidated-00001-of-00002.safetensors consolidated-00002-of-00002.safetensors
    consolidated.safetensors.index.json model-00001-of-00001.safetensors model.safetensors.index.json params.json
    tekken.json tokenizer.json
"""
SENTENCES = """
    .gitattributes 1_Pooling/config.json 2_Dense/config.json 2_Dense/model.safetensors 2_Dense/pytorch_model.bin
    README.md config.json config_sentence_transformers.json data_config.json model.safetensors modules.json
    onnx/model.onnx onnx/model_O4.onnx onnx/model_qint8_avx512.onnx openvino/openvino_model.bin
    openvino/openvino_model.xml pytorch_model.bin rust_model.ot sentence_bert_config.json tf_model.h5 tokenizer.json
    train_script.py vocab.txt
"""
WEB = """
    config.json tokenizer.json onnx/decoder_model.onnx onnx/decoder_model_merged.onnx onnx/decoder_model_merged_q4.onnx
    onnx/decoder_model_quantized.onnx onnx/decoder_model_merged_quantized.onnx onnx/decoder_with_past_model.onnx
    onnx/encoder_model.onnx onnx/encoder_model.onnx_data onnx/encoder_model_q4.onnx onnx/encoder_model_q4.onnx_data
    onnx/encoder_model_quantized.onnx onnx/encoder_model_fp16.onnx onnx/decoder_model_merged_fp16.onnx
"""
GENAI = """
    README.md config.json
    cpu_and_mobile/cpu-int4-rtn-block-32/genai_config.json cpu_and_mobile/cpu-int4-rtn-block-32/model.onnx
    cpu_and_mobile/cpu-int4-rtn-block-32/model.onnx.data cpu_and_mobile/cpu-int4-rtn-block-32/tokenizer.json
    cuda/cuda-fp16/genai_config.json cuda/cuda-fp16/model.onnx cuda/cuda-fp16/model.onnx.data
    cuda/cuda-fp16/tokenizer.json
"""
PIPELINE = """
    README.md model_index.json sd.safetensors scheduler/scheduler_config.json text_encoder/config.json
    text_encoder/model.safetensors text_encoder/model.fp16.safetensors text_encoder/pytorch_model.bin
    tokenizer/vocab.json unet/config.json unet/diffusion_pytorch_model-00001-of-00002.safetensors
    unet/diffusion_pytorch_model-00002-of-00002.safetensors unet/diffusion_pytorch_model.safetensors.index.json
    unet/diffusion_pytorch_model.fp16.safetensors vae/config.json vae/diffusion_pytorch_model.safetensors
"""


def listing(text: str, size: int = 1000) -> list[Entry]:
    return [Entry(path, size) for path in text.split()]


def names(found: Selection, role: str = "") -> set[str]:
    return {part.name for part in found.parts if not role or part.role == role}


def test_a_sharded_model_comes_with_all_that_it_needs_and_nothing_else() -> None:
    found = select(listing(SHARDED), "", "x")
    assert names(found) == set(SHARDED.split()) - {
        ".gitattributes",
        "figures/benchmark.png",
        "original/consolidated.00.pth",
        "original/params.json",
        "original/tokenizer.model",
    }
    assert names(found, "weights") == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert names(found, "license") == {"LICENSE", "USE_POLICY.md"}
    assert names(found, "template") == {"chat_template.jinja"}
    assert names(found, "doc") == {"README.md"}
    assert found.label == ""


def test_weights_that_are_there_twice_come_once() -> None:
    found = select(listing(MISTRAL), "", "x")
    assert names(found, "weights") == {"model-00001-of-00001.safetensors"}
    assert "consolidated.safetensors.index.json" not in names(found)
    other = select([e for e in listing(MISTRAL) if not e.path.startswith("model")], "", "x")
    assert len(names(other, "weights")) == 2
    assert "params.json" in names(other)


def test_sentence_transformers_keep_their_modules_and_leave_other_frameworks_behind() -> None:
    found = select(listing(SENTENCES), "", "x")
    assert names(found, "weights") == {"model.safetensors", "2_Dense/model.safetensors"}
    assert {"1_Pooling/config.json", "2_Dense/config.json", "modules.json", "vocab.txt"} <= names(found)
    assert not any(part.name.endswith((".bin", ".ot", ".h5", ".xml", ".onnx")) for part in found.parts)
    assert "train_script.py" not in names(found)


@pytest.mark.parametrize(
    ("tag", "weights", "label"),
    [
        ("onnx", {"onnx/model.onnx"}, "onnx"),
        ("onnx-o4", {"onnx/model_O4.onnx"}, "onnx-o4"),
        ("qint8_avx512", {"onnx/model_qint8_avx512.onnx"}, "qint8_avx512"),
        ("safetensors", {"model.safetensors", "2_Dense/model.safetensors"}, "safetensors"),
    ],
)
def test_a_tag_names_a_format_or_a_variant(tag: str, weights: set[str], label: str) -> None:
    found = select(listing(SENTENCES), tag, "x")
    assert names(found, "weights") == weights
    assert found.label == label
    assert select(listing(SENTENCES), label, "x") == found


@pytest.mark.parametrize(
    ("tag", "weights"),
    [
        ("", {"decoder_model_merged.onnx", "encoder_model.onnx", "encoder_model.onnx_data"}),
        ("fp32", {"decoder_model_merged.onnx", "encoder_model.onnx", "encoder_model.onnx_data"}),
        ("q8", {"decoder_model_merged_quantized.onnx", "encoder_model_quantized.onnx"}),
        ("quantized", {"decoder_model_merged_quantized.onnx", "encoder_model_quantized.onnx"}),
        ("FP16", {"decoder_model_merged_fp16.onnx", "encoder_model_fp16.onnx"}),
        ("q4", {"decoder_model_merged_q4.onnx", "encoder_model_q4.onnx", "encoder_model_q4.onnx_data"}),
    ],
)
def test_graphs_of_one_precision_come_together_with_their_weights(tag: str, weights: set[str]) -> None:
    found = select(listing(WEB), tag, "x")
    assert names(found, "weights") == {f"onnx/{name}" for name in weights}
    assert {part.format for part in found.parts if part.name.endswith("_data")} <= {"data"}
    assert {"config.json", "tokenizer.json"} <= names(found)


def test_a_precision_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(NotFound, match="bnb4") as caught:
        select(listing(WEB), "bnb4", "org/x")
    assert "default (3.0 kB)" in str(caught.value.hint)
    assert "q4 (3.0 kB)" in str(caught.value.hint)


def test_folders_are_variants_too() -> None:
    found = select(listing(GENAI), "cpu-int4-rtn-block-32", "x")
    folder = "cpu_and_mobile/cpu-int4-rtn-block-32/"
    assert names(found, "weights") == {f"{folder}model.onnx", f"{folder}model.onnx.data"}
    assert names(found, "config") == {"config.json", f"{folder}genai_config.json", f"{folder}tokenizer.json"}


def test_a_pipeline_comes_with_its_folders_in_one_precision() -> None:
    plain = select(listing(PIPELINE), "", "x")
    assert names(plain, "weights") == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"} <= names(plain)
    half = select(listing(PIPELINE), "fp16", "x")
    assert names(half, "weights") == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert "unet/diffusion_pytorch_model.safetensors.index.json" not in names(half)


def test_gguf_comes_first_and_other_formats_by_tag() -> None:
    both = listing(SHARDED + " gemma-2b.gguf")
    assert names(select(both, "", "x"), "weights") == {"gemma-2b.gguf"}
    assert len(names(select(both, "safetensors", "x"), "weights")) == 2


@pytest.mark.parametrize("path", ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"])
def test_a_shard_stands_for_its_model(path: str) -> None:
    assert names(select(listing(SHARDED), "", "x", path), "weights") == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_a_file_stands_for_itself_with_its_projector_and_licence() -> None:
    entries = listing("a-Q4_0.gguf a-Q8_0.gguf mmproj-F16.gguf LICENSE q/b-Q4_0.gguf")
    assert names(select(entries, "", "x", "a-Q8_0.gguf")) == {"a-Q8_0.gguf", "mmproj-F16.gguf", "LICENSE"}
    assert names(select(entries, "", "x", "q/b-Q4_0.gguf"), "weights") == {"b-Q4_0.gguf"}


@pytest.mark.parametrize(
    ("files", "tag", "path", "error", "words"),
    [
        ("config.json pytorch_model.bin", "", "", UsageError, "pickles"),
        ("config.json README.md", "", "", NotFound, "no model"),
        ("adapter_config.json adapter_model.safetensors", "", "", UsageError, "adapter"),
        ("model-00001-of-00003.safetensors model-00003-of-00003.safetensors", "", "", CorruptData, "2 of the 3 parts"),
        ("flux-dev.safetensors ae.safetensors", "", "", UsageError, "several models"),
        ("mmproj-F16.gguf", "", "", NotFound, "projector"),
        ("a.gguf", "onnx", "", NotFound, "format onnx"),
        ("a.gguf", "", "b.gguf", NotFound, "no file b.gguf"),
        ("a.gguf config.json", "", "config.json", UsageError, "not a model's weights"),
        ("a.gguf", "Q4_0", "a.gguf", UsageError, "a file and a tag"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_fetched(
    files: str, tag: str, path: str, error: type[PierError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        select(listing(files), tag, "org/x", path)
    assert caught.value.hint


def test_one_of_several_independent_files_is_chosen_by_its_name() -> None:
    entries = listing("flux-dev.safetensors ae.safetensors README.md")
    assert names(select(entries, "ae", "x"), "weights") == {"ae.safetensors"}


NAMES = st.sampled_from(
    [word for text in (SHARDED, MISTRAL, SENTENCES, WEB, GENAI, PIPELINE) for word in text.split()]
    + ["a-Q4_0.gguf", "b-Q8_0-00001-of-00002.gguf", "mmproj.gguf", "x.dduf", "weird\u00e9/-.safetensors", ".onnx", "/"]
)


@given(st.lists(NAMES, unique=True, max_size=30), st.sampled_from(["", "q4", "fp16", "onnx", "onnx-q8", "Q8_0", "-"]))
def test_any_listing_is_either_a_model_or_an_error_with_a_next_step(files: list[str], tag: str) -> None:
    entries = [Entry(name, 10) for name in files]
    try:
        found = select(entries, tag, "x")
    except PierError as error:
        if not error.hint:
            pytest.fail(f"no next step in {error}")
        return
    taken = [part.name for part in found.parts]
    assert any(part.role == "weights" for part in found.parts)
    assert len(set(taken)) == len(taken)
    assert {part.entry.path for part in found.parts} <= set(files)
    if found.label:
        assert select(entries, found.label, "x").parts == found.parts


def test_whisper_s_sizes_and_quantizations_are_chosen_by_tag() -> None:
    entries = listing(
        ".gitattributes README.md ggml-base.bin ggml-base.en.bin ggml-large-v3-turbo-q5_0.bin ggml-tiny.bin"
        " ggml-tiny-encoder.mlmodelc.zip ggml-silero-v5.1.2.bin"
    )
    found = select(entries, "base.en", "hf://ggerganov/whisper.cpp")
    assert names(found, "weights") == {"ggml-base.en.bin"}
    assert found.parts[0].format == "ggml"
    assert names(select(entries, "large-v3-turbo-q5_0", "it"), "weights") == {"ggml-large-v3-turbo-q5_0.bin"}
    assert names(select(entries, "", "it", "ggml-tiny.bin"), "weights") == {"ggml-tiny.bin"}
    with pytest.raises(UsageError, match="several models") as several:
        select(entries, "", "it")
    assert "base.en" in (several.value.hint or "")
    assert select(listing("ggml-tiny.bin LICENSE"), "", "it").parts[0].name == "ggml-tiny.bin"
