"""A pull refuses what would run code, before the model has a name; a person may let it in, and that is remembered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pierhead.config import SourceSettings
from pierhead.errors import NotFound, UnsafeContent
from pierhead.paths import Paths
from pierhead.sources.pull import pull
from pierhead.store.layout import Store
from pierhead.store.media import UNSAFE

from .servers import make_gguf

pytestmark = pytest.mark.timeout(60)


def trapped(folder: Path) -> Path:
    path = folder / "trap.gguf"
    path.write_bytes(make_gguf(**{"tokenizer.chat_template": "{{ ''.__class__.__mro__ }}"}))
    return path


async def test_a_template_that_runs_code_is_refused_before_the_model_has_a_name(home: Paths, tmp_path: Path) -> None:
    store = Store.open(home.store)
    with pytest.raises(UnsafeContent, match="__mro__") as refused:
        await pull(str(trapped(tmp_path)), store=store, settings=SourceSettings(), paths=home, name="trap")
    assert "--allow-unsafe" in str(refused.value.hint)
    assert refused.value.data["findings"][0]["severity"] == "unsafe"
    with pytest.raises(NotFound):
        store.get("trap")
    store.collect()
    assert not list(store.blobs.folder.iterdir())


async def test_what_a_person_lets_in_is_remembered(home: Paths, tmp_path: Path) -> None:
    store = Store.open(home.store)
    record = await pull(
        str(trapped(tmp_path)),
        store=store,
        settings=SourceSettings(),
        paths=home,
        name="trap",
        allow_unsafe=True,
    )
    assert "__mro__" in record.annotations[UNSAFE]


def test_the_command_scans_files_folders_and_models(tmp_path: Path) -> None:
    def pier(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        env = {"PIERHEAD_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)

    path = trapped(tmp_path)
    refused = pier("pull", str(path), "--name", "trap")
    assert refused.returncode == 14, refused.stderr
    assert "--allow-unsafe" in refused.stderr
    assert pier("pull", str(path), "--name", "trap", "--allow-unsafe").returncode == 0
    for target in ("trap", str(path), str(tmp_path)):
        found = pier("scan", target)
        assert found.returncode == 14, found.stderr
        assert "__mro__" in found.stdout
    assert '"safe": false' in pier("scan", "trap", "--json").stdout
    assert pier("scan", "nothing").returncode == 3
