"""What a file of a model's folder is for, by its name; pure."""

from __future__ import annotations

from pierhead.store.media import PYTHON, PYTHON_MODEL, format_of
from pierhead.store.model import Role

_LICENCES = ("license", "licence", "copying", "notice", "use_policy")
_CODE = (".py", ".pyi", ".sh", ".js", ".cpp", ".cu", ".ipynb")
_DOCS = (".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".gif")
_CONFIG = (".json", ".txt", ".yaml", ".yml", ".toml", ".vocab", ".model", ".tiktoken", ".ini", ".cfg", ".pbtxt", ".bpe")
_DATA = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv")


def classify(path: str) -> tuple[Role, str]:
    """Role, and the format where it is weights (``data``: weights that another file describes)."""
    name = path.rsplit("/", 1)[-1].lower()
    if path == PYTHON_MODEL:
        return "code", PYTHON
    if format := format_of(name):
        return ("mmproj" if format == "gguf" and "mmproj" in name else "weights"), format
    if name.endswith(".mmproj"):
        return "mmproj", "gguf"
    if name.endswith(".jinja"):
        return "template", ""
    stem = name.partition(".")[0]
    if any(word in stem for word in _LICENCES):
        return "license", ""
    endings: tuple[tuple[Role, tuple[str, ...]], ...] = (
        ("code", _CODE),
        ("doc", _DOCS),
        ("config", _CONFIG),
        ("dataset", _DATA),
    )
    for role, known in endings:
        if name.endswith(known):
            return role, ""
    return "other", ""
