"""Registries that throttle, break off, lie or set traps: a pull ends right, or says what is wrong and keeps nothing.

``TABLE`` lists every behaviour with what has to come of it.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import email.utils
import gzip
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.registry import transfer
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login, find_login
from pierhead.registry.name import image_name
from pierhead.registry.transfer import pull_blob
from pierhead.registry.wire import Retry, is_private
from pierhead.sources.pull import pull
from pierhead.store.layout import Store

from ..sources.servers import make_gguf  # noqa: TID252
from .doubles import DATA, DIGEST, Answer, Double, Handler, break_off, guarded, manifest_of

pytestmark = pytest.mark.timeout(60)
FAST = Retry(attempts=6, first=0.001, most=0.002)
PART = 20_000
SETTINGS = SourceSettings(read_timeout=0.3, connect_timeout=5)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SEGMENT", PART)
    monkeypatch.setattr(transfer, "LEAST", 1000)


async def fetch(double: Double, *, login: Login | None = None, offset: int = 0, size: int = len(DATA)) -> bytes:
    got = bytearray()

    async def write(chunks: list[bytes]) -> None:
        for chunk in chunks:
            got.extend(chunk)

    name = image_name(parse(f"oci://{double.host}/a/b:v1"))
    async with Registry(name, SETTINGS, login or Login(), retry=FAST) as registry:
        await pull_blob(registry, DIGEST, size, offset, write, 4)
    return bytes(got)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """``make`` a behaviour; a pull then brings every byte, or ends in ``error`` with ``words``.

    ``most`` requests may be needed; ``ranges`` is False for one that ignores them; ``login`` is what the user has.
    """

    make: Callable[[], Handler]
    error: type[PierError] | None = None
    words: str = ""
    most: int = 60
    ranges: bool = True
    login: Login = dataclasses.field(default_factory=Login)


def always(answer: Callable[[Double, web.Request], Any]) -> Callable[[], Handler]:
    return lambda: answer


def at_first(times: int, answer: Callable[[Double, web.Request], Any]) -> Callable[[], Handler]:
    """Misbehave so many times, then no more."""

    def make() -> Handler:
        left = [times]

        def behave(double: Double, request: web.Request) -> Any:
            left[0] -= 1
            return answer(double, request) if left[0] >= 0 else None

        return behave

    return make


def status(code: int, body: str = "", **headers: str) -> Callable[[Double, web.Request], Answer]:
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda double, request: web.Response(status=code, text=body, headers=found)


def soon(double: Double, request: web.Request) -> Answer:
    """Come back at a moment, named as a date."""
    when = email.utils.formatdate(time.time() + 1, usegmt=True)
    return web.Response(status=429, headers={"Retry-After": when})


async def cut(double: Double, request: web.Request) -> Answer:
    return await double.body(request, cut=7_000)


def hang_up(double: Double, request: web.Request) -> Answer:
    break_off(request)
    return web.Response()


async def stall(double: Double, request: web.Request) -> Answer:
    """Send a little and then nothing, with the connection open."""
    response = web.StreamResponse(status=206, headers={"Content-Range": _range(double, request)})
    response.content_length = PART
    await response.prepare(request)
    await response.write(double.data[double.wanted(request)[0] :][:500])
    await asyncio.Event().wait()
    return response


async def trickle(double: Double, request: web.Request) -> Answer:
    """Send a byte now and then: often enough that no single wait is too long."""
    start, end = double.wanted(request)
    response = web.StreamResponse(status=206, headers={"Content-Range": _range(double, request)})
    response.content_length = end - start
    await response.prepare(request)
    for at in range(start, end):
        await response.write(double.data[at : at + 1])
        await asyncio.sleep(0.05)
    return response


def _range(double: Double, request: web.Request) -> str:
    start, end = double.wanted(request)
    return f"bytes {start}-{end - 1}/{len(double.data)}"


async def less(double: Double, request: web.Request) -> Answer:
    """Honestly a smaller part than was asked for."""
    start, end = double.wanted(request)
    part = double.data[start : min(end, start + 6_000)]
    about = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(double.data)}"}
    return web.Response(status=206, body=part, headers=about)


async def short(double: Double, request: web.Request) -> Answer:
    """A whole part by its header, half of it by its length."""
    start, end = double.wanted(request)
    return await double.body(request, data=double.data[start : start + max(1, (end - start) // 2)])


async def promise(double: Double, request: web.Request) -> Answer:
    """More by its length than it ever sends."""
    return await double.body(request, headers={"Content-Length": str(PART * 3)}, cut=PART)


async def too_much(double: Double, request: web.Request) -> Answer:
    return await double.body(request, data=b"x" * 50_000)


def part_of(text: str) -> Callable[[Double, web.Request], Any]:
    async def answer(double: Double, request: web.Request) -> Answer:
        return web.Response(status=206, body=b"x" * PART, headers={"Content-Range": text} if text else {})

    return answer


async def another_total(double: Double, request: web.Request) -> Answer:
    return await double.body(request, headers={"Content-Range": _range(double, request).replace("/300000", "/9999999")})


async def unknown_total(double: Double, request: web.Request) -> Answer:
    return await double.body(request, headers={"Content-Range": _range(double, request).replace("/300000", "/*")})


def compressed(double: Double, request: web.Request) -> Answer:
    about = {"Content-Range": _range(double, request), "Content-Encoding": "gzip"}
    return web.Response(status=206, body=gzip.compress(DATA[:PART]), headers=about)


def circle(double: Double, request: web.Request) -> Answer:
    return web.Response(status=307, headers={"Location": str(request.url)})


def leads_to(address: str) -> Callable[[Double, web.Request], Answer]:
    return lambda double, request: web.Response(status=307, headers={"Location": address})


def storage(lives: int) -> Callable[[], Handler]:
    """Blobs are on another host, whose signed addresses hold for so many requests; logins must not get there."""

    def make() -> Handler:
        signed = [0]
        used: dict[str, int] = {}

        def behave(double: Double, request: web.Request) -> Answer:
            if not request.host.startswith("localhost"):
                if (said := guarded("http://{base}/token")(double, request)) is not None:
                    return said
                if used.get(str(signed[0]), 0) >= lives:
                    signed[0] += 1
                port = double.host.rpartition(":")[2]
                return web.Response(status=307, headers={"Location": f"http://localhost:{port}/s?sig={signed[0]}%2Fx"})
            assert "Authorization" not in request.headers
            number = request.query["sig"].partition("/")[0]
            used[number] = used.get(number, 0) + 1
            return None if used[number] <= lives else web.Response(status=403, text="Request has expired")

        return behave

    return make


def no_http(double: Double, request: web.Request) -> Answer:
    assert request.transport is not None
    request.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    request.transport.close()
    return web.Response()


KNOWN = Login("me", "pass:word")
TABLE: dict[str, Row] = {
    "behaves": Row(always(lambda d, r: None), most=15),
    "ignores ranges": Row(always(lambda d, r: None), ranges=False, most=6),
    "ignores ranges and breaks off": Row(at_first(6, cut), ranges=False),
    "breaks off in the middle": Row(at_first(9, cut)),
    "breaks off before it answers": Row(at_first(5, hang_up)),
    "stalls": Row(at_first(3, stall)),
    "trickles on some connections": Row(at_first(2, trickle)),
    "trickles for ever": Row(always(trickle), SourceUnavailable, "too slowly|no answer in time"),
    "sends less than it was asked for": Row(always(less), most=65),
    "sends half of what it announces": Row(always(short), most=400),
    "announces more than it sends": Row(at_first(4, promise)),
    "sends more than it was asked for": Row(always(too_much), CorruptData, "more than it was asked for", most=8),
    "sends another part": Row(always(part_of("bytes 5-20004/300000")), CorruptData, "another part", most=8),
    "names no part": Row(always(part_of("")), CorruptData, "another part", most=8),
    "names a part backwards": Row(always(part_of("bytes 9-3/300000")), CorruptData, "another part", most=8),
    "lies about the whole size": Row(always(another_total), CorruptData, "another part", most=8),
    "does not say the whole size": Row(always(unknown_total)),
    "is shorter than the manifest says": Row(always(status(416)), CorruptData, "shorter than its manifest", most=8),
    "has a whole of another size": Row(
        always(lambda d, r: web.Response(body=b"x" * 1000)), CorruptData, "its manifest says", ranges=False, most=9
    ),
    "compresses": Row(always(compressed), SourceUnavailable, "compressed", most=8),
    "throttles, in seconds": Row(at_first(2, status(429, Retry_After="1"))),
    "throttles, until a date": Row(at_first(2, soon)),
    "throttles, oddly": Row(at_first(2, status(429, Retry_After="soon"))),
    "is broken for a while": Row(at_first(5, status(503))),
    "is broken": Row(
        always(status(500, '{"errors":[{"code":"UNKNOWN","message":"disk"}]}')), SourceUnavailable, "disk"
    ),
    "has nothing": Row(always(status(404)), NotFound, "404", most=8),
    "forbids": Row(always(status(403)), AccessDenied, "403", most=8),
    "speaks another language": Row(always(no_http), SourceUnavailable, "cannot talk"),
    "redirects in a circle": Row(always(circle), SourceUnavailable, "redirects", most=90),
    "redirects to a file": Row(always(leads_to("file:///etc/passwd")), SourceUnavailable, "another kind", most=8),
    "redirects nowhere": Row(always(leads_to("https://:80/x")), SourceUnavailable, "another kind", most=8),
    "keeps blobs elsewhere": Row(storage(1000), login=KNOWN),
    "keeps blobs elsewhere, for a short while": Row(storage(3), login=KNOWN, most=90),
    "keeps blobs elsewhere, never to be had": Row(
        storage(0), SourceUnavailable, "the storage of", login=KNOWN, most=90
    ),
    "wants a token": Row(lambda: guarded("http://{base}/token"), login=KNOWN, most=26),
    "wants a new token every fifth request": Row(lambda: guarded("http://{base}/token", lives=5), login=KNOWN, most=90),
    "wants a login that there is not": Row(
        always(status(401, WWW_Authenticate="Basic")), AccessDenied, "login", most=8
    ),
    "takes no login": Row(
        always(status(401, WWW_Authenticate='Basic realm="x"')), AccessDenied, "does not accept", login=KNOWN, most=20
    ),
}


@pytest.mark.parametrize("name", TABLE)
async def test_a_registry_that(double: Double, name: str) -> None:
    row = TABLE[name]
    double.behave, double.ranges = row.make(), row.ranges
    if row.error is None:
        assert await fetch(double, login=row.login) == DATA
    else:
        with pytest.raises(row.error, match=row.words) as caught:
            await fetch(double, login=row.login)
        assert "pass:word" not in str(caught.value.to_dict())
        assert "sig=" not in str(caught.value.to_dict())
    assert len(double.requests) <= row.most


@pytest.mark.parametrize("offset", [0, 1, 19_999, 20_000, 299_999, 300_000])
@pytest.mark.parametrize("ranges", [True, False])
async def test_every_byte_arrives_in_order_from_where_it_stopped(double: Double, offset: int, ranges: bool) -> None:
    double.ranges = ranges
    assert await fetch(double, offset=offset) == DATA[offset:]


async def test_a_throttling_registry_is_given_the_time_it_asks_for_by_all_connections(double: Double) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []

    def behave(double: Double, request: web.Request) -> Answer:
        times.append(loop.time())
        return web.Response(status=429, headers={"Retry-After": "1"}) if len(times) == 1 else None

    double.behave = behave
    assert await fetch(double) == DATA
    later = [moment for moment in times[1:] if moment - times[0] >= 1]
    assert len(times) - 1 - len(later) <= 3 + 3, "the other connections, at most one part further"


async def test_memory_stays_within_the_window_when_writing_is_slow(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "WINDOW", 80_000)
    gate = asyncio.Event()

    async def write(chunks: list[bytes]) -> None:
        await gate.wait()

    name = image_name(parse(f"oci://{double.host}/a/b:v1"))
    async with Registry(name, SourceSettings(), Login(), retry=FAST) as registry:
        running = asyncio.create_task(pull_blob(registry, DIGEST, len(DATA), 0, write, 8))
        await asyncio.wait([running], timeout=0.3)
        assert len(double.requests) * PART <= 80_000 + PART
        gate.set()
        await running


# --- a fifth of all requests fails ------------------------------------------------------------------------------------

MODEL = make_gguf(400_000)


def failing(dice: random.Random) -> Handler:
    """Every fifth request fails, in one of the ways that networks have."""

    def behave(double: Double, request: web.Request) -> Any:
        if dice.random() >= 0.2:
            return None
        ways = [hang_up, *map(status, (500, 502, 503, 429)), *([cut, short] if "/blobs/" in request.path else [])]
        return dice.choice(ways)(double, request)

    return behave


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ranges", [True, False])
async def test_with_a_fifth_of_all_requests_failing_a_pull_ends_with_every_byte_right(
    double: Double, home: Paths, seed: int, ranges: bool
) -> None:
    digest = double.add("v1", manifest_of(MODEL), MODEL)
    double.ranges, double.data = ranges, MODEL
    double.behave = failing(random.Random(seed))
    store = Store.open(home.store)
    where = f"{double.host}/a/b:v1"
    record = await pull(where, store=store, settings=SETTINGS, paths=home, env={}, retry=Retry(8, 0.001, 0.002))
    assert record.digest == digest
    assert store.blob_path(record.files[0].digest).read_bytes() == MODEL


# --- tokens -----------------------------------------------------------------------------------------------------------


async def test_a_token_is_fetched_with_the_login_and_then_kept(double: Double) -> None:
    double.behave = guarded("http://{base}/token")
    assert await fetch(double, login=KNOWN) == DATA
    asked = [r for r in double.requests if r.path == "/token"]
    assert len(asked) == 1, "one for all who wait"
    assert base64.b64decode(asked[0].headers["Authorization"].removeprefix("Basic ")) == b"me:pass:word"
    assert asked[0].query["scope"] == "repository:a/b:pull"
    assert asked[0].query["service"] == "s"
    assert "offline_token" not in asked[0].query


async def test_an_identity_token_is_exchanged(double: Double) -> None:
    double.behave = guarded("http://{base}/token")
    assert await fetch(double, login=Login(identity_token="refresh")) == DATA
    assert next(r for r in double.requests if r.path == "/token").method == "POST"


@pytest.mark.parametrize(
    "realm",
    [
        "http://10.0.0.1/token",
        "http://169.254.169.254/latest",
        "https://192.168.1.1/token",
        "http://[::1]:1/token",
        "http://localhost:1/token",
        "http://user:pass@{base}/token",
        "file:///etc/passwd",
        "",
    ],
)
async def test_a_login_is_not_carried_into_the_own_network(double: Double, realm: str) -> None:
    double.behave = guarded(realm)
    with pytest.raises(SourceUnavailable) as caught:
        await fetch(double, login=Login("me", "secret-word"))
    assert "secret-word" not in str(caught.value.to_dict())
    assert len(double.requests) <= 8, "none of the parts tries again"


async def test_a_token_that_does_not_help_ends_in_one_error(double: Double) -> None:
    double.behave = guarded("http://{base}/token", token="other")
    with pytest.raises(AccessDenied, match="wants a login") as caught:
        await fetch(double)
    assert "pier login" in (caught.value.hint or "")


# --- whole pulls ------------------------------------------------------------------------------------------------------


def two_files(*paths: str) -> dict[str, object]:
    """A manifest whose folder could not be filled, as anyone can tell beforehand."""
    made = manifest_of(DATA, DATA)
    for layer, path in zip(made["layers"], paths, strict=True):
        layer["annotations"] = {"org.cncf.model.filepath": path}
    return made


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (manifest_of(DATA, annotations={"org.cncf.model.filepath": "../../etc/cron.d/x"}), "leaves its folder"),
        (manifest_of(DATA, annotations={"org.cncf.model.filepath": "/etc/passwd"}), "leaves its folder"),
        (manifest_of(DATA, kind="application/vnd.example.odd"), "vnd.example.odd"),
        (manifest_of(DATA, digest="sha256:../../../x"), "not named by a sha256"),
        (manifest_of(DATA, digest="md5:abc"), "not named by a sha256"),
        (manifest_of(DATA, size=-5), "a size"),
        (two_files("a/m.gguf", "a/./m.gguf"), "two files of one name"),
        (two_files("m.gguf", "M.GGUF"), "two files of one name"),
        ([], "no manifest that can be read"),
        ({"layers": 3}, "no manifest that can be read"),
    ],
)
async def test_a_hostile_manifest_is_refused(double: Double, home: Paths, manifest: object, words: str) -> None:
    double.add("v1", manifest)
    store = Store.open(home.store)
    with pytest.raises(PierError, match=words):
        await pull(f"{double.host}/a/b:v1", store=store, settings=SETTINGS, paths=home, env={}, retry=FAST)
    assert store.models() == []
    assert not list(store.blobs.folder.iterdir())


@pytest.mark.parametrize("name", ["a b", "../m", "m@sha256:" + "5" * 64])
async def test_a_name_that_cannot_be_given_is_said_before_anything_is_asked_for(
    double: Double, home: Paths, name: str
) -> None:
    store = Store.open(home.store)
    with pytest.raises(UsageError, match="cannot name a model"):
        await pull(f"{double.host}/a/b:v1", store=store, settings=SETTINGS, paths=home, env={}, retry=FAST, name=name)
    assert double.requests == []


async def test_wrong_bytes_leave_nothing_behind(double: Double, home: Paths) -> None:
    double.add("v1", manifest_of(MODEL), MODEL)
    wrong = MODEL[:-5] + b"wrong"
    double.blobs = {digest: wrong if blob == MODEL else blob for digest, blob in double.blobs.items()}
    store = Store.open(home.store)
    with pytest.raises(CorruptData, match="expected"):
        await pull(f"{double.host}/a/b:v1", store=store, settings=SETTINGS, paths=home, env={}, retry=FAST)
    assert store.models() == []
    assert not list(store.blobs.folder.iterdir())
    assert not list((store.root / "ingest").glob("*.part"))


async def test_what_had_landed_wrong_before_is_fetched_again(double: Double, home: Paths) -> None:
    """An earlier pull broke off with bytes of a lie; the registry is right now."""
    double.add("v1", manifest_of(MODEL), MODEL)
    store = Store.open(home.store)
    with store.ingest("x", size=len(MODEL), digest=double_digest(MODEL)) as ingest:
        ingest.write(b"GGUF" + b"\xff" * 100_000)
    record = await pull(f"{double.host}/a/b:v1", store=store, settings=SETTINGS, paths=home, env={}, retry=FAST)
    assert store.blob_path(record.files[0].digest).read_bytes() == MODEL


def double_digest(data: bytes) -> str:
    return str(manifest_of(data)["layers"][0]["digest"])


# --- logins -----------------------------------------------------------------------------------------------------------


def test_logins_come_from_dockers_file_and_its_helpers(tmp_path: Path) -> None:
    helper = tmp_path / "docker-credential-vault"
    helper.write_text('#!/bin/sh\nread host\n[ "$host" = helped.example ] || exit 1\n'
                      'echo \'{"ServerURL":"x","Username":"<token>","Secret":"s3cret"}\'\n')  # fmt: skip
    helper.chmod(0o755)
    plain = base64.b64encode(b"me:pa:ss").decode()
    (tmp_path / "config.json").write_text(
        json.dumps({
            "auths": {"own.example:5000": {"auth": plain}, "https://index.docker.io/v1/": {"auth": plain}},
            "credHelpers": {"helped.example": "vault", "gone.example": "not-installed"},
        })
    )  # fmt: skip
    env = {"DOCKER_CONFIG": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert find_login("own.example:5000", env) == Login("me", "pa:ss")
    assert find_login("docker.io", env) == Login("me", "pa:ss")
    assert find_login("helped.example", env).identity_token == "s3cret"
    assert not find_login("gone.example", env)
    assert not find_login("own.example", env)
    assert "pa:ss" not in repr(find_login("docker.io", env))


NEARBY = ("10.1.2.3", "127.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:10.0.0.1")


@pytest.mark.parametrize("address", NEARBY)
def test_addresses_nearby_are_known(address: str) -> None:
    assert is_private(address)
    assert not is_private("8.8.8.8")
