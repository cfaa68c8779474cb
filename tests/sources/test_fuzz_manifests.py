"""Whatever a registry sends as a manifest or config, the answer is a plan inside its folder, or one PierError."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.config import SourceSettings
from pierhead.errors import PierError
from pierhead.refs import parse
from pierhead.registry import mirrors
from pierhead.sources import artifact
from pierhead.sources.base import PullPlan
from pierhead.store import media


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


CONFIG = {"config": {"format": "gguf", "size": "1"}, "descriptor": {}, "rootfs": {"type": "layers", "diff_ids": []}}
TYPES = [
    media.GGUF, media.SAFETENSORS, media.FILE, media.DIR_TAR, media.MMPROJ, media.TEMPLATE, media.LICENSE,
    f"{media.CNCF}weight.v1.raw", f"{media.CNCF}weight.v1.tar+zstd", f"{media.CNCF}code.v1.tar", "text/html", "",
]  # fmt: skip
PATHS = [
    "model.gguf", "a/b.safetensors", "../up.gguf", "/etc/passwd", "a/../../b", ".", "", "a\\b", "x\0y", "a" * 3000,
    "con/", "-flag", "model.GGUF", "é.gguf", "é.gguf",
]  # fmt: skip
SIZES = st.one_of(st.integers(-2, 1 << 40), st.sampled_from([0, 1 << 63, 1 << 70, 1.5, "7", None, True]))
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DIGESTS = st.sampled_from([digest(b"a"), digest(b"b"), "sha256:" + "0" * 63, "sha512:" + "0" * 128, "../x", "", 7])


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    annotations: dict[str, Any] = {}
    if draw(st.booleans()):
        annotations[media.FILEPATH] = draw(st.sampled_from(PATHS) | st.text(max_size=30))
    if draw(st.integers(0, 3)) == 0:
        annotations[draw(st.sampled_from([media.ROLE, media.MEMORY, "x"]))] = draw(st.text(max_size=20))
    return {
        "mediaType": draw(st.sampled_from(TYPES)),
        "digest": draw(DIGESTS),
        "size": draw(SIZES),
        "annotations": annotations,
    }


@st.composite
def manifests(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A manifest and its config, valid but for a few members."""
    config = copy.deepcopy(CONFIG)
    if draw(st.booleans()):
        config[draw(st.sampled_from([*CONFIG, "ai.pierhead.summary", "ai.pierhead.settings", "model"]))] = draw(JUNK)
    body = encoded(draw(JUNK)) if draw(st.integers(0, 9)) == 0 else encoded(config)
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": media.MANIFEST,
        "config": {"mediaType": media.CONFIG, "digest": digest(body), "size": len(body)},
        "layers": draw(st.lists(layers(), max_size=4)),
    }
    for key in draw(st.lists(st.sampled_from([*document, "artifactType", "subject", "annotations"]), max_size=2)):
        document[key] = draw(JUNK)
    text = encoded(document)
    return (text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text), body


class Says:
    """A registry that says what it is told to say."""

    answers: tuple[bytes, bytes] = (b"", b"")

    def __init__(self, name: object, *rest: object, **options: object) -> None:
        self.name = name

    async def manifest(self, target: str) -> tuple[str, bytes]:
        return media.MANIFEST, self.answers[0]

    async def small(self, digest: str, limit: int = 0) -> bytes:
        return self.answers[1]

    async def __aexit__(self, *error: object) -> None:
        return None


async def plan() -> PullPlan:
    artifacts = artifact.Artifacts(SourceSettings(), {}, None)
    try:
        return await artifacts.plan(parse("oci://registry.example/team/model:1"))
    finally:
        await artifacts.close()


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> type[Says]:
    monkeypatch.setattr(mirrors, "Registry", Says)
    return Says


@pytest.mark.timeout(120)
def test_every_manifest_is_a_plan_inside_its_folder_or_one_error(hostile: type[Says]) -> None:
    @settings(max_examples=600)
    @given(manifests())
    def holds(said: tuple[bytes, bytes]) -> None:
        hostile.answers = said
        try:
            found = asyncio.run(plan())
        except PierError:
            return
        names = [f.name for f in found.files]
        assert len(set(names)) == len(names)
        for file in found.files:
            path = PurePosixPath(file.name)
            assert not path.is_absolute()
            assert ".." not in path.parts
            assert path.parts
            assert file.size is not None
            assert 0 <= file.size < 1 << 63

    holds()


@pytest.mark.parametrize("which", [0, 1])
def test_documents_nested_without_end_are_one_error(hostile: type[Says], which: int) -> None:
    deep = b'{"config": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    document = {
        "schemaVersion": 2,
        "mediaType": media.MANIFEST,
        "config": {"mediaType": media.CONFIG, "digest": digest(deep), "size": len(deep)},
        "layers": [{"mediaType": media.GGUF, "digest": digest(b"a"), "size": 1}],
    }
    hostile.answers = (deep, deep) if which == 0 else (encoded(document), deep)
    with pytest.raises(PierError):
        asyncio.run(plan())
