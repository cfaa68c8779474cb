"""A model's folder as releases of transformers before the fifth read it: the same files, but for two of its documents.

Standalone, like the programs beside it, which use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_RENAMED = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}


def view(source: Path, target: Path) -> Path:
    """A folder below ``target`` that leads to the files of ``source``; ValueError for what older ones cannot tell."""
    place = target / "view"
    for file in sorted(source.rglob("*")):
        link = place / file.relative_to(source)
        if file.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    _rewrite(place / "config.json", _older_config)
    _rewrite(place / "tokenizer_config.json", _older_tokenizer)
    return place


def _rewrite(file: Path, change: Any) -> None:
    if not file.exists():
        return
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{file.name} cannot be read: {exc}") from exc
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} is not what it should be")
    changed = change(dict(found))  # pyright: ignore[reportUnknownArgumentType]
    if changed != found:
        file.unlink()
        file.write_text(json.dumps(changed, indent=2, ensure_ascii=False), encoding="utf-8")


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    name = config.get("tokenizer_class")
    if name in _RENAMED:
        config["tokenizer_class"] = _RENAMED[name]
    return config


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """Positions, which the fifth release keeps in one member and those before in two."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config:
        return config
    told: dict[str, Any] = dict(rope)  # pyright: ignore[reportUnknownArgumentType]
    if any(isinstance(value, dict) for value in told.values()):
        raise ValueError("its positions differ from layer to layer, which this release of transformers cannot read")
    theta = told.pop("rope_theta", None)
    if theta is not None:
        config["rope_theta"] = theta
    if told.get("rope_type", "default") != "default":
        config["rope_scaling"] = told
    return config
