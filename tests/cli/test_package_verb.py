"""pier package: what people type, what it makes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.formats.foreign import llama_folder
from tests.package.conftest import write_lora, write_model

from pierhead.cli.package import created
from pierhead.engines.python import PROGRAM
from pierhead.errors import UsageError
from pierhead.paths import resolve

from .conftest import Pier

pytestmark = pytest.mark.timeout(120)
EPOCH = {"SOURCE_DATE_EPOCH": "1767322800"}


def shown(pier: Pier, name: str) -> dict[str, object]:
    done = pier("inspect", name, "--json")
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


def test_a_file_is_packaged_and_its_digest_printed(bare: Pier, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf")

    done = bare("package", str(model), "mine", **EPOCH)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == shown(bare, "mine")["digest"]
    assert "Packaged mine" in done.stderr
    assert bare("package", "--gguf", str(model), "other", **EPOCH).stdout == done.stdout
    assert [line["verb"] if "verb" in line else line.get("by") for line in _history(bare, "mine")] == ["package"]


def test_a_model_that_the_policy_refuses_is_no_base_of_another(bare: Pier, tmp_path: Path) -> None:
    assert bare("package", str(write_model(tmp_path / "m.gguf")), "base").returncode == 0
    config = resolve({"PIERHEAD_HOME": str(tmp_path / "home")}).config
    config.mkdir(parents=True, exist_ok=True)
    (config / "policy.toml").write_text('default = "allow"\n[[rules]]\nmatch = ["base"]\nrequire = "refuse"\n')

    done = bare("package", "--from", "base", "--context-size", "512", "mine")

    assert done.returncode == 15, done.stderr
    assert "does not allow base" in done.stderr
    assert bare("inspect", "mine").returncode != 0


def _history(pier: Pier, name: str) -> list[dict[str, str]]:
    found = json.loads(pier("history", name, "--json").stdout)
    return found if isinstance(found, list) else found["moves"]


def test_everything_that_can_be_added_is_shown(bare: Pier, tmp_path: Path) -> None:
    model, lora = write_model(tmp_path / "m.gguf"), write_lora(tmp_path / "l.gguf")
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }} packaged")
    (tmp_path / "LICENSE").write_text("MIT")
    base = bare("package", str(model), "base")
    assert base.returncode == 0, base.stderr

    done = bare(
        "package", "--from", "base", "--lora", f"{lora}=0.5", "--chat-template", str(tmp_path / "t.jinja"),
        "--license", str(tmp_path / "LICENSE"), "--context-size", "512", "--option", "temp=0.2",
        "--option", "ctx-size=256", "--annotation", "team=blue", "full",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    found = shown(bare, "full")
    assert [(f["role"], f["scale"]) for f in found["files"]] == [  # type: ignore[index, attr-defined]
        ("weights", 1.0), ("lora", 0.5), ("template", 1.0), ("license", 1.0),
    ]  # fmt: skip
    assert found["packaged"] == {"context": 512, "options": {"sampling.temp": 0.2}}
    assert found["annotations"]["team"] == "blue"  # type: ignore[index]
    assert found["estimate"]["context"] == 512  # type: ignore[index]
    assert found["memory"]["weights"]  # type: ignore[index]
    text = bare("inspect", "full").stdout
    for words in ("context 512 tokens", "sampling.temp = 0.2", "lora × 0.5"):
        assert words in text


def test_a_modelfile_is_followed(bare: Pier, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    write_lora(tmp_path / "l.gguf")
    (tmp_path / "Modelfile").write_text(
        'FROM ./m.gguf\nADAPTER l.gguf\nSYSTEM """Be\nbrief."""\nPARAMETER num_ctx 256\nPARAMETER temperature 0\n'
        "PARAMETER stop END\nLICENSE MIT\nMESSAGE user Hi\nTEMPLATE {{ messages[0]['content'] }}\n"
    )

    done = bare("package", "-f", str(tmp_path / "Modelfile"), "made")

    assert done.returncode == 0, done.stderr
    found = shown(bare, "made")
    assert found["packaged"] == {
        "context": 256,
        "options": {"sampling.temp": 0.0, "antiprompt": ["END"]},
        "system": "Be\nbrief.",
        "messages": [{"role": "user", "content": "Hi"}],
    }
    assert [f["name"] for f in found["files"]] == ["m.gguf", "l.gguf", "template.jinja", "LICENSE"]  # type: ignore[attr-defined, index]


def test_a_modelfile_s_base_may_be_a_model_of_the_store(bare: Pier, tmp_path: Path) -> None:
    bare("package", str(write_model(tmp_path / "m.gguf")), "base")

    done = bare("package", "-f", "-", "second", stdin="FROM base\nSYSTEM Hi\n")

    assert done.returncode == 0, done.stderr
    assert shown(bare, "second")["packaged"] == {"system": "Hi"}


def test_inspect_shows_what_the_engine_that_serves_a_model_would_claim(bare: Pier, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    concurency = 2\n    def predict(self, x: int): return x\n")
    done = bare("package", str(tmp_path / "mine.py"), "mine")
    assert "Did you mean concurrency?" in done.stderr

    found = json.loads(bare("inspect", "mine", "--json").stdout)
    assert found["estimate"] == {"engine": "python", "context": 0, "parallel": 0, "total": PROGRAM}
    assert "by python" in " ".join(bare("inspect", "mine").stdout.split())


def test_a_folder_becomes_cncf_s_artifact(bare: Pier, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m", shards=2)

    done = bare("package", str(folder), "tiny", "--format", "cncf", "--json", **EPOCH)

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["type"] == "pull_done"
    found = shown(bare, "tiny")
    assert found["config_type"] == "application/vnd.cncf.model.config.v1+json"
    assert found["created"] == "2026-01-02T03:00:00Z"
    text = bare("inspect", "tiny").stdout
    assert "safetensors" in text
    assert "Memory" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("a.gguf", "--gguf", "b.gguf", "n"), "once"),
        (("n",), "once"),
        (("a", "b", "c"), "once"),
        (("./nothing.gguf", "n"), "no such file"),
        (("--onnx", "MODEL", "n"), "not a .onnx file"),
        (("--safetensors-dir", "FOLDER", "n"), "no safetensors"),
        (("--dir", "EMPTY", "n"), "no file"),
        (("MODEL", "n", "--lora", "MODEL"), "not a LoRA"),
        (("MODEL", "n", "--option", "temprature=1"), "unknown engine parameter"),
        (("MODEL", "n", "--option", "port=1"), "cannot be set"),
        (("MODEL", "n", "--annotation", "x"), "bad --annotation"),
        (("MODEL", "bad name", "--push"), "not a reference"),
        (("MODEL", "plain", "--push"), "does not name a place"),
        (("MODEL", ".."), "cannot name a model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_what_to_do(
    bare: Pier, tmp_path: Path, args: tuple[str, ...], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "MODEL": str(write_model(tmp_path / "m.gguf")),
        "FOLDER": str(tmp_path),
        "EMPTY": str(tmp_path / "empty"),
    }

    done = bare("package", *(places.get(arg, arg) for arg in args))

    assert done.returncode not in (0, 1)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") >= 2, "a hint follows"


def test_the_time_comes_from_the_environment_where_that_says_one() -> None:
    assert created({"SOURCE_DATE_EPOCH": "0"}) == "1970-01-01T00:00:00Z"
    assert created({})[:2] == "20"
    for bad in ("soon", "1" * 30):
        with pytest.raises(UsageError):
            created({"SOURCE_DATE_EPOCH": bad})


@pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here (scripts/test-host)")
def test_it_is_pushed_at_once_and_looked_at_where_it_is(bare: Pier, tmp_path: Path) -> None:
    host = os.environ["PIERHEAD_TEST_IMAGE"].partition("/")[0]
    name = f"{host}/packaged/{os.getpid()}:v1"

    done = bare("package", str(write_model(tmp_path / "m.gguf")), name, "--context-size", "128", "--push")

    assert done.returncode == 0, done.stderr
    seen = json.loads(bare("inspect", "-r", name, "--json").stdout)
    assert seen["digest"] == done.stdout.split()[-1]
    assert seen["packaged"] == {"context": 128}
    assert seen["memory"]["total"] > seen["memory"]["weights"]
