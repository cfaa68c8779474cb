"""What is packaged goes to a real registry and comes back the same; other tools copy it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.formats.foreign import llama_folder

from pierhead.config import SourceSettings
from pierhead.events import ignore
from pierhead.package import inputs
from pierhead.package.build import package
from pierhead.package.recipe import Recipe
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.sources.pull import pull
from pierhead.store.layout import Store
from pierhead.store.model import Packaged

from .conftest import write_lora, write_model

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here (scripts/test-host)"),
]


def place() -> str:
    host = os.environ["PIERHEAD_TEST_IMAGE"].partition("/")[0]
    return f"oci://{host}/packaged/{uuid.uuid4().hex[:12]}:v1"


async def sent(store: Store, name: str, where: str) -> int:
    target = image_name(parse(where))
    done = await push_model(store, name, target, settings=SourceSettings(), env={}, listener=ignore)
    return done.sent


@pytest.mark.parametrize("shape", ["docker-v0.1", "docker-v0.2", "cncf"])
async def test_a_folder_comes_back_the_same_in_every_format(shape: Any, home: Paths, tmp_path: Path) -> None:
    store = Store.open(home.store)
    base = inputs.detect(llama_folder(tmp_path / "m", shards=2, template="{{ x }}"))
    settings = Packaged(context=99, options={"n_batch": 64}, system="Hi")
    recipe = Recipe(name="mine", base=base, created="2026-01-01T00:00:00Z", format=shape, packaged=settings)
    mine = package(store, recipe)
    where = place()
    await sent(store, "mine", where)
    other = Store.open(tmp_path / "other")

    back = await pull(where, store=other, settings=SourceSettings(), paths=home, name="back", env={})

    assert (back.digest, back.packaged, back.memory) == (mine.digest, settings, mine.memory)
    assert back.metadata == mine.metadata
    assert {f.name for f in back.laid_out} == {f.name for f in mine.laid_out}
    laid = other.materialize(back)
    assert json.loads((laid / "config.json").read_text())["model_type"] == "llama"


async def test_a_lora_is_all_that_is_sent_of_a_model_whose_base_is_there(home: Paths, tmp_path: Path) -> None:
    store = Store.open(home.store)
    base = inputs.detect(write_model(tmp_path / "m.gguf", size=32 << 10))
    package(store, Recipe(name="base", base=base, created="2026-01-01T00:00:00Z"))
    where = place()
    assert await sent(store, "base", where) > 32 << 20
    lora = inputs.single(write_lora(tmp_path / "l.gguf"), "lora", format="gguf", scale=0.5)

    package(store, Recipe(name="styled", base=store.get("base"), created="2026-01-01T00:00:00Z", extras=(lora,)))

    assert await sent(store, "styled", where.replace(":v1", ":styled")) < 64 << 10


@pytest.mark.parametrize("shape", ["docker-v0.2", "cncf"])
async def test_skopeo_copies_it_to_the_byte(shape: Any, home: Paths, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    store = Store.open(home.store)
    base = inputs.detect(llama_folder(tmp_path / "m"))
    mine = package(store, Recipe(name="mine", base=base, created="2026-01-01T00:00:00Z", format=shape))
    where = place()
    await sent(store, "mine", where)
    source = where.replace("oci://", "docker://")

    subprocess.run(  # noqa: ASYNC221
        ["skopeo", "copy", "-q", "--src-tls-verify=false", source, f"oci:{tmp_path / 'copy'}:x"], check=True, timeout=60
    )

    index = json.loads((tmp_path / "copy" / "index.json").read_text())
    assert index["manifests"][0]["digest"] == mine.digest
