"""What is said about a model is found, brought along and published, with the referrers API and without."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from aiohttp import web

from pierhead.config import SourceSettings
from pierhead.errors import Conflict, CorruptData, SourceUnavailable
from pierhead.events import ignore
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.registry import referrers
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.registry.referrers import Attachment, fallback_tag, fetch_all, kept, list_referrers, manifest_for
from pierhead.registry.wire import Retry
from pierhead.sources.pull import pull
from pierhead.store.index import Descriptor
from pierhead.store.layout import Store
from pierhead.store.media import MANIFEST

from .referrers_double import Double, digest_of, serving

pytestmark = pytest.mark.timeout(60)
SUBJECT = Descriptor(MANIFEST, "sha256:" + "5" * 64, 500)
SETTINGS = SourceSettings()
SPDX = "application/spdx+json"
CYCLONE = "application/vnd.cyclonedx+json"


def registry(double: Double) -> Registry:
    name = image_name(parse(f"oci://{double.base}/a/b:v1"))
    return Registry(name, SETTINGS, Login(), retry=Retry(attempts=3, first=0.001, most=0.002))


def about(kind: str, text: str) -> Attachment:
    return manifest_for(SUBJECT, kind, [(kind, text.encode())], {"note": text})


@pytest.fixture
async def modern() -> AsyncGenerator[Double]:
    async with serving(Double(page=2)) as found:
        yield found


@pytest.fixture
async def plain() -> AsyncGenerator[Double]:
    async with serving(Double(api=False)) as found:
        yield found


async def fill(double: Double, count: int) -> list[Attachment]:
    made = [about(SPDX if i % 2 else CYCLONE, str(i)) for i in range(count)]
    async with registry(double) as there:
        for one in made:
            await referrers.push(there, SUBJECT.digest, one)
    return made


async def test_all_pages_of_the_api_are_read_and_no_fallback_is_written(modern: Double) -> None:
    made = await fill(modern, 5)
    async with registry(modern) as there:
        listing = await list_referrers(there, SUBJECT.digest)
        got = await fetch_all(there, SUBJECT.digest)
    assert listing.api
    assert {e.digest for e in listing.entries} == {m.digest for m in made}
    assert {g.digest: g.blobs for g in got} == {m.digest: m.blobs for m in made}
    assert fallback_tag(SUBJECT.digest) not in modern.manifests


@pytest.mark.parametrize("filters", [True, False])
async def test_one_kind_is_found_whether_or_not_the_registry_filters(modern: Double, filters: bool) -> None:
    modern.filters = filters
    await fill(modern, 5)
    async with registry(modern) as there:
        listing = await list_referrers(there, SUBJECT.digest, SPDX)
    assert [e.artifact_type for e in listing.entries] == [SPDX, SPDX]


async def test_without_the_api_the_fallback_lists_them_and_keeps_what_others_wrote(plain: Double) -> None:
    theirs = {"mediaType": MANIFEST, "digest": "sha256:" + "7" * 64, "size": 7, "platform": {"os": "x"}}
    index = {"schemaVersion": 2, "mediaType": referrers.INDEX, "manifests": [theirs], "annotations": {"by": "them"}}
    plain.put(referrers.INDEX, json.dumps(index).encode(), fallback_tag(SUBJECT.digest))
    made = await fill(plain, 3)
    await fill(plain, 3)
    now = json.loads(plain.manifests[fallback_tag(SUBJECT.digest)][1])
    assert now["manifests"][0] == theirs
    assert now["annotations"] == {"by": "them"}
    assert [e["digest"] for e in now["manifests"][1:]] == [m.digest for m in made]
    assert now["manifests"][1]["artifactType"] == CYCLONE
    assert now["manifests"][1]["annotations"] == {"note": "0"}
    async with registry(plain) as there:
        assert not (await list_referrers(there, SUBJECT.digest)).api
        assert len(await fetch_all(there, SUBJECT.digest)) == 3


async def test_many_writers_of_the_fallback_lose_nothing(plain: Double) -> None:
    made = [about(SPDX, str(i)) for i in range(4)]

    async def one(attachment: Attachment) -> None:
        async with registry(plain) as there:
            await referrers.push(there, SUBJECT.digest, attachment)

    for _ in range(3):  # a writer that was overwritten after it looked writes again at its next push
        await asyncio.gather(*map(one, made))
    now = json.loads(plain.manifests[fallback_tag(SUBJECT.digest)][1])
    assert {e["digest"] for e in now["manifests"]} == {m.digest for m in made}


async def test_a_fallback_that_is_replaced_at_once_is_written_again(plain: Double) -> None:
    tag = fallback_tag(SUBJECT.digest)
    stolen: list[int] = []

    def behave(request: web.Request) -> web.Response | None:
        if request.method == "GET" and request.path.endswith(tag) and tag in plain.manifests and len(stolen) < 2:
            stolen.append(1)
            plain.put(referrers.INDEX, b'{"schemaVersion":2,"manifests":[]}', tag)
        return None

    plain.behave = behave
    (mine,) = await fill(plain, 1)
    assert mine.digest in plain.manifests[tag][1].decode()
    assert stolen == [1, 1]


async def test_a_fallback_that_others_keep_replacing_is_said(plain: Double) -> None:
    tag = fallback_tag(SUBJECT.digest)

    def behave(request: web.Request) -> web.Response | None:
        if request.method == "GET" and request.path.endswith(tag):
            plain.put(referrers.INDEX, b'{"schemaVersion":2,"manifests":[]}', tag)
        return None

    plain.behave = behave
    with pytest.raises(Conflict, match="keep replacing"):
        await fill(plain, 1)


async def test_a_tag_that_holds_something_else_is_not_overwritten(plain: Double) -> None:
    tag = fallback_tag(SUBJECT.digest)
    plain.put(MANIFEST, b"{}", tag)
    with pytest.raises(CorruptData, match="not a list"):
        await fill(plain, 1)
    assert plain.manifests[tag] == (MANIFEST, b"{}")


async def test_damaged_foreign_and_huge_referrers_do_not_hide_the_others(modern: Double) -> None:
    (good, *_) = await fill(modern, 1)
    other = manifest_for(Descriptor(MANIFEST, "sha256:" + "6" * 64, 5), SPDX, [(SPDX, b"x")], {})
    huge = about(SPDX, "huge").manifest.replace(b'"size":4', b'"size":4000000000')
    gone = about(SPDX, "its blob is gone")
    swapped = about(SPDX, "its blob is another")
    modern.blobs[swapped.document.layers[0].digest] = b"something else      "
    bodies = [other.manifest, huge, gone.manifest, swapped.manifest, b"[1"]
    entries = [{"mediaType": MANIFEST, "digest": modern.put(MANIFEST, b), "size": len(b)} for b in bodies]
    entries += [{"mediaType": MANIFEST, "digest": d, "size": 1} for d in ("sha256:../..", "sha256:" + "8" * 64)]
    entries.append({"mediaType": MANIFEST, "digest": good.digest, "size": len(good.manifest)})
    page = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()

    def behave(request: web.Request) -> web.Response | None:
        return web.Response(body=page, content_type=referrers.INDEX) if "/referrers/" in request.path else None

    modern.behave = behave
    async with registry(modern) as there:
        assert [g.digest for g in await fetch_all(there, SUBJECT.digest)] == [good.digest]


def test_what_the_store_keeps_is_read_within_the_same_bounds(home: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive may bring statements of any size: they must not fill the memory of whoever starts the model."""
    store = Store.open(home.store)
    small, large = about(SPDX, "small"), about(SPDX, "l" * 5000)
    many = manifest_for(SUBJECT, SPDX, [(SPDX, str(n).encode()) for n in range(20)], {})
    referrers.keep(store, SUBJECT.digest, [large, many, small])
    assert len(kept(store, SUBJECT.digest)) == 2, "of too many parts"
    monkeypatch.setattr(referrers, "MAX_BLOB", 4000)
    assert kept(store, SUBJECT.digest) == [small]
    monkeypatch.setattr(referrers, "MAX_BLOB", 8000)
    monkeypatch.setattr(referrers, "MAX_TOTAL", 5000)
    assert kept(store, SUBJECT.digest) == [small]


