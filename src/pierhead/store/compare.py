"""What differs between two models: files by digest, facts field by field, the chat template line by line; pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

TEMPLATE = "chat_template"
Change = Literal["same", "renamed", "changed", "added", "removed"]


class FileChange(msgspec.Struct, frozen=True, kw_only=True):
    """One file of either model; ``size`` in bytes is the second model's, or the first's where it has none."""

    change: Change
    name: str
    size: int
    role: str = ""
    was: str = ""  # another name, or the size, that it had


class FieldChange(msgspec.Struct, frozen=True):
    """A fact that is not the same in both."""

    field: str
    first: Any
    second: Any


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """``same`` when the two are of one digest, or differ in nothing that is compared here."""

    same: bool
    files: tuple[FileChange, ...]
    metadata: tuple[FieldChange, ...]
    settings: tuple[FieldChange, ...]
    template: str  # a unified diff
    shared: int  # bytes of files that both have

    @property
    def moved(self) -> int:
        """Bytes that who has the first would have to fetch for the second."""
        return sum(f.size for f in self.files if f.change in ("added", "changed"))


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    """Compare two models as ``inspect --json`` tells them: ``files``, ``metadata`` and, where known, ``packaged``."""
    files = tuple(_files(first.get("files", ()), second.get("files", ())))
    metadata = _fields(first.get("metadata") or {}, second.get("metadata") or {})
    known = "packaged" in first and "packaged" in second
    settings = _fields(_flat(first["packaged"]), _flat(second["packaged"])) if known else ()
    template = _template(first, second)
    alike = all(f.change == "same" for f in files) and not metadata and not settings and not template
    return Difference(
        same=alike or bool(first.get("digest") and first.get("digest") == second.get("digest")),
        files=files,
        metadata=metadata,
        settings=settings,
        template=template,
        shared=sum(f.size for f in files if f.change in ("same", "renamed")),
    )


def _files(first: Any, second: Any) -> list[FileChange]:
    """Files that both have under one name first; then those that only the digest, or only the name, tells to be one."""
    left = {f["name"]: f for f in first}
    found: list[FileChange] = []
    new: list[Any] = []
    for file in second:
        old = left.get(file["name"])
        if old is not None and old["digest"] == file["digest"] and file["digest"]:
            del left[file["name"]]
            found.append(_change("same", file))
        else:
            new.append(file)
    for file in new:
        twin = next((f for f in left.values() if f["digest"] == file["digest"] and file["digest"]), None)
        old = twin or left.get(file["name"])
        if old is None:
            found.append(_change("added", file))
            continue
        del left[old["name"]]
        found.append(_change("renamed", file, old["name"]) if twin else _change("changed", file, str(old["size"])))
    return found + [_change("removed", f) for f in left.values()]


def _change(change: Change, file: Any, was: str = "") -> FileChange:
    return FileChange(change=change, name=file["name"], size=file["size"], role=file.get("role", ""), was=was)


def _fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    names = [n for n in dict.fromkeys((*first, *second)) if n != TEMPLATE]
    return tuple(FieldChange(n, first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n))


def _flat(packaged: Any) -> dict[str, Any]:
    """Settings with the engine's options as fields of their own."""
    told: dict[str, Any] = dict(packaged)
    options: dict[str, Any] = told.pop("options", None) or {}
    return {**told, **{f"options.{name}": value for name, value in options.items()}}


def _template(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    old, new = _text_of(first), _text_of(second)
    names = str(first.get("name") or ""), str(second.get("name") or "")
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), names[0], names[1], lineterm="")
    return "\n".join(lines)


def _text_of(model: Mapping[str, Any]) -> str:
    metadata: Mapping[str, Any] = model.get("metadata") or {}
    return str(metadata.get(TEMPLATE) or "")
