"""What the small files beside a model say: labels, lengths, pooling; reads the model's folder once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from .faults import Unusable

MAX_SMALL = 16 << 20
_OFFSET = ("roberta", "xlm-roberta", "camembert", "longformer")  # their first position is after the padding's id
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


class Folder:
    """The model's folder; files beside the ONNX file count before those at its top."""

    def __init__(self, root: Path, file: str) -> None:
        self._places = [(root / file).parent, root]
        self.config = self.document("config.json")

    def find(self, name: str) -> Path | None:
        """The file of that name."""
        return next((place / name for place in self._places if (place / name).is_file()), None)

    def document(self, name: str) -> dict[str, Any]:
        """A JSON object; empty when there is no such file; Unusable when it is something else."""
        path = self.find(name)
        found: Any = _json(path) if path is not None else {}
        if not isinstance(found, dict):
            raise Unusable(f"{name} is not a JSON object")
        return cast("dict[str, Any]", found)

    def labels(self) -> dict[int, str]:
        """Class number to its name."""
        given = self.config.get("id2label")
        if not isinstance(given, dict):
            return {}
        try:
            return {int(number): str(name) for number, name in cast("dict[Any, Any]", given).items()}
        except ValueError as exc:
            raise Unusable("config.json has labels without numbers (id2label)") from exc

    def context(self, padding: int) -> int:
        """Tokens that the model reads at most; 0 where nothing tells."""
        positions = _count(self.config.get("max_position_embeddings"))
        if positions and self.config.get("model_type") in _OFFSET:
            positions -= padding + 1
        told = (
            positions,
            _count(self.document("sentence_bert_config.json").get("max_seq_length")),
            _count(self.document("tokenizer_config.json").get("model_max_length")),
        )
        return min((number for number in told if number), default=0)

    def pooling(self) -> str:
        """How vectors of tokens become one of the text."""
        given = self.document("1_Pooling/config.json")
        modes = [mode for key, mode in _POOLINGS.items() if given.get(key) is True]
        if given.get("pooling_mode") in _POOLINGS.values():
            modes = [str(given["pooling_mode"])]
        if given and len(modes) != 1:
            raise Unusable("1_Pooling/config.json asks for a pooling that is not known here; set pooling yourself")
        return modes[0] if modes else "mean"

    def modules(self) -> list[str]:
        """The steps of a sentence transformer, by their class (``Transformer``, ``Pooling``, ``Normalize``)."""
        path = self.find("modules.json")
        if path is None:
            return []
        found = _json(path)
        if not isinstance(found, list):
            raise Unusable("modules.json is not a list")
        listed = [cast("dict[str, Any]", m) for m in cast("list[Any]", found) if isinstance(m, dict)]
        return [str(module.get("type", "")).rpartition(".")[2] for module in listed]


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_SMALL:
            raise Unusable(f"{path.name} is larger than {MAX_SMALL >> 20} MiB")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise Unusable(f"{path.name} cannot be read: {exc}") from exc


def _count(value: Any) -> int:
    """A number of tokens; 0 for what is none (some files write 1e30 for 'no bound')."""
    return int(value) if isinstance(value, int | float) and 0 < value < 1 << 24 else 0