async def test_a_flood_of_referrers_is_bounded_and_signatures_come_first(
    modern: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(referrers, "MAX_FETCHED", 3)
    await fill(modern, 6)
    signature = about("application/vnd.dev.sigstore.bundle.v0.3+json", "{}")
    async with registry(modern) as there:
        await referrers.push(there, SUBJECT.digest, about("text/plain", "noise"))
        await referrers.push(there, SUBJECT.digest, signature)
        modern.seen.clear()
        got = await fetch_all(there, SUBJECT.digest)
    assert len(got) == 3
    assert "text/plain" not in {g.kind for g in got}
    monkeypatch.setattr(referrers, "MAX_TOTAL", 1)
    async with registry(modern) as there:
        assert len(await fetch_all(there, SUBJECT.digest)) == 1


def _endless(request: web.Request) -> web.Response | None:
    if "/referrers/" not in request.path:
        return None
    headers = {"Link": f'<{request.path}>; rel="next"'}
    return web.Response(body=b'{"schemaVersion":2,"manifests":[]}', content_type=referrers.INDEX, headers=headers)


async def test_pages_without_an_end_end(modern: Double) -> None:
    modern.behave = _endless
    async with registry(modern) as there:
        assert (await list_referrers(there, SUBJECT.digest)).entries == ()
    assert len(modern.seen) == referrers.MAX_PAGES


async def test_a_page_on_another_host_is_not_asked_for(modern: Double) -> None:
    def behave(request: web.Request) -> web.Response | None:
        headers = {"Link": '<http://169.254.169.254/x>; rel="next"'}
        return web.Response(body=b'{"manifests":[]}', content_type=referrers.INDEX, headers=headers)

    modern.behave = behave
    async with registry(modern) as there:
        with pytest.raises(SourceUnavailable, match="another host"):
            await list_referrers(there, SUBJECT.digest)


@pytest.mark.parametrize("status", [400, 404, 405, 501])
async def test_refusals_of_the_api_lead_to_the_fallback(modern: Double, status: int) -> None:
    def behave(request: web.Request) -> web.Response | None:
        return web.Response(status=status) if "/referrers/" in request.path else None

    modern.behave = behave
    async with registry(modern) as there:
        assert not (await list_referrers(there, SUBJECT.digest)).api


async def test_cosigns_older_tags_are_read_and_published(plain: Double) -> None:
    payload = b'{"critical":{}}'
    digest = digest_of(payload)
    config = b"{}"
    plain.blobs |= {digest: payload, digest_of(config): config}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest_of(config),
            "size": 2,
        },
        "layers": [
            {
                "mediaType": referrers.SIMPLE_SIGNING,
                "digest": digest,
                "size": len(payload),
                "annotations": {"dev.cosignproject.cosign/signature": "c2ln"},
            }
        ],
    }
    tag = fallback_tag(SUBJECT.digest) + ".sig"
    plain.put(MANIFEST, json.dumps(manifest).encode(), tag)
    async with registry(plain) as there:
        (got,) = await fetch_all(there, SUBJECT.digest)
        assert got.blobs[digest] == payload
        del plain.manifests[tag]
        await referrers.push(there, SUBJECT.digest, got)
    assert plain.manifests[tag][1] == got.manifest


@pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here (scripts/test-host)")
async def test_referrers_travel_with_a_model_through_a_real_registry(
    home: Paths, tmp_path: Path, smollm2: Path
) -> None:
    """Debian's docker-registry has no referrers API: the fallback is used for real."""
    first, second = Store.open(home.store), Store.open(tmp_path / "other")
    mine = await pull(str(smollm2), store=first, settings=SETTINGS, paths=home, name="mine")
    size = first.blob_path(mine.digest).stat().st_size
    made = [
        manifest_for(Descriptor(MANIFEST, mine.digest, size), kind, [(kind, kind.encode())], {})
        for kind in (SPDX, CYCLONE)
    ]
    referrers.keep(first, mine.digest, made)
    referrers.keep(first, mine.digest, made)
    assert len(first.referrers(mine.digest)) == 2
    where = f"{os.environ['PIERHEAD_TEST_IMAGE'].partition('/')[0]}/models/{uuid.uuid4().hex[:12]}:v1"
    for _ in range(2):
        await push_model(first, "mine", image_name(parse(where)), settings=SETTINGS, env={}, listener=ignore)
    back = await pull(where, store=second, settings=SETTINGS, paths=home, env={})
    assert back.digest == mine.digest
    assert {a.digest: a.blobs for a in kept(second, back.digest)} == {a.digest: a.blobs for a in made}
    second.collect()
    assert len(kept(second, back.digest)) == 2
    second.remove(where)
    assert not second.has(made[0].digest)
