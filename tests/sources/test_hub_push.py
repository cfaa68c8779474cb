"""Models pushed to a hub: checked by a double of its API, and read back by the hub's own client."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.formats.foreign import llama_folder

from pierhead import events
from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, BadReference, Conflict, NotFound, SourceUnavailable, UsageError
from pierhead.events import PushDone
from pierhead.refs import parse
from pierhead.registry.wire import Retry
from pierhead.sources.publish import Options, push_to_hub

from .hub_double import TOKEN, HubDouble, hub_double
from .servers import FAST, Puller, Server, make_gguf

MODEL = make_gguf(350_000)


@pytest.fixture
async def hub2() -> AsyncGenerator[HubDouble]:
    async with hub_double() as found:
        yield found
        assert found.problems == []


class Pusher:
    def __init__(self, puller: Puller, double: HubDouble) -> None:
        self.store = puller.store
        self.settings = SourceSettings(hf_endpoint=double.url, connect_timeout=5, read_timeout=5)
        self.env = {"HF_TOKEN": TOKEN, "HOME": puller.env["HOME"]}
        self.events: list[events.AnyEvent] = []

    async def __call__(self, target: str, options: Options = Options(), **more: Any) -> PushDone:  # noqa: B008
        async with asyncio.timeout(60):
            return await push_to_hub(
                self.store, more.pop("model", "tiny"), parse(target), options, settings=self.settings, env=self.env,
                listener=self.events.append, retry=more.pop("retry", FAST),
            )  # fmt: skip


@pytest.fixture
async def push(server: Server, puller: Puller, hub2: HubDouble) -> Pusher:
    await puller(server.add("/Tiny-Q4_0.gguf", MODEL), name="tiny")
    return Pusher(puller, hub2)


def tree(double: HubDouble, repo: str = "me/tiny", branch: str = "main") -> dict[str, bytes]:
    found = double.repos[repo]
    return {
        path: (double.objects if stored.large else double.blobs)[stored.oid]
        for path, stored in found.trees[found.branches[branch]].items()
        if path != ".gitattributes"
    }


async def test_a_model_goes_to_a_new_repository_in_one_commit_with_a_card(push: Pusher, hub2: HubDouble) -> None:
    done = await push("hf:me/tiny", Options(private=True, message="First"))
    assert hub2.repos["me/tiny"].private
    assert hub2.repos["me/tiny"].messages == ["initial commit", "First"]
    found = tree(hub2)
    assert found["Tiny-Q4_0.gguf"] == MODEL
    card = found["README.md"].decode()
    assert card.startswith("---\n")
    assert 'pier run hf:me/tiny:F32 "Hello"' in card
    assert done.commit == hub2.repos["me/tiny"].branches["main"]
    assert done.sent == len(MODEL)
    last = [e for e in push.events if isinstance(e, events.PushProgress) and e.file == "Tiny-Q4_0.gguf"][-1]
    assert (last.done, last.total) == (len(MODEL), len(MODEL))


async def test_what_the_hub_has_is_not_sent_again_and_makes_no_commit(push: Pusher, hub2: HubDouble) -> None:
    first = await push("hf:me/tiny")
    again = await push("hf:me/tiny")
    assert (again.sent, again.commit) == (0, first.commit)
    assert hub2.received == len(MODEL)
    elsewhere = await push("hf:me/other")
    assert elsewhere.sent == 0
    assert tree(hub2, "me/other")["Tiny-Q4_0.gguf"] == MODEL


async def test_a_branch_is_made_where_it_is_wanted(push: Pusher, hub2: HubDouble) -> None:
    await push("hf:me/tiny")
    done = await push("hf:me/tiny@refs/quants")
    assert done.name == "hf:me/tiny@refs/quants"
    assert "refs/quants" in hub2.repos["me/tiny"].branches
    with pytest.raises(NotFound, match="no branch 'v9'"):
        await push("hf:me/tiny@v9", Options(create=False))
    with pytest.raises(NotFound, match="no repository me/none"):
        await push("hf:me/none", Options(create=False))


async def test_the_card_of_the_repository_is_kept_and_that_of_the_user_goes_before(
    push: Pusher, hub2: HubDouble, tmp_path: Path
) -> None:
    mine = tmp_path / "card.md"
    mine.write_text("# Mine")
    await push("hf:me/tiny", Options(card=mine))
    assert tree(hub2)["README.md"] == b"# Mine"
    await push("hf:me/tiny")
    assert tree(hub2)["README.md"] == b"# Mine"
    assert len(hub2.repos["me/tiny"].messages) == 2


async def test_a_model_of_many_files_goes_as_it_is_with_its_own_card(
    push: Pusher, puller: Puller, hub2: HubDouble, tmp_path: Path
) -> None:
    folder = llama_folder(tmp_path / "llama", shards=2)
    (folder / "README.md").write_text("# Its own")
    await puller(str(folder), name="llama")
    await push("hf:me/tiny", model="llama")
    assert tree(hub2) == {p.name: p.read_bytes() for p in folder.iterdir()}


async def test_a_part_that_fails_is_sent_again_and_no_other(push: Pusher, hub2: HubDouble) -> None:
    failed: list[str] = []

    def fault(request: web.Request) -> web.Response | None:
        if request.method == "PUT" and request.path.endswith("/2") and len(failed) < 2:
            failed.append(request.path)
            return web.Response(status=503)
        return None

    hub2.fault = fault
    await push("hf:me/tiny")
    assert tree(hub2)["Tiny-Q4_0.gguf"] == MODEL
    assert hub2.received == len(MODEL)


async def test_addresses_that_expire_are_asked_for_again(push: Pusher, hub2: HubDouble) -> None:
    hub2.expired = {"1"}
    await push("hf:me/tiny")
    assert tree(hub2)["Tiny-Q4_0.gguf"] == MODEL
    assert hub2.uploads == 2


async def test_a_push_that_breaks_off_leaves_no_commit_and_goes_on_with_what_is_missing(
    push: Pusher, puller: Puller, hub2: HubDouble, tmp_path: Path
) -> None:
    folder = llama_folder(tmp_path / "llama", shards=3)
    await puller(str(folder), name="llama")
    arrived: list[str] = []

    def fault(request: web.Request) -> web.Response | None:
        if request.method != "PUT":
            return None
        arrived.append(request.path)
        return web.Response(status=500) if len(arrived) > 2 else None

    hub2.fault = fault
    with pytest.raises(SourceUnavailable):
        await push("hf:me/tiny", model="llama")
    assert tree(hub2) == {}
    before = hub2.received
    assert before > 0
    hub2.fault = None
    await push("hf:me/tiny", model="llama")
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert hub2.received == total


async def test_a_change_meanwhile_is_seen_and_nothing_is_sent_twice(push: Pusher, hub2: HubDouble) -> None:
    await push("hf:me/tiny", Options(message="first"))
    repo = hub2.repos["me/tiny"]
    repo.commit("main", {}, "somebody removed all")
    rivals = iter(range(2))

    def fault(request: web.Request) -> None:
        if "/commit/" in request.path and next(rivals, None) is not None:
            repo.commit("main", dict(repo.trees[repo.branches["main"]]), "rival")

    hub2.fault = fault
    await push("hf:me/tiny", Options(message="second"))
    assert repo.messages[-3:] == ["rival", "rival", "second"]
    assert hub2.received == len(MODEL)
    hub2.fault = lambda request: web.Response(status=412) if "/commit/" in request.path else None
    repo.commit("main", {}, "again")
    with pytest.raises(Conflict, match="keeps changing"):
        await push("hf:me/tiny")


async def test_a_commit_whose_answer_is_lost_is_not_made_twice(push: Pusher, hub2: HubDouble) -> None:
    lost: list[int] = []
    plain = hub2._commit  # pyright: ignore[reportPrivateUsage]

    def commit(*args: Any) -> web.Response:
        done = plain(*args)
        if lost:
            return done
        lost.append(1)
        return web.Response(status=504)

    hub2._commit = commit  # type: ignore[method-assign]
    done = await push("hf:me/tiny", Options(message="once"))
    assert hub2.repos["me/tiny"].messages == ["initial commit", "once"]
    assert done.commit == hub2.repos["me/tiny"].branches["main"]


async def test_a_fifth_of_all_requests_may_fail(push: Pusher, hub2: HubDouble) -> None:
    dice = random.Random(11)
    hub2.fault = lambda request: web.Response(status=dice.choice((429, 500, 503))) if dice.random() < 0.2 else None
    await push("hf:me/tiny", retry=Retry(attempts=8, first=0.001, most=0.01))
    assert tree(hub2)["Tiny-Q4_0.gguf"] == MODEL


async def test_the_token_is_needed_and_is_shown_nowhere(push: Pusher, hub2: HubDouble) -> None:
    push.env["HF_TOKEN"] = "hf_of_somebody"
    with pytest.raises(AccessDenied) as caught:
        await push("hf:me/tiny")
    assert "somebody" not in repr(caught.value.to_dict()) + repr(push.events)
    push.env["HF_TOKEN"] = TOKEN
    with pytest.raises(AccessDenied, match="rights to create") as caught:
        await push("hf:others/tiny")
    assert caught.value.hint
    push.settings = SourceSettings()
    push.env = {"HOME": push.env["HOME"]}
    with pytest.raises(AccessDenied, match="only with a token") as caught:
        await push("hf:me/tiny")
    assert "HF_TOKEN" in str(caught.value.hint)


async def test_places_for_uploads_without_protection_are_refused(push: Pusher, hub2: HubDouble) -> None:
    hub2.storage = "http://192.0.2.7"
    with pytest.raises(SourceUnavailable, match="refused"):
        await push("hf:me/tiny")


async def test_a_target_that_is_more_than_a_repository_is_refused(push: Pusher) -> None:
    with pytest.raises(BadReference, match="more than a repository"):
        await push("hf:me/tiny:Q4_0")


async def test_what_the_hub_says_about_a_refusal_is_shown(push: Pusher, hub2: HubDouble) -> None:
    hub2.fault = lambda request: (
        web.json_response({"error": "license must be one of …"}, status=400) if "/commit/" in request.path else None
    )
    with pytest.raises(UsageError, match="license must be"):
        await push("hf:me/tiny")


async def test_a_repository_that_moved_is_named(push: Pusher, hub2: HubDouble) -> None:
    hub2.fault = lambda request: (
        web.Response(status=307, headers={"Location": "/api/models/me/new/revision/main"})
        if "/revision/" in request.path
        else None
    )
    with pytest.raises(UsageError, match=r"moved to .*/me/new/"):
        await push("hf:me/tiny")


async def test_a_hub_that_wants_weights_inside_a_commit_is_not_obeyed(
    push: Pusher, hub2: HubDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pierhead.sources.hub_push.MAX_INLINE", 100_000)
    monkeypatch.setattr("tests.sources.hub_double.LARGE", (".none",))
    with pytest.raises(SourceUnavailable, match="too large"):
        await push("hf:me/tiny")


PEER = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, snapshot_download
repo, revision, target = sys.argv[1:4]
folder = snapshot_download(repo, revision=revision, local_dir=target)
card = ModelCard.load(Path(folder) / "README.md")
info = HfApi().model_info(repo, files_metadata=True)
print(json.dumps({"data": card.data.to_dict(), "sha": info.sha,
                  "lfs": {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}}))
"""


@pytest.mark.timeout(90)
async def test_the_hubs_own_client_reads_back_what_was_pushed(
    push: Pusher, puller: Puller, hub2: HubDouble, tmp_path: Path
) -> None:
    import json

    folder = llama_folder(tmp_path / "llama", shards=2, template="{{ messages }}")
    await puller(str(folder), name="llama")
    done = await push("hf:me/tiny", model="llama")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    env |= {"HF_ENDPOINT": hub2.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    target = tmp_path / "back"
    argv = [sys.executable, "-c", PEER, "me/tiny", done.commit, str(target)]
    child = await asyncio.to_thread(subprocess.run, argv, env=env, capture_output=True, text=True, timeout=80)
    assert child.returncode == 0, child.stderr[-3000:]
    said = json.loads(child.stdout)
    assert said["sha"] == done.commit
    assert set(said["lfs"]) == {p.name for p in folder.glob("*.safetensors")}
    assert said["data"]["library_name"] == "transformers"
    assert said["data"]["pipeline_tag"] == "text-generation"
    for path in folder.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
    puller.settings = push.settings
    record = await puller("hf:me/tiny", name="back")
    assert {f.name for f in record.files} == {p.name for p in folder.iterdir()} | {"README.md"}
