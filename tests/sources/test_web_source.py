"""Models behind plain addresses: resume, validators, servers that lie."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from pierhead import events
from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.sources.http import redact
from pierhead.store.media import docker_type
from pierhead.store.model import Layer

from .servers import Puller, Server, digest, make_gguf

MODEL = make_gguf()


async def test_a_model_behind_an_address_is_pulled_and_named_after_its_file(server: Server, puller: Puller) -> None:
    url = server.add("/dir/Tiny-Q4_0.gguf", MODEL)
    record = await puller(url)
    assert record.name == "tiny-q4_0"
    assert puller.content(record) == MODEL
    assert record.files[0].name == "Tiny-Q4_0.gguf"
    assert record.metadata["architecture"] == "llama"
    assert puller.leftovers() == []


async def test_events_tell_the_plan_the_progress_and_the_end(server: Server, puller: Puller) -> None:
    record = await puller(server.add("/m.gguf", MODEL), name="mine")
    [planned] = puller.of(events.PullPlanned)
    assert (planned.name, planned.total) == ("mine", len(MODEL))
    last = puller.of(events.PullProgress)[-1]
    assert (last.done, last.total) == (len(MODEL), len(MODEL))
    [done] = puller.of(events.PullDone)
    assert (done.digest, done.size, done.cached) == (record.digest, len(MODEL), False)


async def test_a_digest_in_the_reference_is_checked(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL)
    good = digest(MODEL).removeprefix("sha256:")
    assert (await puller(f"{url}#sha256={good}")).files[0].digest == digest(MODEL)
    with pytest.raises(CorruptData, match="expected"):
        await puller(f"{url}#sha256={'0' * 64}", name="other")
    assert puller.leftovers() == []


async def test_a_later_pull_of_an_unchanged_model_leaves_it_as_it_is(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL)
    first = await puller(url)
    layers = [Layer(f.digest, f.size, docker_type(f.role, f.format), f.name, f.role) for f in first.files]
    created = {"org.opencontainers.image.created": "2020-01-01T00:00:00+00:00"}
    annotations = {**first.annotations, **created}
    aged = puller.store.commit_model(first.name, layers=layers, metadata=first.metadata, annotations=annotations)
    assert aged.digest != first.digest
    assert await puller(url) == aged
    server.add("/m.gguf", make_gguf(1000))
    changed = await puller(url)
    assert changed.files[0].digest == digest(make_gguf(1000))
    assert changed.created != aged.created


async def test_a_second_pull_of_a_known_digest_fetches_nothing(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL) + "#" + digest(MODEL).replace(":", "=")
    await puller(url)
    sent = server.sent["/m.gguf"]
    await puller(url)
    assert server.sent["/m.gguf"] <= sent + 10
    assert puller.of(events.PullDone)[-1].cached


async def test_a_cut_connection_is_taken_up_where_it_stopped(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL, drops=[120_000, 90_000])
    assert puller.content(await puller(url)) == MODEL
    tails = [r for r in server.asked("/m.gguf") if r.startswith("bytes=") and not r.startswith("bytes=0-")]
    assert len(tails) == 2
    assert all(r.headers.get("If-Range") == '"v1"' for r in server.requests if r.headers.get("Range") in tails)


async def test_a_server_without_ranges_is_read_again_up_to_where_it_stopped(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL, drops=[150_000], ranges=False)
    assert puller.content(await puller(url)) == MODEL


async def test_a_file_that_changes_in_the_middle_is_never_mixed(server: Server, puller: Puller) -> None:
    other = make_gguf(seed=2)
    url = server.add("/m.gguf", MODEL, drops=[150_000])
    file = server.files["/m.gguf"]

    def change(request: web.Request) -> None:
        if len(server.asked("/m.gguf")) == 4:  # after the probe, the look and the cut transfer
            file.data, file.etag = other, '"v2"'

    file.gate = change
    assert puller.content(await puller(url)) == other


async def test_a_file_without_validator_or_digest_starts_again_in_a_new_pull(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL, etag=None, drops=[150_000, 0, 0, 0, 0])
    with pytest.raises(SourceUnavailable):
        await puller(url)
    server.files["/m.gguf"].drops.clear()
    assert puller.content(await puller(url)) == MODEL
    assert server.asked("/m.gguf")[-1] == ""


@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_a_busy_server_is_asked_again(server: Server, puller: Puller, status: int) -> None:
    url = server.add("/m.gguf", MODEL, statuses=[status, status], headers={"Retry-After": "0"})
    assert puller.content(await puller(url)) == MODEL


async def test_a_server_that_stays_broken_is_given_up(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL, statuses=[503] * 50)
    with pytest.raises(SourceUnavailable, match="503"):
        await puller(url)
    assert len(server.asked("/m.gguf")) == 4


@pytest.mark.parametrize(
    ("status", "error"), [(401, AccessDenied), (403, AccessDenied), (404, NotFound), (400, SourceUnavailable)]
)
async def test_a_refusal_is_final(server: Server, puller: Puller, status: int, error: type[PierError]) -> None:
    url = server.add("/m.gguf", MODEL, statuses=[status] * 9)
    with pytest.raises(error, match=str(status)):
        await puller(url)
    assert len(server.asked("/m.gguf")) == 1


async def test_what_is_not_a_model_is_refused_before_it_is_fetched(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", b"<!DOCTYPE html><html>login" + b"x" * 5_000_000)
    with pytest.raises(CorruptData, match="web page"):
        await puller(url)
    assert server.sent["/m.gguf"] < 200_000
    assert puller.store.models() == []


async def test_a_model_shorter_than_its_tensors_is_refused_early(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL[:-5000])
    with pytest.raises(CorruptData, match=r"m\.gguf"):
        await puller(url)
    assert puller.leftovers() == []


async def test_an_unknown_length_is_fetched_to_its_end(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL, chunked=True, ranges=False)
    assert puller.content(await puller(url)) == MODEL
    assert puller.of(events.PullPlanned)[0].total == 0


async def test_a_cut_transfer_of_unknown_length_is_not_taken_for_complete(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL, chunked=True, ranges=False, drops=[150_000])
    assert puller.content(await puller(url)) == MODEL


async def test_redirects_are_followed_and_the_last_part_of_the_first_address_names_the_file(
    server: Server, cdn: Server, puller: Puller
) -> None:
    place = cdn.add("/blob/77", MODEL)
    record = await puller(server.add("/Some.gguf", redirect=place))
    assert puller.content(record) == MODEL
    assert record.files[0].name == "Some.gguf"


async def test_endless_redirects_end(server: Server, puller: Puller) -> None:
    url = server.add("/a.gguf")
    server.files["/a.gguf"].redirect = url
    with pytest.raises(SourceUnavailable, match="redirects"):
        await puller(url)


async def test_a_redirect_to_another_scheme_is_refused(server: Server, puller: Puller) -> None:
    url = server.add("/a.gguf", redirect="file:///etc/passwd")
    with pytest.raises(SourceUnavailable, match="another kind"):
        await puller(url)


async def test_plain_http_beyond_this_machine_is_refused_unless_allowed(puller: Puller) -> None:
    with pytest.raises(UsageError, match="plain http") as caught:
        await puller("http://192.0.2.1/m.gguf")
    assert "allow_http" in str(caught.value.hint)


async def test_a_login_in_the_address_is_sent_and_never_shown(server: Server, puller: Puller) -> None:
    url = server.add("/m.gguf", MODEL).replace("http://", "http://user:hunter2@")
    record = await puller(f"{url}?token=hunter3")
    assert server.requests[-1].headers["Authorization"].startswith("Basic ")
    shown = repr(record) + repr(puller.events)
    shown += "".join(p.read_text(errors="replace") for p in puller.store.root.rglob("*") if p.is_file())
    assert "hunter" not in shown
    server.files["/m.gguf"].statuses = [403]
    with pytest.raises(AccessDenied) as caught:
        await puller(f"{url}?token=hunter3", name="again")
    assert "hunter" not in repr(caught.value.to_dict())


def test_addresses_are_shown_without_secrets() -> None:
    assert redact("https://u:p@host:8/a?sig=1#x") == "https://host:8/a"


async def test_nobody_there_is_said_soon(puller: Puller, unused: int) -> None:
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1"):
        await puller(f"http://127.0.0.1:{unused}/m.gguf")


async def test_a_stalled_transfer_is_taken_up_again(server: Server, puller: Puller) -> None:
    stalled = asyncio.Event()
    url = server.add("/m.gguf", MODEL, hold=(150_000, stalled))
    settings = SourceSettings(connect_timeout=5, read_timeout=0.5)

    def release(request: web.Request) -> None:
        if not request.headers.get("Range", "bytes=0-").startswith("bytes=0-"):  # it goes on, on another connection
            stalled.set()

    server.files["/m.gguf"].gate = release
    assert puller.content(await puller(url, settings=settings)) == MODEL
    assert server.reached.is_set()


# --- servers that break the rules -----------------------------------------------------------------------------------


@asynccontextmanager
async def raw(answer: Callable[[bytes], bytes]) -> AsyncGenerator[str]:
    """A server that answers each request with exactly these bytes and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(answer(head))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/m.gguf"
    finally:
        server.close()


