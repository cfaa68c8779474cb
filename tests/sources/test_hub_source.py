"""Hugging Face's shape of a hub: pinned commits, quantizations by tag, shards, tokens and hashes."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path

import pytest
from aiohttp import web

from pierhead import events
from pierhead.errors import AccessDenied, CorruptData, NotFound, SourceUnavailable, UsageError
from pierhead.registry import transfer
from pierhead.registry.wire import Retry, retry_after
from pierhead.sources.hub import endpoint, find_token

from .servers import COMMIT, FakeHub, Puller, digest, make_gguf

Q4, Q8 = make_gguf(200_000, 4), make_gguf(400_000, 8)
REPO = "org/Tiny-GGUF"
FILES = {"Tiny-Q8_0.gguf": Q8, "Tiny-Q4_K_M.gguf": Q4, "README.md": b"# hi", "LICENSE": b"Apache"}


async def test_a_tag_chooses_the_quantization_in_any_case(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    record = await puller(f"hf:{REPO}:q8_0")
    assert puller.content(record) == Q8
    assert record.name == f"hf.co/{REPO}:q8_0"


async def test_without_a_tag_the_documented_default_is_taken(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    assert puller.content(await puller(f"hf:{REPO}")) == Q4


async def test_the_source_is_pinned_to_the_commit(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    record = await puller(f"hf:{REPO}")
    assert record.source == f"hf:{REPO}:Q4_K_M@{COMMIT}"
    assert record.annotations["org.opencontainers.image.revision"] == COMMIT
    resolved = [r.path for r in hub.server.requests if "/resolve/" in r.path]
    assert resolved
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)


async def test_a_revision_is_asked_for(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES, commit="f" * 40, revisions=("v2",))
    record = await puller(f"hf:{REPO}@v2")
    assert record.source.endswith("@" + "f" * 40)


async def test_a_tag_that_matches_nothing_lists_the_choices_with_sizes(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    with pytest.raises(NotFound, match="Q2_K") as caught:
        await puller(f"hf:{REPO}:Q2_K")
    assert "Q4_K_M (200.2 kB), Q8_0 (400.2 kB)" in str(caught.value.hint)
    assert [c["tag"] for c in caught.value.data["choices"]] == ["Q4_K_M", "Q8_0"]


async def test_a_license_comes_along_and_is_checked_against_its_git_id(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    record = await puller(f"hf:{REPO}")
    assert [(f.name, f.role) for f in record.files] == [("Tiny-Q4_K_M.gguf", "weights"), ("LICENSE", "license")]
    assert puller.content(record, 1) == b"Apache"
    hub.server.files[f"/{REPO}/resolve/{COMMIT}/LICENSE"].data = b"Hacked"
    with pytest.raises(CorruptData, match="LICENSE"):
        await puller(f"hf:{REPO}:Q8_0")


async def test_all_shards_of_a_split_model_come(hub: FakeHub, puller: Puller) -> None:
    parts = {
        f"big/Big-Q4_K_M-0000{n}-of-00002.gguf": make_gguf(
            150_000, n, **{"split.no": n - 1, "split.count": 2, "split.tensors.count": 2}
        )
        for n in (1, 2)
    }
    hub.add(REPO, parts)
    record = await puller(f"hf:{REPO}")
    assert [f.name for f in record.files] == ["Big-Q4_K_M-00001-of-00002.gguf", "Big-Q4_K_M-00002-of-00002.gguf"]
    assert record.metadata["split_count"] == 2
    assert record.metadata["tensor_count"] == 2


async def test_a_split_model_with_a_shard_missing_is_refused(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"Big-Q4_K_M-00001-of-00003.gguf": Q4, "Big-Q4_K_M-00003-of-00003.gguf": Q8})
    with pytest.raises(CorruptData, match="2 of the 3 parts"):
        await puller(f"hf:{REPO}")


async def test_a_projector_comes_along(hub: FakeHub, puller: Puller) -> None:
    f16, f32 = make_gguf(110_000, 16), make_gguf(120_000, 32)
    hub.add(REPO, {"See-Q4_K_M.gguf": Q4, "mmproj-See-f32.gguf": f32, "mmproj-See-f16.gguf": f16})
    record = await puller(f"hf:{REPO}")
    assert [(f.name, f.role) for f in record.files] == [
        ("See-Q4_K_M.gguf", "weights"),
        ("mmproj-See-f16.gguf", "mmproj"),
    ]


async def test_a_file_whose_hash_differs_from_the_hubs_is_refused(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES, lie={"Tiny-Q4_K_M.gguf": hashlib.sha256(b"other").hexdigest()})
    with pytest.raises(CorruptData, match="expected"):
        await puller(f"hf:{REPO}")
    assert puller.leftovers() == []
    assert puller.store.models() == []


async def test_the_token_goes_to_the_hub_and_never_to_where_it_redirects(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES, token="hf_secret")
    puller.env["HF_TOKEN"] = "hf_secret"
    record = await puller(f"hf:{REPO}")
    assert puller.content(record) == Q4
    assert all(r.headers.get("Authorization") == "Bearer hf_secret" for r in hub.server.requests)
    assert hub.cdn.requests
    assert not any("Authorization" in r.headers for r in hub.cdn.requests)
    assert "secret" not in repr(puller.events) + repr(record)


async def test_a_gated_model_says_where_to_accept_its_terms(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES, token="hf_secret", gated=True)
    with pytest.raises(AccessDenied, match="gated") as caught:
        await puller(f"hf:{REPO}")
    assert f"/{REPO}" in str(caught.value.hint)
    assert "HF_TOKEN" in str(caught.value.hint)
    puller.env["HF_TOKEN"] = "hf_of_somebody_else"
    with pytest.raises(AccessDenied, match="gated") as caught:
        await puller(f"hf:{REPO}")
    assert "somebody" not in repr(caught.value.to_dict())
    assert puller.leftovers() == []


async def test_a_private_or_missing_repository_says_both(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES, token="hf_secret")
    with pytest.raises(AccessDenied, match="does not exist or is private"):
        await puller(f"hf:{REPO}")


async def test_a_repository_that_is_not_there_is_not_found(hub: FakeHub, puller: Puller) -> None:
    with pytest.raises(NotFound, match="no repository org/none"):
        await puller("hf:org/none")


async def test_a_repository_of_pickles_is_refused_before_anything_is_fetched(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"pytorch_model.bin": b"x", "config.json": b"{}"})
    with pytest.raises(UsageError, match="pickles"):
        await puller(f"hf:{REPO}")
    assert not any("/resolve/" in r.path for r in hub.server.requests)


async def test_several_models_with_one_tag_are_told_apart_by_file_name(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"Small-Q4_K_M.gguf": Q4, "Large-Q4_K_M.gguf": Q8})
    with pytest.raises(UsageError, match="several") as caught:
        await puller(f"hf:{REPO}:Q4_K_M")
    assert "Large-Q4_K_M" in str(caught.value.hint)
    assert puller.content(await puller(f"hf:{REPO}:Large-Q4_K_M.gguf")) == Q8


async def test_an_answer_that_is_no_hubs_is_an_unusable_source(hub: FakeHub, puller: Puller) -> None:
    hub.server.add(f"/api/models/{REPO}/revision/main", b"<html>captive portal</html>")
    with pytest.raises(SourceUnavailable, match="JSON"):
        await puller(f"hf:{REPO}")
    hub.server.add(f"/api/models/{REPO}/revision/main", b'{"sha": 5}')
    with pytest.raises(SourceUnavailable, match="model hub"):
        await puller(f"hf:{REPO}")


async def test_a_dropped_transfer_goes_on_from_the_other_host(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"Tiny-Q8_0.gguf": Q8})
    path = "/lfs/" + digest(Q8).removeprefix("sha256:")
    hub.cdn.files[path].drops = [150_000, 120_000]
    assert puller.content(await puller(f"hf:{REPO}")) == Q8
    assert hub.cdn.sent[path] < len(Q8) + 200_000


async def test_one_file_in_two_repositories_is_fetched_once(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    hub.add("other/Tiny-GGUF", FILES)
    await puller(f"hf:{REPO}")
    sent = dict(hub.cdn.sent)
    await puller("hf:other/Tiny-GGUF")
    assert hub.cdn.sent == sent
    assert puller.of(events.PullDone)[-1].cached is True


async def test_a_header_is_read_without_fetching_the_model(hub: FakeHub, puller: Puller) -> None:
    large = make_gguf(20_000_000, noise=False)
    hub.add(REPO, {"Tiny-Q4_K_M.gguf": large})
    found = await puller.inspect(f"hf:{REPO}")
    assert found["metadata"]["architecture"] == "llama"
    assert found["size"] == len(large)
    assert found["source"] == f"hf:{REPO}:Q4_K_M@{COMMIT}"
    assert sum(hub.cdn.sent.values()) < 400_000
    assert puller.store.models() == []


def test_the_token_is_found_where_the_hubs_own_tools_keep_it(tmp_path: Path) -> None:
    assert find_token({"HOME": str(tmp_path)}) == ""
    kept = tmp_path / ".cache" / "huggingface" / "token"
    kept.parent.mkdir(parents=True)
    kept.write_text("hf_file\n")
    assert find_token({"HOME": str(tmp_path)}) == "hf_file"
    assert find_token({"HOME": str(tmp_path), "HF_TOKEN": " hf_env "}) == "hf_env"
    other = tmp_path / "elsewhere"
    other.write_text("hf_other")
    assert find_token({"HOME": str(tmp_path), "HF_TOKEN_PATH": str(other)}) == "hf_other"


def test_the_endpoint_comes_from_the_setting_or_the_environment() -> None:
    default = "https://huggingface.co"
    assert endpoint(default, {}) == default
    assert endpoint(default, {"HF_ENDPOINT": "https://mirror/"}) == "https://mirror"
    assert endpoint("https://own", {"HF_ENDPOINT": "https://mirror"}) == "https://own"


# --- ranges in parallel -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts small enough that a small model has many."""
    monkeypatch.setattr(transfer, "SEGMENT", 50_000)
    monkeypatch.setattr(transfer, "WINDOW", 400_000)


