"""What Triton is given of a model's files and settings, and how its entry program writes it down."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pierhead.config import Settings
from pierhead.engines import triton_repository as repository
from pierhead.engines.base import PlanRequest
from pierhead.engines.registry import choose, engines
from pierhead.engines.triton import ENTRY, Triton
from pierhead.errors import UsageError
from pierhead.store.classify import classify
from pierhead.store.model import ModelFile


def files(*names: str) -> tuple[ModelFile, ...]:
    return tuple(ModelFile(n, 1000, role, format=form) for n in names for role, form in [classify(n)])


def ask(*names: str, model: str = "me/shop:1", **settings: Any) -> PlanRequest:
    return PlanRequest("r1", model, Path("/m"), files(*names), {}, settings, 8 << 30, 2)


@pytest.fixture(scope="module")
def entry() -> ModuleType:
    found = importlib.util.spec_from_file_location("triton_entry", ENTRY / "__main__.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_a_repository_keeps_its_models_and_the_only_ensemble_is_meant_by_the_models_name() -> None:
    made = repository.plan(
        "shop", files("a/1/model.onnx", "a/config.pbtxt", "b/2/model.py", "pipe/config.pbtxt", "README.md"), {}
    )
    assert [m.name for m in made.models] == ["a", "b", "pipe"]
    assert made.main == "pipe"
    assert made.models[0].files == {"1/model.onnx": "a/1/model.onnx", "config.pbtxt": "a/config.pbtxt"}
    assert "shop/models/NAME: a, b" in made.notes[0]


def test_a_repository_may_lie_below_other_folders_and_one_model_may_be_the_whole() -> None:
    deep = repository.plan("m", files("x/repo/a/1/model.plan", "x/repo/b/1/model.plan"), {})
    assert [m.name for m in deep.models] == ["a", "b"]
    one = repository.plan("me/my model:v1", files("config.pbtxt", "1/model.onnx", "1/vocab.txt"), {})
    assert one.main == "my-model"
    assert sorted(one.models[0].files) == ["1/model.onnx", "1/vocab.txt", "config.pbtxt"]


def test_a_model_whose_folder_gets_another_name_says_that_one(entry: ModuleType) -> None:
    made = repository.plan("acme/prices:latest", files("config.pbtxt", "1/model.py"), {"max_batch_size": 4})
    assert made.models[0].name == "prices"
    text = entry.merged('name: "my_model"\nbackend: "python"\n', made.models[0].config)
    assert text == 'backend: "python"\nmax_batch_size: 4\nname: "prices"\n'
    kept = repository.plan("shop", files("a/config.pbtxt", "a/1/model.py"), {})
    assert kept.models[0].config == {}


def test_folders_that_end_alike_are_told_apart_by_those_above_them() -> None:
    made = repository.plan("x", files("en/cls/1/model.onnx", "de/cls/1/model.onnx", "fr/1/model.onnx"), {})
    assert [m.name for m in made.models] == ["de-cls", "en-cls", "fr"]
    assert made.models[0].config == {"name": 'name: "de-cls"'}
    with pytest.raises(UsageError, match="more than one model 'a-b'"):
        repository.plan("x", files("c/a b/1/model.onnx", "a-b/1/model.onnx", "a b/1/model.onnx"), {})


def test_a_bare_model_gets_a_configuration_and_its_weights_beside_it() -> None:
    made = repository.plan("m", files("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q8.onnx"), {})
    assert made.models[0].files == {"1/model.onnx": "onnx/model.onnx", "1/model.onnx_data": "onnx/model.onnx_data"}
    assert made.models[0].config == {"backend": 'backend: "onnxruntime"'}
    other = repository.plan("m", files("onnx/model.onnx", "onnx/model_q8.onnx"), {"file": "onnx/model_q8.onnx"})
    assert other.models[0].files["1/model.onnx"] == "onnx/model_q8.onnx"


@pytest.mark.parametrize("setting", [{"file": "no.onnx"}, {"model": "c"}, {"load": ("a", "c")}])
def test_what_is_asked_for_and_is_not_there_is_refused_with_what_is(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        repository.plan("m", files("a/1/model.onnx", "b/1/model.onnx"), setting)
    assert "a" in (refused.value.hint or "")


def test_settings_become_triton_s_own_words() -> None:
    wanted = Triton().validate(
        {
            "preferred-batch-size": "4,8",
            "max-queue-delay": "500",
            "instances": 2,
            "kind": "CPU",
            "max_batch_size": 16,
            "max_queue_size": 100,
        }
    )
    assert list(repository.configuration(wanted).values()) == [
        "max_batch_size: 16",
        "dynamic_batching { preferred_batch_size: 4 preferred_batch_size: 8 max_queue_delay_microseconds: 500 "
        "default_queue_policy { max_queue_size: 100 } }",
        "instance_group [ { count: 2 kind: KIND_CPU } ]",
    ]


@pytest.mark.parametrize(("name", "value"), [("instances", -1), ("kind", "tpu"), ("release", "25"), ("threads", "x")])
def test_a_value_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        Triton().validate({name: value})


def test_settings_take_the_place_of_what_a_configuration_says_and_leave_the_rest(entry: ModuleType) -> None:
    text = (
        'name: "a" # mine {\n'
        "max_batch_size: 4\n"
        'input [ { name: "x]" data_type: TYPE_FP32\n dims: [ -1 ] } ]\n'
        "dynamic_batching {\n  preferred_batch_size: [ 2 ]\n}\n"
        'instance_group\n[\n  { count: 1 }\n]\nbackend: "python"'
    )
    wanted = {"dynamic_batching": "dynamic_batching { }", "instance_group": "instance_group [ { count: 3 } ]"}
    made = entry.merged(text, wanted)
    assert made == (
        'name: "a" # mine {\n'
        "max_batch_size: 4\n"
        'input [ { name: "x]" data_type: TYPE_FP32\n dims: [ -1 ] } ]\n'
        'backend: "python"\n'
        "dynamic_batching { }\ninstance_group [ { count: 3 } ]\n"
    )


def test_an_onnx_model_is_given_to_the_python_backend_only_where_there_is_no_other(
    entry: ModuleType, tmp_path: Path
) -> None:
    model = {"name": "a", "files": {"1/model.onnx": "w.onnx", "config.pbtxt": "c"}, "config": {}, "threads": 2}
    (tmp_path / "w.onnx").touch()
    (tmp_path / "c").write_text('platform: "onnxruntime_onnx"\nmax_batch_size: 8\n')
    entry.write(model, str(tmp_path), str(tmp_path / "with"), ["onnxruntime", "python"])
    assert (tmp_path / "with/a/config.pbtxt").read_text() == 'platform: "onnxruntime_onnx"\nmax_batch_size: 8\n'
    entry.write(model, str(tmp_path), str(tmp_path / "without"), ["python"])
    text = (tmp_path / "without/a/config.pbtxt").read_text()
    assert 'backend: "python"' in text
    assert "platform" not in text
    assert (tmp_path / "without/a/1/model.py").samefile(ENTRY / "onnx_model.py")


def test_the_reason_of_a_failed_start_is_triton_s_own(entry: ModuleType) -> None:
    said = [
        'E1125 22:41:14.374186 8566 server.cc:241] "CudaDriverHelper has not been initialized."',
        "E1125 22:41:15.3 8566 model_lifecycle.cc:642] \"failed to load 'a' version 1: Internal: no such\\nthing\"",
        "error: creating server: Internal - failed to load all models",
    ]
    assert entry.reason(said) == "the model could not be loaded: a: Internal: no such thing"
    assert entry.reason(said[:1]) == ""
    parse = "[libprotobuf ERROR text_format.cc:335] Error parsing text-format inference.ModelConfig: 3:1: Expected x"
    assert "3:1: Expected x" in entry.reason([parse])


def test_a_model_made_for_triton_goes_to_it_and_a_gguf_does_not() -> None:
    known = engines(Settings())
    assert choose(known, files("a/config.pbtxt", "a/1/model.onnx")).name == "triton"
    assert choose(known, files("model.gguf")).name == "llamacpp"
    assert choose(known, files("m/model.gguf", "m/config.pbtxt")).name == "triton"


def test_a_plan_of_tensorrt_runs_in_nvidia_s_image_with_its_gpus() -> None:
    spec = Triton().plan(ask("model.plan")).spec
    assert spec.image is not None
    assert spec.image.base.startswith("nvcr.io/nvidia/tritonserver:")
    assert spec.image.requirements == ()
    assert spec.devices == ("nvidia.com/gpu=all",)
    assert Triton().plan(ask("model.plan", gpus="0,1", release="25.06")).spec.devices[1] == "nvidia.com/gpu=1"
    assert Triton().plan(ask("model.onnx")).spec.devices == ()


def test_the_engine_is_asked_by_the_name_that_it_has() -> None:
    assert Triton().plan(ask("a/1/model.py", "b/1/model.py", model="b")).spec.called == "b"
    assert Triton().plan(ask("model.onnx", model="hf.co/x/Bert Base:latest")).spec.called == "Bert-Base"
