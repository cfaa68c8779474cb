"""SGLang's launch plans; that it runs was never seen, for there is no SGLang without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.conformance.test_engine import Sample

from pierhead.engines.base import Plan, PlanRequest
from pierhead.engines.sglang import FACTS, SgLang
from pierhead.errors import UsageError
from pierhead.store.model import ModelFile

HERE = Path(__file__).parent


def plan(extra: tuple[str, ...] = (), /, **settings: Any) -> Plan:
    text = (HERE.parent / "conformance" / "engines" / "sglang.json").read_bytes()
    given = msgspec.json.decode(text, type=Sample)
    files = (*given.files, *(ModelFile(name, 1000, "config") for name in extra))
    return SgLang().plan(PlanRequest("r1", "m", Path("/m"), files, given.metadata, settings, 64 << 30, 2))


def test_it_runs_behind_the_bridge_in_its_own_image_on_the_gpus_that_were_asked_for() -> None:
    spec = plan(context=2048, parallel=8, gpus="1", tp_size=1).spec
    assert {"--port=$(PORT)", "--context-length=2048", "--max-running-requests=8", "--tp-size=1"} <= set(spec.argv)
    assert "--enable-metrics" in spec.argv
    assert spec.devices == ("nvidia.com/gpu=1",)
    assert spec.image is not None
    assert "sglang" in spec.image.base
    assert spec.argv[:3] == ("$(PYTHON)", "-I", "$(ENTRY)")


def test_adapters_of_the_folder_are_given_by_their_place() -> None:
    spec = plan(("loras/poet/adapter_config.json",)).spec
    assert spec.argv[-2:] == ("--lora-paths", "poet=$(MODEL_DIR)/loras/poet")
    assert "--enable-lora" in spec.argv
    with pytest.raises(UsageError, match="has no folder 'gone'"):
        plan(lora="x=gone")


@pytest.mark.parametrize("name", ["host", "api-key", "dist-init-addr", "model-path"])
def test_what_would_reach_out_cannot_be_set(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be set"):
        SgLang().validate({name: "x"})


def test_it_says_that_it_is_not_tested() -> None:
    assert "All of it" in FACTS.untested
