"""Documents of newer releases of transformers, told as older ones read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pierhead.convert.jobs.view import view


def seen(tmp_path: Path, config: Any, tokenizer: Any = None) -> tuple[Any, Any]:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_bytes(b"w")
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    place = view(source, target)
    assert (place / "deep" / "weights").read_bytes() == b"w"
    assert json.loads((source / "config.json").read_text()) == config, "the model itself stays as it is"
    return json.loads((place / "config.json").read_text()), json.loads((place / "tokenizer_config.json").read_text())


def test_positions_and_tokenizers_get_their_older_names(tmp_path: Path) -> None:
    rope = {"rope_theta": 100000.0, "rope_type": "linear", "factor": 2.0}
    config, tokenizer = seen(tmp_path, {"a": 1, "rope_parameters": rope}, {"tokenizer_class": "TokenizersBackend"})
    assert config["rope_theta"] == 100000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("config", [{"a": 1}, {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}])
def test_documents_that_older_releases_can_read_stay(tmp_path: Path, config: Any) -> None:
    assert seen(tmp_path, config)[0] == config


@pytest.mark.parametrize("config", [[], "x", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}])
def test_what_cannot_be_told_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ValueError, match=r"config\.json|positions"):
        seen(tmp_path, config)
