"""Registries that throttle, break off, lie or set traps: a pull ends right, or says what is wrong and keeps nothing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from aiohttp import web

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, CorruptData, PierError, SourceUnavailable
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

pytestmark = pytest.mark.timeout(60)
FAST = Retry(attempts=5, first=0.001, most=0.002)
DATA = random.Random(7).randbytes(300_000)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
Handler = Callable[["Odd", web.Request], "web.StreamResponse | None"]


class Odd:
    """A registry of one blob that ``behave`` may spoil; counts requests and remembers what was sent to it."""

    def __init__(self) -> None:
        self.behave: Handler | None = None
        self.requests: list[web.Request] = []
        self.cut = 0  # how many answers still break off in the middle
        self.ranges = True
        self.base = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if self.behave is not None and (said := self.behave(self, request)) is not None:
            return said
        start, end, status = 0, len(DATA) - 1, 200
        wanted = request.headers.get("Range")
        headers: dict[str, str] = {}
        if wanted and self.ranges:
            start, end = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            status, headers = 206, {"Content-Range": f"bytes {start}-{end}/{len(DATA)}"}
        body = DATA[start : end + 1]
        response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(body))})
        await response.prepare(request)
        if self.cut:
            self.cut -= 1
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(body)
        return response


@pytest.fixture
async def odd(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Odd]:
    monkeypatch.setattr(transfer, "SEGMENT", 20_000)
    found = Odd()
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", found.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.base = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield found
    finally:
        await runner.cleanup()


async def fetch(odd: Odd, *, login: Login | None = None, offset: int = 0, size: int = len(DATA)) -> bytes:
    got = bytearray()

    async def write(chunks: list[bytes]) -> None:
        for chunk in chunks:
            got.extend(chunk)

    name = image_name(parse(f"oci://{odd.base}/a/b:v1"))
    async with Registry(name, SourceSettings(), login or Login(), retry=FAST) as registry:
        await pull_blob(registry, DIGEST, size, offset, write, 4)
    return bytes(got)


@pytest.mark.parametrize("offset", [0, 1, 19_999, 20_000, 299_999, 300_000])
@pytest.mark.parametrize("ranges", [True, False])
async def test_every_byte_arrives_in_order_from_where_it_stopped(odd: Odd, offset: int, ranges: bool) -> None:
    odd.ranges = ranges
    assert await fetch(odd, offset=offset) == DATA[offset:]


@pytest.mark.parametrize("ranges", [True, False])
async def test_answers_that_break_off_are_asked_for_again(odd: Odd, ranges: bool) -> None:
    odd.cut, odd.ranges = 4, ranges
    assert await fetch(odd) == DATA


async def test_a_fifth_of_all_requests_may_fail(odd: Odd) -> None:
    dice = random.Random(3)

    def behave(odd: Odd, request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=dice.choice((500, 503, 429))) if dice.random() < 0.2 else None

    odd.behave = behave
    assert await fetch(odd) == DATA


async def test_a_throttling_registry_is_given_the_time_it_asks_for(odd: Odd) -> None:
    turned_away: list[float] = []

    def behave(odd: Odd, request: web.Request) -> web.StreamResponse | None:
        if turned_away:
            return None
        turned_away.append(asyncio.get_running_loop().time())
        return web.Response(status=429, headers={"Retry-After": "1"})

    odd.behave = behave
    assert await fetch(odd) == DATA
    assert asyncio.get_running_loop().time() - turned_away[0] >= 1


def _other_part(odd: Odd, request: web.Request) -> web.StreamResponse:
    return web.Response(status=206, body=b"x" * 20_000, headers={"Content-Range": f"bytes 5-20004/{len(DATA)}"})


def _other_total(odd: Odd, request: web.Request) -> web.StreamResponse:
    wanted = request.headers["Range"].removeprefix("bytes=")
    return web.Response(status=206, body=b"x" * 20_000, headers={"Content-Range": f"bytes {wanted}/999999999"})


def _too_much(odd: Odd, request: web.Request) -> web.StreamResponse:
    wanted = request.headers["Range"].removeprefix("bytes=")
    return web.Response(status=206, body=b"x" * 50_000, headers={"Content-Range": f"bytes {wanted}/{len(DATA)}"})


def _shorter(odd: Odd, request: web.Request) -> web.StreamResponse:
    return web.Response(status=416)


def _whole_of_another_size(odd: Odd, request: web.Request) -> web.StreamResponse:
    return web.Response(status=200, body=b"x" * 1000)


def _broken(odd: Odd, request: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text='{"errors":[{"code":"UNKNOWN","message":"disk"}]}')


def _circle(odd: Odd, request: web.Request) -> web.StreamResponse:
    return web.Response(status=307, headers={"Location": str(request.url)})


def _elsewhere(odd: Odd, request: web.Request) -> web.StreamResponse:
    return web.Response(status=307, headers={"Location": "file:///etc/passwd"})


@pytest.mark.parametrize(
    ("behave", "error", "words"),
    [
        (_other_part, CorruptData, "another part"),
        (_other_total, CorruptData, "another part"),
        (_too_much, CorruptData, "more than it was asked for"),
        (_shorter, CorruptData, "shorter than its manifest"),
        (_whole_of_another_size, CorruptData, "its manifest says"),
        (_broken, SourceUnavailable, "UNKNOWN disk"),
        (_circle, SourceUnavailable, "redirects"),
        (_elsewhere, SourceUnavailable, "another kind"),
    ],
)
async def test_a_lie_is_an_error_that_says_so(odd: Odd, behave: Handler, error: type[PierError], words: str) -> None:
    odd.behave = behave
    with pytest.raises(error, match=words):
        await fetch(odd)


async def test_memory_stays_within_the_window_when_writing_is_slow(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "WINDOW", 80_000)
    gate = asyncio.Event()

    async def write(chunks: list[bytes]) -> None:
        await gate.wait()

    name = image_name(parse(f"oci://{odd.base}/a/b:v1"))
    async with Registry(name, SourceSettings(), Login(), retry=FAST) as registry:
        running = asyncio.create_task(pull_blob(registry, DIGEST, len(DATA), 0, write, 8))
        await asyncio.wait([running], timeout=0.3)
        assert len(odd.requests) * 20_000 <= 80_000 + 20_000
        gate.set()
        await running


# --- tokens -----------------------------------------------------------------------------------------------------------


def guarded(realm: str, token: str = "t0ken") -> Handler:
    """A registry that wants a token from ``realm`` (``{base}`` is itself)."""

    def behave(odd: Odd, request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token":
            return web.json_response({"token": token})
        if request.headers.get("Authorization") == "Bearer t0ken":
            return None
        given = realm.format(base=odd.base)
        return web.Response(
            status=401, headers={"WWW-Authenticate": f'Bearer realm="{given}",service="s",scope="repository:a/b:pull"'}
        )

    return behave


async def test_a_token_is_fetched_with_the_login_and_then_kept(odd: Odd) -> None:
    odd.behave = guarded("http://{base}/token")
    assert await fetch(odd, login=Login("me", "pass:word")) == DATA
    asked = [r for r in odd.requests if r.path == "/token"]
    assert 1 <= len(asked) <= 4, "one for each request that found none, not one for each part"
    assert base64.b64decode(asked[0].headers["Authorization"].removeprefix("Basic ")) == b"me:pass:word"
    assert asked[0].query["scope"] == "repository:a/b:pull"
    assert asked[0].query["service"] == "s"


async def test_an_identity_token_is_exchanged(odd: Odd) -> None:
    odd.behave = guarded("http://{base}/token")
    assert await fetch(odd, login=Login(identity_token="refresh")) == DATA
    assert next(r for r in odd.requests if r.path == "/token").method == "POST"


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
async def test_a_login_is_not_carried_into_the_own_network(odd: Odd, realm: str) -> None:
    odd.behave = guarded(realm)
    with pytest.raises(SourceUnavailable) as caught:
        await fetch(odd, login=Login("me", "secret-word"))
    assert "secret-word" not in str(caught.value.to_dict())
    assert len(odd.requests) <= 8, "none of the parts tries again"


async def test_a_token_that_does_not_help_ends_in_one_error(odd: Odd) -> None:
    odd.behave = guarded("http://{base}/token", token="other")
    with pytest.raises(AccessDenied, match="wants a login") as caught:
        await fetch(odd)
    assert "pier login" in (caught.value.hint or "")


async def test_secrets_do_not_follow_a_redirect(odd: Odd) -> None:
    seen: list[str | None] = []

    def behave(odd: Odd, request: web.Request) -> web.StreamResponse | None:
        if request.host.startswith("localhost"):
            seen.append(request.headers.get("Authorization"))
            return None
        if said := guarded("http://{base}/token")(odd, request):
            return said
        port = odd.base.rpartition(":")[2]
        return web.Response(status=307, headers={"Location": f"http://localhost:{port}/storage?sig=a%2Fb"})

    odd.behave = behave
    assert await fetch(odd, login=Login("me", "word")) == DATA
    assert seen
    assert set(seen) == {None}


# --- whole pulls ------------------------------------------------------------------------------------------------------


def _serving(manifest: object, config: bytes = b"{}") -> Handler:
    def behave(odd: Odd, request: web.Request) -> web.StreamResponse | None:
        if "/manifests/" in request.path:
            kind = "application/vnd.oci.image.manifest.v1+json"
            return web.Response(body=json.dumps(manifest).encode(), content_type=kind)
        return web.Response(body=config) if "/blobs/" in request.path else None

    return behave


def _manifest(**layer: object) -> dict[str, object]:
    good = {"mediaType": "application/vnd.docker.ai.gguf.v3", "digest": DIGEST, "size": len(DATA)}
    config = {"mediaType": "application/vnd.docker.ai.model.config.v0.1+json", "size": 2}
    digest = "sha256:" + hashlib.sha256(b"{}").hexdigest()
    return {"schemaVersion": 2, "mediaType": "x", "config": {**config, "digest": digest}, "layers": [{**good, **layer}]}


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (_manifest(annotations={"org.cncf.model.filepath": "../../etc/cron.d/x"}), "leaves its folder"),
        (_manifest(annotations={"org.cncf.model.filepath": "/etc/passwd"}), "leaves its folder"),
        (_manifest(mediaType="application/vnd.example.odd"), "vnd.example.odd"),
        (_manifest(digest="sha256:../../../x"), "not named by a sha256"),
        (_manifest(digest="md5:abc"), "not named by a sha256"),
        (_manifest(size=-5), "a size"),
        ([], "no manifest that can be read"),
        ({"layers": 3}, "no manifest that can be read"),
    ],
)
async def test_a_hostile_manifest_is_refused(odd: Odd, home: Paths, manifest: object, words: str) -> None:
    odd.behave = _serving(manifest)
    store = Store.open(home.store)
    with pytest.raises(PierError, match=words):
        await pull(f"{odd.base}/a/b:v1", store=store, settings=SourceSettings(), paths=home, env={}, retry=FAST)
    assert store.models() == []
    assert not list(store.blobs.folder.iterdir())


async def test_a_corrupt_blob_leaves_nothing_behind(odd: Odd, home: Paths, smollm2: Path) -> None:
    with smollm2.open("rb") as file:
        beginning = file.read(20_000)

    def behave(odd: Odd, request: web.Request) -> web.StreamResponse | None:
        if "/manifests/" in request.path or not request.path.endswith(DIGEST):
            return _serving(_manifest(size=20_000))(odd, request)
        return web.Response(body=beginning)

    odd.behave = behave
    store = Store.open(home.store)
    with pytest.raises(CorruptData):
        await pull(f"{odd.base}/a/b:v1", store=store, settings=SourceSettings(), paths=home, env={}, retry=FAST)
    assert store.models() == []
    assert not list(store.blobs.folder.iterdir())


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