@pytest.mark.usefixtures("small_parts")
async def test_parts_come_in_parallel_and_the_hub_is_not_asked_for_each(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"Tiny-Q8_0.gguf": Q8})
    record = await puller(f"hf:{REPO}")
    assert puller.content(record) == Q8
    path = "/lfs/" + digest(Q8).removeprefix("sha256:")
    parts = [r for r in hub.cdn.asked(path) if r.startswith("bytes=")]
    assert len(parts) >= len(Q8) // 50_000
    asked = [r for r in hub.server.requests if "/resolve/" in r.path]
    assert len(asked) <= 1 + 4  # the look at the header, and one for each of the first connections


@pytest.mark.usefixtures("small_parts")
async def test_an_address_that_expires_meanwhile_is_asked_for_again(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"Tiny-Q8_0.gguf": Q8}, token="hf_secret")
    puller.env["HF_TOKEN"] = "hf_secret"
    at_cdn = hub.cdn.files["/lfs/" + digest(Q8).removeprefix("sha256:")]
    at_hub = hub.server.files[f"/{REPO}/resolve/{COMMIT}/Tiny-Q8_0.gguf"]
    check, seen = at_hub.gate, dict[str, int]()
    assert check

    def sign(request: web.Request) -> web.Response | None:
        at_hub.redirect = at_hub.redirect.partition("?")[0] + f"?X-Amz-Signature={len(hub.server.requests)}"
        return check(request)

    def expire(request: web.Request) -> web.Response | None:
        signature = request.query["X-Amz-Signature"]
        seen[signature] = seen.get(signature, 0) + 1
        return web.Response(status=403) if seen[signature] > 3 else None

    at_hub.gate, at_cdn.gate = sign, expire
    assert puller.content(await puller(f"hf:{REPO}")) == Q8
    assert len(seen) > 2
    assert not any("Authorization" in r.headers for r in hub.cdn.requests)


