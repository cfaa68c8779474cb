"""A cached tag can be refreshed for the price of one question, and says when it is stale; no answer is no alarm."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pierhead.config import SourceSettings
from pierhead.events import PullDone, PullProgress, ignore
from pierhead.refs import parse
from pierhead.registry import client
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.sources.fresh import check, origin
from pierhead.sources.pull import Sources
from pierhead.store.layout import Store
from pierhead.store.media import GGUF
from pierhead.store.model import Layer, ModelRecord

from .servers import COMMIT, FakeHub, Puller, make_gguf

pytestmark = pytest.mark.timeout(60)
registry = pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here")
OTHER = "b" * 40


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that go to registries."""
    seen: list[str] = []
    request = client.Registry.request

    @contextlib.asynccontextmanager
    async def noted(self: Any, method: str, url: str, **more: Any) -> AsyncGenerator[Any]:
        seen.append(f"{method} {url.rsplit('/', 2)[1]}")
        async with request(self, method, url, **more) as answer:
            yield answer

    monkeypatch.setattr(client.Registry, "request", noted)
    return seen


def made(store: Store, name: str, data: bytes) -> ModelRecord:
    with store.lease(), store.ingest(f"key {data[:40]!r}") as ingest:
        ingest.write(data)
        blob = ingest.commit()
        return store.commit_model(
            name, layers=[Layer(blob.digest, blob.size, GGUF, "m.gguf")], metadata={"format": "gguf"}
        )


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Any]:
    """Push a model of these bytes to a place."""
    theirs = Store.open(tmp_path / "theirs")

    async def push(where: str, data: bytes) -> str:
        made(theirs, "m", data)
        place = image_name(parse(where))
        done = await push_model(theirs, "m", place, settings=SourceSettings(), env={}, listener=ignore)
        return done.digest

    return push


@pytest.fixture
def place() -> str:
    return f"{os.environ.get('PIERHEAD_TEST_IMAGE', '').partition('/')[0]}/fresh/{uuid.uuid4().hex[:12]}:v1"


async def states(puller: Puller, settings: SourceSettings | None = None) -> dict[str, str]:
    async with Sources(settings or puller.settings, puller.paths, env=puller.env) as sources:
        found = await check(puller.store, puller.store.models(), sources)
    return {r.name: found[r.digest].state for r in puller.store.models()}


@registry
async def test_a_pull_of_an_unchanged_tag_costs_one_question(
    puller: Puller, publish: Callable[..., Any], place: str, asked: list[str]
) -> None:
    digest = await publish(place, make_gguf(20_000))
    first = await puller(place)
    asked.clear()
    puller.events.clear()
    assert await puller(place) == first
    assert asked == ["HEAD manifests"]
    assert puller.of(PullDone)[0].cached
    assert not puller.of(PullProgress)
    assert [(m.by, m.digest) for m in puller.store.history(place)] == [("pull", digest), ("pull", digest)]


@registry
async def test_a_tag_that_moved_is_stale_until_it_is_pulled_and_only_the_new_moves(
    puller: Puller, publish: Callable[..., Any], place: str, asked: list[str]
) -> None:
    old = await publish(place, make_gguf(20_000))
    await puller(place, name="mine")
    assert await states(puller) == {"mine": "current"}
    new = await publish(place, make_gguf(20_000, 2))
    asked.clear()
    assert await states(puller) == {"mine": "stale"}
    assert asked == ["HEAD manifests"]
    last = puller.store.looks()["mine"]
    assert (last.by, last.source.rpartition("@")[2]) == ("check", new)
    assert (await puller("mine")).digest == new, "the name remembers where it came from"
    assert await states(puller) == {"mine": "current"}
    assert [v.digest for v in puller.store.versions("mine")] == [old]
    puller.store.tag(f"mine@{old}", "mine")
    assert await states(puller) == {"mine": "stale"}


