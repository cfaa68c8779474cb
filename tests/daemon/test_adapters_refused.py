"""LoRA adapters that a model's engine could not start with are refused when they are added."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import msgspec
import pytest
from tests.conformance.test_engine import Sample

from pierhead.config import Settings
from pierhead.daemon.modelbook import ModelBook
from pierhead.daemon.modelsettings import ModelDesk
from pierhead.daemon.wire import SettingsChange
from pierhead.engines.registry import engines
from pierhead.errors import UsageError
from pierhead.fleet.layers import Layers, plain
from pierhead.fleet.supervisor import Supervisor
from pierhead.store.layout import Store
from pierhead.store.model import ModelFile, ModelRecord

SAMPLES = Path(__file__).parents[1] / "conformance" / "engines"


def record(name: str, files: tuple[ModelFile, ...], metadata: dict[str, Any]) -> ModelRecord:
    digest = f"sha256:{name[0] * 64}"
    return ModelRecord(name=name, names=(name,), digest=digest, size=1, created="", files=files, metadata=metadata)


def desk(engine: str, file: Path) -> ModelDesk:
    """The settings of ``mine``, a model for this engine, beside ``pirate``, an adapter of its format."""
    sample = msgspec.json.decode((SAMPLES / f"{engine}.json").read_bytes(), type=Sample)
    told = {"architecture": sample.metadata.get("architecture")}
    models = {
        "mine": record("mine", tuple(sample.files), sample.metadata),
        "pirate": record("pirate", (ModelFile("pirate", 10, "lora"),), told),
    }
    settings, book = Settings(), ModelBook(file)
    layers = Layers(engines(settings), plain(settings), lambda: book.current)
    fleet = SimpleNamespace(
        all=list,
        layers=layers,
        asked=lambda _: {},
        in_use=lambda _: False,
        replicas=list,
        pending=lambda _: (),
        refit=AsyncMock(),
    )
    store = SimpleNamespace(get=models.__getitem__)
    return ModelDesk(book, cast("Store", store), cast("Supervisor", fleet), lambda: None)


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("onnx", "ONNX Runtime, which serves 'mine', cannot use LoRA adapters"),
        ("openvino", "cannot use LoRA adapters"),
        ("sglang", "from the model's own folder only"),
    ],
)
async def test_an_engine_that_could_not_start_with_one_refuses_it(tmp_path: Path, engine: str, why: str) -> None:
    file = tmp_path / "models.toml"
    wanted = SettingsChange(set={"engine": engine, "adapters": {"pirate": 1.0}})
    with pytest.raises(UsageError, match=why):
        await desk(engine, file).change("mine", wanted)
    assert not file.exists()


async def test_those_that_are_there_can_be_taken_out_whatever_the_engine_is(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[models."mine".adapters]\npirate = 1.0\nother = 0.5\n')
    found = desk("onnx", file)
    found.refresh()
    shown = await found.change("mine", SettingsChange(unset=("adapters.other",)))
    assert [a.name for a in shown.adapters] == ["pirate"]
