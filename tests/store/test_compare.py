"""What differs between two models is told file by file, field by field, and line by line for the template."""

from __future__ import annotations

from typing import Any

from pierhead.store.compare import compare


def model(*files: tuple[str, str, int], **metadata: Any) -> dict[str, Any]:
    """A model as ``inspect --json`` tells it."""
    listed = [{"name": n, "digest": f"sha256:{d}", "size": s, "role": "weights"} for n, d, s in files]
    return {"name": "m", "files": listed, "metadata": metadata, "packaged": {"context": 0, "options": {}}}


def test_files_are_the_same_renamed_changed_added_or_removed() -> None:
    first = model(("a", "1", 10), ("b", "2", 20), ("c", "3", 30), ("d", "4", 40))
    second = model(("a", "1", 10), ("B", "2", 20), ("c", "9", 33), ("e", "5", 50))
    found = compare(first, second)
    assert [(f.change, f.name, f.was) for f in found.files] == [
        ("same", "a", ""), ("renamed", "B", "b"), ("changed", "c", "30"), ("added", "e", ""), ("removed", "d", ""),
    ]  # fmt: skip
    assert (found.shared, found.moved, found.same) == (30, 83, False)


def test_a_model_is_the_same_as_itself() -> None:
    assert compare(model(("a", "1", 10), x=1), model(("a", "1", 10), x=1)).same


def test_metadata_and_settings_differ_field_by_field() -> None:
    first, second = model(("a", "1", 10), x=1, y=[1, 2]), model(("a", "1", 10), x=2, z=None)
    second["packaged"] = {"context": 4096, "options": {"threads": 2}}
    found = compare(first, second)
    assert [(c.field, c.first, c.second) for c in found.metadata] == [("x", 1, 2), ("y", [1, 2], None)]
    assert [(c.field, c.first, c.second) for c in found.settings] == [
        ("context", 0, 4096),
        ("options.threads", None, 2),
    ]
    del second["packaged"]  # a model at its source does not tell
    assert compare(first, second).settings == ()


def test_the_template_is_compared_line_by_line() -> None:
    found = compare(model(chat_template="a\nb\nc"), model(chat_template="a\nx\nc"))
    assert [line for line in found.template.splitlines() if line[:1] in "+-"][2:] == ["-b", "+x"]
    assert not found.metadata


def test_a_file_without_a_digest_is_never_taken_for_another() -> None:
    first, second = model(("a", "", 10)), model(("b", "", 10))
    first["files"][0]["digest"] = second["files"][0]["digest"] = ""
    assert [f.change for f in compare(first, second).files] == ["added", "removed"]
