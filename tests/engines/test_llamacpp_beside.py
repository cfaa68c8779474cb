"""llama.cpp with models beside the one it serves, and the common settings under its names; starts nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pierhead.engines.base import Adapter, Beside, Mount, PlanRequest
from pierhead.engines.llamacpp import LlamaCpp
from pierhead.errors import UsageError
from pierhead.runtimes.base import Places, expand
from pierhead.store.model import ModelFile

FACTS = {
    "architecture": "llama",
    "context_length": 2048,
    "block_count": 2,
    "embedding_length": 64,
    "head_count": 4,
    "head_count_kv": 2,
    "feed_forward_length": 128,
    "vocab_size": 1000,
    "tokenizer": "gpt2",
    "weights_bytes": 1 << 20,
}
ENGINE = LlamaCpp()


def ask(*beside: Beside, extra: tuple[ModelFile, ...] = (), **settings: Any) -> PlanRequest:
    files = (ModelFile("w.gguf", 1 << 20, "weights", format="gguf"), *extra)
    wanted = ENGINE.validate(settings)
    return PlanRequest("r1", "m", Path("/models/m"), files, FACTS, wanted, 8 << 30, 2, beside=beside)


def draft(**facts: Any) -> Beside:
    files = (ModelFile("d.gguf", 1 << 20, "weights", format="gguf"),)
    return Beside("draft", "small", Path("/models/small"), files, {**FACTS, **facts})


def lora(name: str = "shout", **facts: Any) -> Beside:
    files = (ModelFile("a.gguf", 1 << 16, "lora", format="gguf"),)
    return Beside("lora", name, Path(f"/models/{name}"), files, {"architecture": "llama", **facts}, 0.5)


def test_a_draft_is_mounted_beside_and_counts_with_weights_and_cache() -> None:
    plan, alone = ENGINE.plan(ask(draft(), draft="small", context=2048)), ENGINE.plan(ask(context=2048))
    assert plan.spec.mounts == (Mount("/models/small", "/beside/0"),)
    for mounted, folder in ((True, "/beside/0"), (False, "/models/small")):
        argv, _ = expand(plan.spec, Places("py", "entry", "/model", "/s", mounted=mounted))
        assert argv[-2:] == ("--beside", folder)
        settings = json.loads(argv[argv.index("--settings") + 1])
        assert settings["draft"] == {"beside": 0, "file": "d.gguf"}
    assert plan.memory - alone.memory > (1 << 20)
    assert plan.spec.limits.memory > alone.spec.limits.memory


@pytest.mark.parametrize("facts", [{"vocab_size": 2000}, {"tokenizer": "llama"}])
def test_a_draft_with_another_vocabulary_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot draft for 'm': its vocabulary"):
        ENGINE.plan(ask(draft(**facts), draft="small"))


def test_a_draft_that_is_packaged_with_the_model_is_used() -> None:
    plan = ENGINE.plan(ask(extra=(ModelFile("draft.gguf", 5, "draft", format="gguf"),)))
    settings = json.loads(plan.spec.argv[plan.spec.argv.index("--settings") + 1])
    assert settings["draft"] == {"file": "draft.gguf"}
    assert plan.spec.mounts == ()


def test_a_packaged_drafts_cache_counts_as_that_of_one_beside() -> None:
    def memory(*beside: Beside, extra: tuple[ModelFile, ...] = (), **settings: Any) -> int:
        return ENGINE.plan(ask(*beside, extra=extra, context=2048, parallel=4, **settings)).memory

    packaged = ModelFile("draft.gguf", 1 << 20, "draft", format="gguf")
    assert memory(extra=(packaged,)) == memory(draft(), draft="small")
    small = ModelFile("draft.gguf", 1 << 17, "draft", format="gguf")  # half as wide and deep
    assert (1 << 17) + (memory(extra=(packaged,)) - memory() - (1 << 20)) // 4 == memory(extra=(small,)) - memory()


def test_adapters_beside_are_loaded_but_count_only_for_requests_that_name_them() -> None:
    packaged = ModelFile("own.gguf", 5, "lora", format="gguf", scale=0.8)
    plan = ENGINE.plan(ask(lora(), lora("other"), extra=(packaged,)))
    settings = json.loads(plan.spec.argv[plan.spec.argv.index("--settings") + 1])
    assert settings["lora"] == [
        {"file": "own.gguf", "scale": 0.8},
        {"beside": 0, "file": "a.gguf", "scale": 0.0},
        {"beside": 1, "file": "a.gguf", "scale": 0.0},
    ]
    assert plan.spec.adapters == (Adapter("shout", 1), Adapter("other", 2))
    assert plan.spec.fixed == ((0, 0.8),)
    with pytest.raises(UsageError, match="is a LoRA for gemma3"):
        ENGINE.plan(ask(lora(architecture="gemma3")))
    with pytest.raises(UsageError, match="is no LoRA adapter"):
        ENGINE.plan(ask(Beside("lora", "small", Path("/models/small"), draft().files, FACTS)))


def test_common_settings_have_their_names_here() -> None:
    assert ENGINE.validate({"kv_cache_type": "q8_0"}) == {
        "cache_type_k": "GGML_TYPE_Q8_0",
        "cache_type_v": "GGML_TYPE_Q8_0",
    }
    assert ENGINE.validate({"normalize": "false", "pooling": "cls"}) == {
        "embd_normalize": -1,
        "pooling_type": "LLAMA_POOLING_TYPE_CLS",
    }
    assert ENGINE.validate({"reasoning_parser": "none", "reasoning_budget": 0, "draft_tokens": 8}) == {
        "reasoning_format": "COMMON_REASONING_FORMAT_NONE",
        "sampling.reasoning_budget_tokens": 0,
        "speculative.draft.n_max": 8,
    }
    for wrong in ({"kv_cache_type": "fp8"}, {"pooling": "max"}, {"tool_parser": "hermes"}):
        with pytest.raises(UsageError):
            ENGINE.validate(wrong)