@registry
async def test_a_tag_that_is_gone_and_a_source_that_is_silent_are_told_apart(
    puller: Puller, publish: Callable[..., Any], place: str, unused: int
) -> None:
    await publish(place, make_gguf(20_000))
    record = await puller(place, name="there")
    manifest = puller.store.blob_path(record.digest).read_bytes()
    parts = json.loads(manifest)
    document = puller.store.blob_path(parts["config"]["digest"]).read_bytes()
    for name, source in (
        ("gone", f"oci://{place.partition('/')[0]}/fresh/nowhere:v1@{record.digest}"),
        ("silent", f"oci://127.0.0.1:{unused}/a/b:v1@{record.digest}"),
        ("fixed", f"oci://{place.partition('/')[0]}/a/b@{record.digest}"),
    ):
        changed = manifest.replace(b'"annotations":{', b'"annotations":{"n":"%s",' % name.encode(), 1)
        puller.store.commit_artifact(name, changed, document, {"source": source})
    found = await states(puller)
    assert found == {"there": "current", "gone": "gone", "silent": "unknown", "fixed": "fixed"}
    assert puller.store.looks()["silent"].by == "pull"


async def test_a_hubs_branch_is_asked_for_its_commit(puller: Puller, hub: FakeHub) -> None:
    hub.add("org/M-GGUF", {"M-Q4_K_M.gguf": make_gguf(20_000), "LICENSE": b"free"})
    first = await puller("hf:org/M-GGUF")
    assert first.source.endswith(f"@{COMMIT}")
    before = dict(hub.server.sent), dict(hub.cdn.sent)
    puller.events.clear()
    assert await puller("hf:org/M-GGUF") == first
    assert puller.of(PullDone)[0].cached
    sent = {path: n for path, n in hub.server.sent.items() if n != before[0].get(path)}
    assert list(sent) == ["/api/models/org/M-GGUF/revision/main"]
    assert hub.cdn.sent == before[1]
    assert await states(puller) == {first.name: "current"}
    hub.add("org/M-GGUF", {"M-Q4_K_M.gguf": make_gguf(20_000, 2), "LICENSE": b"free"}, commit=OTHER)
    assert await states(puller) == {first.name: "stale"}
    again = await puller("hf:org/M-GGUF")
    assert again.source.endswith(f"@{OTHER}")
    assert [v.digest for v in puller.store.versions(first.name)] == [first.digest]


async def test_what_was_pulled_by_commit_or_from_a_file_is_never_stale(
    puller: Puller, hub: FakeHub, tmp_path: Path
) -> None:
    hub.add("org/M-GGUF", {"M-Q4_K_M.gguf": make_gguf(20_000)})
    (tmp_path / "a.gguf").write_bytes(make_gguf(9_000))
    await puller(f"hf:org/M-GGUF@{COMMIT}", name="commit")
    await puller(str(tmp_path / "a.gguf"), name="file")
    hub.add("org/M-GGUF", {"M-Q4_K_M.gguf": make_gguf(20_000, 2)}, commit=OTHER)
    assert await states(puller) == {"commit": "fixed", "file": "fixed"}


@pytest.mark.parametrize("source", ["", "file:/x", "oci://@sha256:" + "0" * 64, "hf:../x@" + "a" * 40, "nonsense:@"])
def test_a_source_that_makes_no_sense_is_asked_nothing(puller: Puller, source: str) -> None:
    record = made(puller.store, "m", b"x" * 100)
    assert origin(msgspec.structs.replace(record, source=source))[0] is None


def claim(store: Store, name: str, source: str) -> ModelRecord:
    """A model that says of itself, as an archive can, that it came from somewhere."""
    record = made(store, name, make_gguf(7_000, 9))
    manifest = store.blob_path(record.digest).read_bytes()
    config = store.blob_path(json.loads(manifest)["config"]["digest"]).read_bytes()
    return store.commit_artifact(name, manifest, config, {"source": source}, by="import")


async def test_a_model_that_only_claims_to_come_from_a_hub_does_not_stand_in_for_the_hubs(
    puller: Puller, hub: FakeHub
) -> None:
    hub.add("org/M-GGUF", {"M-Q4_K_M.gguf": make_gguf(20_000)})
    evil = claim(puller.store, "hf.co/org/M-GGUF", f"hf:org/M-GGUF:Q4_K_M@{COMMIT}")
    assert (await puller("hf:org/M-GGUF")).digest != evil.digest


@registry
async def test_a_model_that_only_claims_to_come_from_a_registry_does_not_stand_in_for_the_registrys(
    puller: Puller, publish: Callable[..., Any], place: str
) -> None:
    digest = await publish(place, make_gguf(20_000))
    claim(puller.store, place, f"oci://{place}@{digest}")
    assert await states(puller) == {place: "stale"}
    assert (await puller(place)).digest == digest
