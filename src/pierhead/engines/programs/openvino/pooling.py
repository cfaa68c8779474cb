"""How the vectors of tokens become one: as the small files beside a model say, or as is asked for."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

_MOST = 1 << 20
_MODES = {
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_mean_tokens": "MEAN",
    "pooling_mode_lasttoken": "LAST_TOKEN",
}
_WORDS = {"cls": "CLS", "mean": "MEAN", "last": "LAST_TOKEN", "lasttoken": "LAST_TOKEN"}


class Pooling(NamedTuple):
    """``words`` is the name of OpenVINO GenAI's kind."""

    words: str
    normalize: bool


def pooling(folder: str, asked: str, normalize: bool | None) -> Pooling:
    """What holds; ValueError where the files ask for what the pipeline cannot do and nobody asks for another."""
    modules = _document(folder, "modules.json")
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules] if isinstance(modules, list) else []  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]
    if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"modules.json has the step {other[0]}, which OpenVINO GenAI does not have")
    wished = normalize if normalize is not None else "Normalize" in kinds if kinds else True
    return Pooling(_WORDS[asked] if asked != "auto" else _said(folder), wished)


def _said(folder: str) -> str:
    """As sentence transformers write it down; the mean where nothing is said."""
    given = _document(folder, "1_Pooling/config.json")
    if not isinstance(given, dict) or not given:
        return "MEAN"
    on = [key for key, value in given.items() if str(key).startswith("pooling_mode_") and value is True]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    named: Any = given.get("pooling_mode")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(named, str) and named in _WORDS:
        return _WORDS[named]
    if len(on) != 1 or on[0] not in _MODES:  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError("1_Pooling/config.json asks for a pooling that OpenVINO GenAI does not have; set pooling")
    return _MODES[on[0]]


def _document(folder: str, name: str) -> Any:
    """JSON, or None where there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.loads(file.read(_MOST))
