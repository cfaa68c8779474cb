"""vLLM's launch plans: settings as its own flags, memory, other models in the folder; and the reason in its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.conformance.test_engine import Sample

from pierhead.engines import vllm_entry
from pierhead.engines.base import Beside, Plan, PlanRequest
from pierhead.engines.gpus import Device
from pierhead.engines.huggingface import kind
from pierhead.engines.vllm import Vllm
from pierhead.errors import OutOfMemory, UsageError
from pierhead.formats.hf_config import shape
from pierhead.store.model import ModelFile

HERE = Path(__file__).parent
GIB = 1 << 30


def plan(
    free: int = 64 * GIB,
    extra: tuple[str, ...] = (),
    /,
    beside: tuple[Beside, ...] = (),
    devices: tuple[Device, ...] = (),
    metadata: dict[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    text = (HERE.parent / "conformance" / "engines" / "vllm.json").read_bytes()
    given = msgspec.json.decode(text, type=Sample)
    request = given.metadata | (metadata or {})
    files = (*given.files, *(ModelFile(name, 1000, "weights" if "safetensors" in name else "config") for name in extra))
    return Vllm().plan(
        PlanRequest(
            "r1",
            "m",
            Path("/m"),
            files,
            request,
            settings,
            free,
            2,
            beside=beside,
            adapters=Path("/loras/r1"),
            devices=devices,
        )
    )


def flags(made: Plan) -> list[str]:
    return list(made.spec.argv[made.spec.argv.index("--") + 1 :])


def test_settings_of_all_engines_become_vllms_own_flags() -> None:
    made = plan(context=2048, parallel=3, threads=5)
    assert {"--max-model-len=2048", "--max-num-seqs=3"} <= set(flags(made))
    assert made.spec.env["OMP_NUM_THREADS"] == "5"
    assert made.context == 2048


def test_every_flag_of_vllm_can_be_set_and_has_the_type_that_vllm_gives_it() -> None:
    made = plan(
        **{"enable-prefix-caching": "off", "kv-cache-dtype": "fp8", "block-size": "32", "--stream-interval": 4},
        generation_config="vllm",
        limit_mm_per_prompt='{"image": 2}',
    )
    wanted = {"--no-enable-prefix-caching", "--kv-cache-dtype=fp8", "--block-size=32", "--stream-interval=4"}
    assert wanted | {"--generation-config=vllm", '--limit-mm-per-prompt={"image":2}'} <= set(flags(made))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("kv-cache-dtype", "fp9", "fp8"),
        ("block-size", "many", "int"),
        ("enable-prefix-caching", "perhaps", "true or false"),
        ("context", "-5", "number"),
        ("limit-mm-per-prompt", "{", "JSON"),
        ("max-num-batched-tokens", "1;rm", "K, M or G"),
        ("chat-template", "--uds=/elsewhere", "text"),
        ("tool_parser", "hermez", "hermes or"),
        ("reasoning_parser", "qwen9", "qwen3 or"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_it_must_be(name: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=name) as refused:
        Vllm().validate({name: value})
    assert words in (refused.value.hint or "")


@pytest.mark.parametrize("name", ["uds", "api-key", "--host", "middleware", "allowed-origins", "served_model_name"])
def test_what_would_reach_out_or_belongs_to_the_gateway_cannot_be_set(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be set"):
        Vllm().validate({name: "x"})


def test_it_runs_without_network_and_tells_nobody() -> None:
    env = plan().spec.env
    assert {env[n] for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")} == {"1"}


def test_on_the_cpu_the_cache_is_as_large_as_all_requests_need_and_counted() -> None:
    made, twice = plan(context=1024, parallel=2), plan(context=1024, parallel=4)
    per_token = 30 * 2 * 3 * 64 * 2  # layers, K and V, heads, their width, bytes
    assert f"--kv-cache-memory-bytes={(2 * 8 + 1) * 128 * per_token}" in flags(made)
    assert twice.memory - made.memory >= 2048 * per_token


def test_where_nobody_names_a_context_the_largest_that_fits_is_taken() -> None:
    roomy, tight = plan(parallel=4), plan(2500 << 20, parallel=4)
    assert roomy.context == 8192
    assert 512 <= tight.context < 8192
    assert tight.memory <= 2500 << 20
    with pytest.raises(OutOfMemory, match="vLLM itself") as refused:
        plan(1 << 30)
    assert refused.value.data["needed"] > refused.value.data["free"]


def test_a_parser_of_tool_calls_turns_them_on() -> None:
    assert {"--tool-call-parser=hermes", "--enable-auto-tool-choice"} <= set(flags(plan(tool_call_parser="hermes")))
    assert "--enable-auto-tool-choice" not in flags(plan())


def test_adapters_in_the_folder_are_served_under_their_names_and_more_can_come_later() -> None:
    made = plan(64 * GIB, ("adapters/poet/adapter_config.json", "adapters/poet/adapter_model.safetensors"))
    words = flags(made)
    assert "--enable-lora" in words
    assert words[words.index("--lora-modules") + 1] == '{"name":"poet","path":"$(MODEL_DIR)/adapters/poet"}'
    assert made.spec.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    with pytest.raises(UsageError, match="has no folder 'nowhere'"):
        plan(lora="x=nowhere")


def lora(name: str, rank: int) -> Beside:
    files = (ModelFile("adapter_model.safetensors", 1000, "lora"), ModelFile("adapter_config.json", 100, "lora"))
    return Beside("lora", name, Path(f"/store/{name}"), files, {"format": "safetensors", "rank": rank})


def test_adapters_of_the_store_are_loaded_from_one_folder_that_it_sees_and_runs_in() -> None:
    made = plan(beside=(lora("poet", 8), lora("big", 40)))
    assert made.spec.loading is not None
    assert made.spec.loading.folder == "/loras/r1"
    assert [(m.source, m.read_only) for m in made.spec.mounts] == [("/loras/r1", True)]
    assert made.spec.argv[made.spec.argv.index("--work") + 1] == "$(MOUNT0)"
    assert {"--max-lora-rank=64", "--max-loras=4"} <= set(flags(made))
    assert "--lora-modules" not in flags(made), "they are loaded once it runs, like those that come later"
    assert made.memory > plan().memory
    assert plan(enable_lora=True).spec.loading is not None
    assert plan().spec.loading is None
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in plan().spec.env


def test_a_model_that_drafts_is_one_of_the_folder_or_of_the_store_and_never_fetched() -> None:
    config = {"model": "draft", "num_speculative_tokens": 3}
    made = plan(64 * GIB, ("draft/config.json", "draft/model.safetensors"), speculative_config=config)
    assert '--speculative-config={"model":"$(MODEL_DIR)/draft","num_speculative_tokens":3}' in flags(made)
    with pytest.raises(UsageError, match="has no folder"):
        plan(speculative_config={"model": "someone/elses", "num_speculative_tokens": 3})
    assert '--speculative-config={"method":"ngram"}' in flags(plan(speculative_config={"method": "ngram"}))


def draft(**metadata: Any) -> Beside:
    text = (HERE.parent / "conformance" / "engines" / "vllm.json").read_bytes()
    given = msgspec.json.decode(text, type=Sample)
    return Beside("draft", "small", Path("/store/small"), given.files, {**given.metadata, **metadata})


def test_a_draft_of_the_store_is_mounted_and_its_cache_and_weights_are_counted() -> None:
    made = plan(beside=(draft(),), draft="small", draft_tokens=5, context=1024)
    told = '{"method":"draft_model","model":"$(MOUNT0)","num_speculative_tokens":5}'
    assert f"--speculative-config={told}" in flags(made)
    assert made.spec.mounts[0].source == "/store/small"
    alone = plan(context=1024)
    cache = [int(f.partition("=")[2]) for m in (made, alone) for f in flags(m) if "kv-cache-memory" in f]
    assert cache[0] == 2 * cache[1]
    assert made.memory > alone.memory + 250_000_000
    with pytest.raises(UsageError, match="its vocabulary has 5 tokens"):
        plan(beside=(draft(vocab_size=5),), draft="small")
    with pytest.raises(UsageError, match="not at hand"):
        plan(draft="small")


def test_tokens_are_drafted_from_the_text_itself_when_asked_for_and_in_one_way_only() -> None:
    told = next(f for f in flags(plan(ngram=True, draft_tokens=6)) if f.startswith("--speculative-config="))
    assert '"method":"ngram","num_speculative_tokens":6' in told
    with pytest.raises(UsageError, match="in one way only"):
        plan(ngram=True, speculative_config={"method": "ngram"})


def test_common_words_of_pooling_become_vllms_config_and_its_own_win() -> None:
    made = plan(pooling="cls", normalize=False)
    assert '--pooler-config={"pooling_type":"CLS","use_activation":false}' in flags(made)
    made = plan(pooling="cls", pooler_config={"pooling_type": "LAST"})
    assert '--pooler-config={"pooling_type":"LAST"}' in flags(made)
    with pytest.raises(UsageError, match="pooling"):
        plan(pooling="rank")


def test_the_image_for_cpus_has_the_build_of_pytorch_that_processes_have() -> None:
    made = plan()
    assert made.spec.image is not None
    assert made.spec.environment is not None
    assert made.spec.image.torch == made.spec.environment.torch == "cpu"


def test_on_cuda_it_is_vllms_own_image_with_the_gpus_that_were_asked_for() -> None:
    made = plan(device="cuda", gpus="0,1", **{"tensor-parallel-size": 2, "enable-sleep-mode": True})
    assert made.spec.image is not None
    assert "vllm/vllm-openai" in made.spec.image.base
    assert made.spec.devices == ("nvidia.com/gpu=0", "nvidia.com/gpu=1")
    assert not any("kv-cache-memory" in flag or "enforce-eager" in flag for flag in flags(made))
    assert made.spec.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert plan().spec.devices == ()
    awake = plan(device="cuda")
    assert made.memory - awake.memory > 250_000_000, "asleep, the weights are in the machine's own memory"
    assert made.spec.limits.memory > awake.spec.limits.memory


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"class": "LlamaForCausalLM", "chat_template": "x"}, "chat"),
        ({"class": "GPT2LMHeadModel"}, "write"),
        ({"class": "BertModel", "causal": False}, "embed"),
        ({"class": "BertForSequenceClassification", "causal": False}, "classify"),
        ({"class": "BertForSequenceClassification", "labels": 1}, "rank"),
        ({}, "write"),
    ],
)
def test_the_class_of_a_model_tells_what_it_is_for(metadata: dict[str, Any], found: str) -> None:
    assert kind(metadata) == found


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"id2label": {"0": "LABEL_0"}}, "rank"),
        ({"num_labels": 1}, "rank"),
        ({"id2label": {"0": "bad", "1": "good"}}, "classify"),
        ({}, "classify"),
        ({"id2label": "nonsense"}, "classify"),
    ],
)
def test_a_classifier_with_one_label_ranks(config: dict[str, Any], found: str) -> None:
    made = shape({"model_type": "bert", "architectures": ["BertForSequenceClassification"], **config})
    assert kind(made) == found


LOGS = [
    (
        [
            "(VllmWorker-0 pid=21797) ERROR 11-26 00:34:58 [multiproc_executor.py:953]     raise ValueError(",
            "(VllmWorker-0 pid=21797) ERROR 11-26 00:34:58 [multiproc_executor.py:953] ValueError: Available memory on",
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        ],
        "Available memory on",
    ),
    (
        [
            "(EngineCore pid=22) ERROR 11-25 22:52:09 [core.py:1100] Traceback (most recent call last):",
            "(EngineCore pid=22) ERROR 11-25 22:52:09 [core.py:1100] RuntimeError: The size of tensor a (3) must match",
            "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.",
        ],
        "The size of tensor a (3) must match",
    ),
    (
        [
            "(APIServer pid=2) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            "(APIServer pid=2)   Value error, User-specified max_model_len (16384) is too large. [type=value_error]",
            "(APIServer pid=2)     For further information visit https://errors.pydantic.dev/2/v/value_error",
        ],
        "User-specified max_model_len (16384) is too large.",
    ),
    (["api_server.py: error: argument --dtype: invalid choice: 'x'"], "argument --dtype: invalid choice: 'x'"),
    (["(APIServer pid=2) INFO 11-25 22:52:09 [api.py:1] no error: all is well", ""], ""),
]


@pytest.mark.parametrize(("lines", "said"), LOGS)
def test_of_a_long_log_the_first_reason_is_told(lines: list[str], said: str) -> None:
    reason = vllm_entry.Reason()
    for line in lines:
        reason.hear(line)
    assert reason.said == said