@pytest.mark.usefixtures("small_parts")
async def test_a_fifth_of_all_requests_may_fail(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    dice = random.Random(5)

    def spoil(request: web.Request) -> web.Response | None:
        return web.Response(status=dice.choice((429, 500, 503))) if dice.random() < 0.2 else None

    for served in (*hub.server.files.values(), *hub.cdn.files.values()):
        served.gate = spoil
    record = await puller(f"hf:{REPO}:Q8_0", retry=Retry(attempts=8, first=0.001, most=0.01))
    assert puller.content(record) == Q8


async def test_a_hub_that_limits_its_rate_is_given_the_time_it_asks_for(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, FILES)
    served = hub.server.files[f"/api/models/{REPO}/revision/main"]
    served.statuses = [429]
    served.headers = {"RateLimit": '"api";r=0;t=1'}
    before = asyncio.get_running_loop().time()
    await puller(f"hf:{REPO}")
    assert asyncio.get_running_loop().time() - before >= 1


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "100000"}, 120.0),
        ({"RateLimit": '"resolvers";r=0;t=33'}, 33.0),
        ({"RateLimit": '"resolvers";r=12;t=33'}, None),
        ({"RateLimit": "nonsense"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait_is_read_from_either_header(headers: dict[str, str], wait: float | None) -> None:
    assert retry_after(headers) == wait


@pytest.mark.usefixtures("small_parts")
async def test_a_hub_whose_storage_knows_no_ranges_is_read_in_one_go(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"Tiny-Q8_0.gguf": Q8})
    hub.cdn.files["/lfs/" + digest(Q8).removeprefix("sha256:")].ranges = False
    assert puller.content(await puller(f"hf:{REPO}")) == Q8
