"""``pier run`` of a model that makes pictures, as far as no engine is needed; tests/heavy has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pierhead.cli import paint as module
from pierhead.errors import UsageError
from pierhead.paths import resolve
from pierhead.store.model import ModelRecord

RECORD = ModelRecord(
    name="hub/my art:1", names=(), digest="", size=0, created="", files=(), metadata={"type": "diffusion"}
)
GIVEN: dict[str, Any] = {"output": None, "seed": None, "images": ()}
PNG = "iVBORw0KGgo="


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the gateway would be asked; it answers with the beginning of a PNG."""
    seen: list[dict[str, Any]] = []

    def answer(_: object, fields: dict[str, Any], images: list[Path]) -> dict[str, Any]:
        seen.append({**fields, "images": images})
        return {"data": [{"b64_json": PNG, "seed": 5}], "size": "64x64"}

    monkeypatch.setattr(module, "_ask", answer)
    monkeypatch.chdir(tmp_path)
    return seen


def run(prompt: str = "a boat", **given: Any) -> None:
    module.paint(resolve({"PIERHEAD_HOME": "/nowhere"}), RECORD, prompt, {**GIVEN, **given}, as_json=False)


def test_without_an_output_a_new_file_is_named_like_the_model(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    run()
    assert capsys.readouterr().out.split() == ["my-art-1.png", "my-art-1-2.png"]
    assert (tmp_path / "my-art-1-2.png").read_bytes().startswith(b"\x89PNG")
    assert asked[0] == {"model": RECORD.name, "prompt": "a boat", "output_format": "png", "images": []}


def test_the_ending_of_the_output_says_what_kind_of_file_it_is(asked: list[dict[str, Any]]) -> None:
    run(output="boat.JPG", seed=0)
    assert (asked[0]["output_format"], asked[0]["seed"]) == ("jpeg", 0)
    with pytest.raises(UsageError, match="no ending of a picture"):
        run(output="boat.tiff")
    with pytest.raises(UsageError, match="cannot write"):
        run(output="no/such/folder/boat.png")


def test_a_prompt_is_needed(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="say of what"):
        run("")
    assert not asked


def test_an_image_goes_into_a_form_with_the_fields(tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(b"\x89PNG\r\n")
    kind, body = module._form({"prompt": "a böat"}, [image])
    mark = kind.partition("boundary=")[2].encode()
    assert body.count(b"--" + mark) == 3
    assert 'name="prompt"\r\n\r\na böat\r\n'.encode() in body
    with pytest.raises(UsageError, match="cannot read"):
        module._form({}, [tmp_path / "missing"])
