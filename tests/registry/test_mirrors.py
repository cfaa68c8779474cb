"""Mirrors are asked first, with their own logins, and passed over when they fail; lists lead to a model."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pierhead import events
from pierhead.config import SourceSettings
from pierhead.errors import ConfigError, CorruptData, NotFound, PierError, UsageError
from pierhead.paths import Paths
from pierhead.registry import transfer
from pierhead.registry.places import mirror_places, own_place
from pierhead.registry.wire import Retry
from pierhead.sources.pull import inspect_remote, pull
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord

from ..sources.servers import make_gguf  # noqa: TID252
from .conftest import StartRegistry
from .doubles import INDEX, Double, break_off, digest_of, guarded, manifest_of, serving

pytestmark = pytest.mark.timeout(60)
FAST = Retry(attempts=4, first=0.001, most=0.002)
MODEL = make_gguf(400_000)
LIE = MODEL[:-4] + b"lies"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SEGMENT", 50_000)


@pytest.fixture
async def mirror() -> AsyncGenerator[Double]:
    async with serving(Double(), "localhost") as found:
        found.add("v1", manifest_of(MODEL), MODEL)
        yield found


class Puller:
    def __init__(self, home: Paths, origin: Double, mirror: Double) -> None:
        self.home = home
        self.where = f"{origin.host}/a/b:v1"
        self.settings = SourceSettings(mirrors={origin.host: (f"http://{mirror.host}",)}, read_timeout=5)
        self.store = Store.open(home.store)
        self.env: dict[str, str] = {"HOME": str(home.state)}
        self.notes: list[str] = []

    async def __call__(self) -> ModelRecord:
        def listen(event: events.AnyEvent) -> None:
            if isinstance(event, events.Note):
                self.notes.append(event.message)

        options: dict[str, Any] = {"settings": self.settings, "paths": self.home, "env": self.env, "retry": FAST}
        return await pull(self.where, store=self.store, listener=listen, **options)


@pytest.fixture
def puller(home: Paths, double: Double, mirror: Double) -> Puller:
    double.add("v1", manifest_of(MODEL), MODEL)
    return Puller(home, double, mirror)


def blobs(double: Double) -> list[web.Request]:
    return [r for r in double.requests if "/blobs/" in r.path]


async def test_a_mirror_serves_what_it_has(puller: Puller, double: Double, mirror: Double) -> None:
    record = await puller()
    assert puller.store.verify(record.name) == []
    assert record.source.startswith(f"oci://{double.host}/a/b:v1@sha256:"), "a mirror is no part of a model's name"
    assert blobs(mirror)
    assert not blobs(double)


@pytest.mark.parametrize("trouble", ["down", "broken", "empty", "no blob", "lies", "breaks off", "lies at first"])
async def test_a_mirror_that_fails_is_passed_over(
    puller: Puller, double: Double, mirror: Double, trouble: str, unused: int
) -> None:
    def behave(mirror: Double, request: web.Request) -> web.StreamResponse | None:
        if trouble == "broken":
            return web.Response(status=500)
        if trouble == "empty" or (trouble == "no blob" and request.path.endswith(digest_of(MODEL))):
            return web.Response(status=404)
        if trouble == "breaks off" and len(blobs(mirror)) > 5:
            break_off(request)
        return None

    mirror.behave = behave
    if trouble == "down":
        puller.settings = SourceSettings(mirrors={double.host: (f"http://localhost:{unused}",)})
    if trouble.startswith("lies"):
        mirror.blobs[digest_of(MODEL)] = LIE if trouble == "lies" else b"x" * len(MODEL)
    record = await puller()
    assert puller.store.blob_path(record.files[0].digest).read_bytes() == MODEL
    assert bool(puller.notes) == (trouble not in ("empty", "no blob"))
    assert blobs(double)


async def test_a_mirror_may_not_change_what_a_digest_names(puller: Puller, double: Double, mirror: Double) -> None:
    digest = digest_of(double.manifests["v1"])
    puller.where = f"{double.host}/a/b@{digest}"
    mirror.manifests[digest] = json.dumps(manifest_of(LIE)).encode()
    assert (await puller()).digest == digest
    assert "another manifest" in puller.notes[0]


async def test_the_registrys_own_error_is_told(puller: Puller, double: Double, mirror: Double) -> None:
    double.manifests.clear()
    mirror.behave = lambda mirror, request: web.Response(status=500)
    double.behave = lambda double, request: web.Response(status=404)
    with pytest.raises(NotFound, match=double.host):
        await puller()


async def test_each_host_gets_its_own_login_and_no_other(
    puller: Puller, double: Double, mirror: Double, tmp_path: Path
) -> None:
    def auth(user: str) -> dict[str, str]:
        return {"auth": base64.b64encode(f"{user}:{user}-word".encode()).decode()}

    docker = {"auths": {double.host: auth("own"), mirror.host: auth("mirrors")}}
    (tmp_path / "config.json").write_text(json.dumps(docker))
    puller.env["DOCKER_CONFIG"] = str(tmp_path)
    double.behave = guarded("http://{base}/token", password="own-word")
    mirror.behave = guarded("http://{base}/token", password="mirrors-word")
    mirror.blobs.pop(digest_of(MODEL))
    await puller()
    for server, user in ((double, "own"), (mirror, "mirrors")):
        seen = {r.headers["Authorization"] for r in server.requests if r.path == "/token"}
        assert seen == {"Basic " + base64.b64encode(f"{user}:{user}-word".encode()).decode()}


def test_mirrors_are_written_as_addresses() -> None:
    settings = SourceSettings(
        mirrors={"docker.io": ("https://m.example/", "m.lan:5000", "localhost:5000", "http://plain.lan")},
        insecure_registries=("m.lan:5000",),
    )
    found = [(p.host, p.base) for p in mirror_places("docker.io", settings)]
    assert found == [
        ("m.example", "https://m.example"),
        ("m.lan:5000", "http://m.lan:5000"),
        ("localhost:5000", "http://localhost:5000"),
        ("plain.lan", "http://plain.lan"),
    ]
    assert mirror_places("ghcr.io", settings) == ()
    assert own_place("docker.io", settings).base == "https://registry-1.docker.io"


@pytest.mark.parametrize("text", ["https://me:secret-word@m.example", "ftp://m.example", "", "https://m.example?x=1"])
def test_other_words_are_not_mirrors(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mirror_places("x", SourceSettings(mirrors={"x": (text,)}))
    assert "secret-word" not in str(caught.value.to_dict())


# --- lists ------------------------------------------------------------------------------------------------------------

IMAGE = {**manifest_of(b"layer", kind="application/vnd.oci.image.layer.v1.tar+gzip"), "artifactType": ""}


def listing(*digests: str, **entry: object) -> dict[str, object]:
    manifests = [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": d, "size": 1} for d in digests]
    return {"schemaVersion": 2, "mediaType": INDEX, "manifests": [{**m, **entry} for m in manifests]}


async def test_a_list_leads_to_its_model(puller: Puller, double: Double) -> None:
    puller.settings = SourceSettings()
    model = double.add("model", manifest_of(MODEL), MODEL)
    image = double.add("image", IMAGE)
    double.add("v1", listing(image, double.add("inner", listing(image, model))))
    record = await puller()
    assert record.digest == model
    found = await inspect_remote(puller.where, settings=puller.settings, paths=puller.home, env={}, retry=FAST)
    assert found["source"].endswith(model)


async def test_an_entry_that_calls_itself_a_model_is_looked_at_first(puller: Puller, double: Double) -> None:
    puller.settings = SourceSettings()
    first, second = double.add("1", manifest_of(MODEL), MODEL), double.add("2", manifest_of(LIE), LIE)
    body = listing(first, second)
    body["manifests"][1]["artifactType"] = "application/vnd.docker.ai.model.config.v0.1+json"  # type: ignore[index]
    double.add("v1", body)
    assert (await puller()).digest == second


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda d: listing(), UsageError, "without a model"),
        (lambda d: listing(d.add("i", IMAGE)), PierError, "kind that cannot be used"),
        (lambda d: listing("sha256:../../x"), CorruptData, "not named by a sha256"),
        (lambda d: listing(digest_of(b"nothing")), NotFound, "404"),
        (lambda d: listing(*[d.add("i", IMAGE)] * 40), CorruptData, "no model among its first"),
    ],
)
async def test_a_list_without_a_model_is_said(
    puller: Puller, double: Double, make: Any, error: type[PierError], words: str
) -> None:
    puller.settings = SourceSettings()
    double.add("v1", make(double))
    with pytest.raises(error, match=words):
        await puller()


async def test_lists_within_lists_come_to_an_end(puller: Puller, double: Double) -> None:
    puller.settings = SourceSettings()
    digest = double.add("m", manifest_of(MODEL), MODEL)
    for depth in range(5):
        digest = double.add("v1" if depth == 4 else str(depth), listing(digest))
    with pytest.raises(CorruptData, match="deep"):
        await puller()


# --- a look without a pull --------------------------------------------------------------------------------------------


async def test_a_look_reads_manifest_config_and_header_alone(double: Double, home: Paths, smollm2: Path) -> None:
    weights = smollm2.read_bytes()  # noqa: ASYNC240
    body = manifest_of(weights, annotations={"org.cncf.model.filepath": "smollm2.gguf"})
    digest = double.add("v1", {**body, "annotations": {"org.opencontainers.image.title": "Small"}}, weights)
    where = f"{double.host}/a/b:v1"
    found = await inspect_remote(where, settings=SourceSettings(), paths=home, env={}, retry=FAST)
    assert (found["digest"], found["size"]) == (digest, len(weights))
    assert found["annotations"] == {"org.opencontainers.image.title": "Small"}
    assert [x["media_type"] for x in found["layers"]] == ["application/vnd.docker.ai.gguf.v3"]
    assert found["metadata"]["architecture"] == "llama"
    assert double.sent < 4 << 20, f"of {len(weights)} bytes"


def test_the_command_shows_what_a_registry_has(start_registry: StartRegistry, tmp_path: Path) -> None:
    env = {**os.environ, "PIERHEAD_HOME": str(tmp_path / "home"), "DOCKER_CONFIG": str(tmp_path)}

    def pier(*words: str) -> str:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=True).stdout

    (tmp_path / "m.gguf").write_bytes(MODEL)
    pier("pull", str(tmp_path / "m.gguf"), "--name", "mine")
    where = f"{start_registry()}/team/model:1.0"
    digest = pier("push", "mine", where).strip()
    shown = pier("inspect", "-r", where)
    for part in (digest, "application/vnd.docker.ai.gguf.v3", "org.opencontainers.image.created"):
        assert part in shown
    assert json.loads(pier("inspect", "-r", where, "--json"))["digest"] == digest
