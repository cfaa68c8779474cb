"""Short names: the built-in file, the user's own, sources tried in order, digests remembered."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from pierhead import events, refs
from pierhead.config import SourceSettings
from pierhead.errors import ConfigError, CorruptData, NotFound, SourceUnavailable
from pierhead.paths import Paths
from pierhead.sources.catalog import Catalog, builtin, read, unknown_name

from .servers import FakeHub, Puller, Server, digest, make_gguf

MODEL = make_gguf()
REPO = "org/Tiny-GGUF"


def write(puller: Puller, text: str) -> None:
    puller.paths.config.mkdir(parents=True, exist_ok=True)
    (puller.paths.config / "catalog.toml").write_text(text)


def test_the_guides_example_is_a_catalogue() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "catalog.md").read_text("utf-8")
    example = re.search(r"```toml\n(.*?)```", guide, re.S)
    assert example
    (made,) = read(example[1], "the guide")
    assert made.references == ("helper", "helper:v2")


def entry(*sources: str, sha: str = "", name: str = "tiny") -> str:
    listed = ", ".join(f'"{s}"' for s in sources)
    return f'[[model]]\nname = "{name}"\ntags = ["latest", "1m"]\nsources = [{listed}]\ndigest = "{sha}"\n'


def test_the_built_in_catalog_is_sound() -> None:
    entries = builtin()
    assert {"smollm2", "gemma3", "qwen3", "llama3.2", "phi4-mini"} <= {e.name for e in entries}
    names = [r for e in entries for r in e.references]
    assert len(names) == len(set(names))
    assert all(refs.parse(n).kind == "short" for n in names)
    assert all(e.description and e.parameters and e.license for e in entries)
    assert all(bool(e.digest) == bool(e.size) for e in entries)


def test_names_are_found_with_and_without_tag_in_any_case(home: Paths) -> None:
    catalog = Catalog.load(SourceSettings(), home)
    found = catalog.find("smollm2")
    assert found == catalog.find("SmolLM2:135M") == catalog.find("smollm2:latest")
    assert found != catalog.find("smollm2:360m")
    assert found in catalog.entries()


@pytest.mark.parametrize(("name", "hint"), [("smolm2", "smollm2"), ("qwen3:0.5b", "qwen3:0.6b"), ("zzz", "hf:org")])
def test_an_unknown_name_says_what_is_close(home: Paths, name: str, hint: str) -> None:
    with pytest.raises(NotFound) as caught:
        Catalog.load(SourceSettings(), home).find(name)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[model]\n", "cannot read"),
        ('[[model]]\nname = "x"\n', "sources"),
        ('[[model]]\nname = "x"\nsources = []\n', "no sources"),
        ('[[model]]\nname = "x y"\nsources = ["pypi:a"]\n', "not a name"),
        ('[[model]]\nname = "x"\nsources = ["other"]\n', "itself a short name"),
        ('[[model]]\nname = "x"\nsources = ["hf:nope"]\n', "hub"),
        ('[[model]]\nname = "x"\nsources = ["pypi:a"]\ndigest = "abc"\n', "sha256"),
        ('[[model]]\nname = "x"\nsources = ["pypi:a"]\nsorces = []\n', "sorces"),
        ('[[model]]\nname = "x"\nsources = ["pypi:a"]\ntags = ["a b"]\n', "tags"),
    ],
)
def test_a_damaged_catalog_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(text, "here.toml")


async def test_the_users_own_catalog_adds_and_overrides(server: Server, puller: Puller, tmp_path: Path) -> None:
    url = server.add("/m.gguf", MODEL)
    write(puller, entry(url, name="smollm2"))
    other = tmp_path / "team.toml"
    other.write_text(entry(url, name="ours") + entry("pypi:none", name="smollm2"))
    puller.settings = msgspec.structs.replace(puller.settings, catalogs=(str(other),))
    assert puller.content(await puller("smollm2")) == MODEL
    assert (await puller("ours:1m")).name == "ours:1m"


async def test_a_catalog_that_is_named_and_missing_is_an_error(puller: Puller) -> None:
    puller.settings = msgspec.structs.replace(puller.settings, catalogs=("/nowhere/team.toml",))
    with pytest.raises(ConfigError, match="/nowhere/team"):
        await puller("smollm2")


async def test_the_next_source_is_used_and_the_failure_told(server: Server, puller: Puller, unused: int) -> None:
    good = server.add("/m.gguf", MODEL)
    gone = f"{server.url}/gone.gguf"
    bad = server.add("/bad.gguf", make_gguf(seed=9))
    write(puller, entry(f"http://127.0.0.1:{unused}/m.gguf", gone, "pypi:no-such", bad, good, sha=digest(MODEL)))
    record = await puller("tiny")
    assert puller.content(record) == MODEL
    assert record.name == "tiny"
    notes = [n.message for n in puller.of(events.Note)]
    assert len(notes) == 4
    assert all("trying the next source" in n for n in notes)


async def test_when_all_sources_fail_each_reason_is_told(server: Server, puller: Puller, unused: int) -> None:
    write(puller, entry(f"http://127.0.0.1:{unused}/m.gguf", f"{server.url}/gone.gguf"))
    with pytest.raises(SourceUnavailable, match="cannot read from") as caught:
        await puller("tiny")
    assert "404" in caught.value.message
    assert [r["code"] for r in caught.value.data["reasons"]] == ["source_unavailable", "not_found"]
    assert puller.leftovers() == []


async def test_a_model_that_is_there_with_the_right_digest_asks_nobody(server: Server, puller: Puller) -> None:
    write(puller, entry(server.add("/m.gguf", MODEL), sha=digest(MODEL)))
    await puller("tiny")
    count = len(server.requests)
    await puller("tiny")
    assert len(server.requests) == count
    assert puller.of(events.PullDone)[-1].cached


async def test_without_a_digest_the_first_pull_is_remembered(server: Server, puller: Puller) -> None:
    write(puller, entry(server.add("/m.gguf", MODEL)))
    await puller("tiny")
    puller.store.remove("tiny")
    server.files["/m.gguf"].data, server.files["/m.gguf"].etag = make_gguf(seed=7), '"v2"'
    with pytest.raises(CorruptData, match="expected"):
        await puller("tiny")
    assert puller.store.models() == []


async def test_a_hub_source_stays_at_the_commit_of_the_first_pull(hub: FakeHub, puller: Puller) -> None:
    hub.add(REPO, {"Tiny-Q4_K_M.gguf": MODEL}, commit="a" * 40)
    write(puller, entry(f"hf:{REPO}"))
    first = await puller("tiny")
    puller.store.remove("tiny")
    hub.add(REPO, {"Tiny-Q4_K_M.gguf": make_gguf(seed=7)}, commit="b" * 40)
    again = await puller("tiny")
    assert again.source == first.source
    assert puller.content(again) == MODEL


async def test_a_header_can_be_read_through_a_short_name(server: Server, puller: Puller, unused: int) -> None:
    write(puller, entry(f"http://127.0.0.1:{unused}/m.gguf", server.add("/m.gguf", MODEL)))
    found = await puller.inspect("tiny")
    assert found["name"] == "tiny"
    assert found["metadata"]["architecture"] == "llama"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("ai/smollm2", "oci://docker.io/ai/smollm2"),
        ("ai/smollm2:360M-Q4_K_M", "oci://docker.io/ai/smollm2:360M-Q4_K_M"),
        ("team/model:v1", "oci://docker.io/team/model:v1"),
    ],
)
def test_a_name_with_an_owner_that_no_catalogue_has_is_of_docker_hub(home: Paths, text: str, place: str) -> None:
    assert str(Catalog.load(SourceSettings(), home).meaning(refs.parse(text))) == place


def test_a_catalogues_own_name_with_an_owner_comes_first(puller: Puller) -> None:
    write(puller, entry("hf:org/repo", name="ai/tiny"))
    found = Catalog.load(puller.settings, puller.paths).meaning(refs.parse("ai/tiny:1m"))
    assert not isinstance(found, refs.Reference)
    assert found.sources == ("hf:org/repo",)


def test_a_name_that_neither_has_says_both() -> None:
    with pytest.raises(NotFound, match=r"no catalog has a model 'ai/none'.*Docker Hub.*404") as caught:  # noqa: SIM117
        with unknown_name(refs.parse("ai/none")):
            raise NotFound("docker.io answers 404", data={"status": 404})
    assert caught.value.data == {"status": 404}