async def test_a_body_shorter_than_its_length_never_becomes_a_model(puller: Puller) -> None:
    def answer(head: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(MODEL) + MODEL[:200_000]

    async with raw(answer) as url:
        with pytest.raises(PierError):
            await puller(url)
    assert puller.store.models() == []


async def test_a_range_that_is_another_one_is_refused(puller: Puller) -> None:
    def answer(head: bytes) -> bytes:
        return b"HTTP/1.1 206 P\r\nContent-Range: bytes 7-7/%d\r\nContent-Length: 1\r\n\r\nx" % len(MODEL)

    async with raw(answer) as url:
        with pytest.raises(CorruptData, match="another part"):
            await puller(url)


async def test_a_size_that_differs_from_the_announced_is_refused(puller: Puller) -> None:
    def answer(head: bytes) -> bytes:
        if b"bytes=0-0" in head:
            return b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/%d\r\nContent-Length: 1\r\n\r\nG" % (len(MODEL) * 2)
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(MODEL) + MODEL

    async with raw(answer) as url:
        with pytest.raises(CorruptData, match="announced"):
            await puller(url)
    assert puller.store.models() == []


async def test_a_compressed_body_that_nobody_asked_for_is_refused(puller: Puller) -> None:
    packed = gzip.compress(MODEL)

    def answer(head: bytes) -> bytes:
        if b"Range: " in head:
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(MODEL) + MODEL
        return b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed

    async with raw(answer) as url:
        with pytest.raises(SourceUnavailable, match="compressed"):
            await puller(url)


async def test_nonsense_instead_of_http_is_an_unreachable_source(puller: Puller) -> None:
    async with raw(lambda _: b"SSH-2.0-OpenSSH\r\n\r\n") as url:
        with pytest.raises(SourceUnavailable):
            await puller(url)
