"""The policy is asked before a pull names a model and before every start, by what is kept in the store."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from pierhead.config import SourceSettings
from pierhead.errors import ConfigError, NotFound, UnsafeContent, Untrusted
from pierhead.events import AnyEvent, Note, ignore
from pierhead.package.build import package
from pierhead.package.python_model import find, prepare
from pierhead.package.recipe import Recipe
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.registry.wire import Retry
from pierhead.sources.pull import pull
from pierhead.store.layout import Store
from pierhead.store.media import SOURCE
from pierhead.store.model import Layer, ModelRecord
from pierhead.trust.dsse import SIGNED
from pierhead.trust.gate import Gate
from pierhead.trust.keys import PrivateKey
from pierhead.trust.signing import place_of, signed, with_key

from ..registry.referrers_double import Double, serving  # noqa: TID252
from ..sources.servers import make_gguf  # noqa: TID252

pytestmark = pytest.mark.timeout(60)
SETTINGS = SourceSettings()
FAST = Retry(attempts=2, first=0.001, most=0.002)


@pytest.fixture(params=[True, False], ids=["api", "fallback"])
async def registry(request: pytest.FixtureRequest) -> AsyncGenerator[Double]:
    async with serving(Double(api=request.param)) as found:
        yield found


def write(home: Paths, key: PrivateKey, match: str = "oci://**", head: str = 'default = "allow"') -> None:
    home.config.mkdir(parents=True, exist_ok=True)
    (home.config / "team.pub").write_text(key.public.pem)
    text = f'{head}\n[[rules]]\nmatch = ["{match}"]\n[[rules.identities]]\nkey = "team.pub"\n'
    (home.config / "policy.toml").write_text(text)


async def sign(store: Store, model: str, key: PrivateKey, name: str = "") -> None:
    async with place_of(model, store, SETTINGS, {}, FAST) as place:
        await place.attach(signed(place.subject, SIGNED, {}, with_key(key), name or place.name))


async def publish(tmp_path: Path, home: Paths, registry: Double, key: PrivateKey | None, name: str = "") -> str:
    """A model made elsewhere, signed or not, now in the registry."""
    store = Store.open(tmp_path / "maker")
    path = tmp_path / "made.gguf"
    path.write_bytes(make_gguf(5000))
    bare = Paths(tmp_path / "none", home.state, home.cache, home.runtime)
    await pull(str(path), store=store, settings=SETTINGS, paths=bare, name="made")
    if key is not None:
        await sign(store, "made", key, name)
    where = f"oci://{registry.base}/a/b:v1"
    await push_model(store, "made", image_name(parse(where)), settings=SETTINGS, env={}, listener=ignore, retry=FAST)
    return where


async def fetch(where: str, store: Store, home: Paths, events: list[AnyEvent] | None = None) -> ModelRecord:
    listener = events.append if events is not None else ignore
    return await pull(where, store=store, settings=SETTINGS, paths=home, env={}, retry=FAST, listener=listener)


async def test_a_signed_model_is_pulled_and_starts(
    tmp_path: Path, home: Paths, registry: Double, key: PrivateKey
) -> None:
    where = await publish(tmp_path, home, registry, key)
    write(home, key)
    store = Store.open(home.store)
    record = await fetch(where, store, home)
    assert len(store.referrers(record.digest)) == 1
    assert Gate(home.config).check_start(store, record) == []


async def test_what_is_not_signed_for_here_gets_no_name_and_nothing_is_fetched(
    tmp_path: Path, home: Paths, registry: Double, key: PrivateKey, other_key: PrivateKey
) -> None:
    write(home, key)
    store = Store.open(home.store)
    for signer, name, words in (
        (None, "", "not signed"),
        (other_key, "", "not this key's"),
        (key, "ghcr.io/else/model", "made for ghcr.io/else/model"),
    ):
        registry.blobs.clear()
        registry.manifests.clear()
        where = await publish(tmp_path, home, registry, signer, name)
        with pytest.raises(Untrusted, match=words):
            await fetch(where, store, home)
    assert store.models() == []
    assert sum(f.stat().st_size for f in store.blobs.folder.iterdir()) < 5000


async def test_a_registry_that_cannot_tell_stops_what_must_be_signed(
    tmp_path: Path, home: Paths, registry: Double, key: PrivateKey
) -> None:
    from aiohttp import web

    where = await publish(tmp_path, home, registry, key)
    store = Store.open(home.store)

    def behave(request: web.Request) -> web.Response | None:
        return web.Response(status=503) if "referrers" in request.path or "/sha256-" in request.path else None

    registry.behave = behave
    events: list[AnyEvent] = []
    await fetch(where, store, home, events)
    assert any("could not be fetched" in e.message for e in events if isinstance(e, Note))
    store.remove(where.removeprefix("oci://"))
    write(home, key)
    with pytest.raises(Untrusted, match="could not be fetched"):
        await fetch(where, store, home)


async def test_warnings_are_told_and_the_pull_goes_on(
    tmp_path: Path, home: Paths, registry: Double, key: PrivateKey
) -> None:
    where = await publish(tmp_path, home, registry, None)
    write(home, key, head='default = "allow"\naction = "warn"')
    events: list[AnyEvent] = []
    await fetch(where, Store.open(home.store), home, events)
    assert any("not signed" in e.message for e in events if isinstance(e, Note))


async def test_a_damaged_policy_stops_pulls_and_starts(home: Paths, tmp_path: Path, key: PrivateKey) -> None:
    store = Store.open(home.store)
    path = tmp_path / "a.gguf"
    path.write_bytes(make_gguf(5000))
    record = await pull(str(path), store=store, settings=SETTINGS, paths=home, name="a")
    gate = Gate(home.config)
    assert gate.check_start(store, record) == []
    home.config.mkdir(parents=True)
    (home.config / "policy.toml").write_text("default = ")
    with pytest.raises(ConfigError):
        gate.check_start(store, record)
    with pytest.raises(ConfigError):
        await pull(str(path), store=store, settings=SETTINGS, paths=home, name="b")
    with pytest.raises(NotFound):
        store.get("b")
    write(home, key)
    assert gate.check_start(store, record) == []


async def test_a_start_follows_the_policy_as_it_is_now(
    home: Paths, tmp_path: Path, key: PrivateKey, other_key: PrivateKey
) -> None:
    store = Store.open(home.store)
    path = tmp_path / "a.gguf"
    path.write_bytes(make_gguf(5000))
    record = await pull(str(path), store=store, settings=SETTINGS, paths=home, name="a")
    gate = Gate(home.config)
    write(home, key, match="a")
    with pytest.raises(Untrusted, match="not signed"):
        gate.check_start(store, record)
    await sign(store, "a", key)
    assert gate.check_start(store, record) == []
    began = time.perf_counter()
    for _ in range(100):
        gate.check_start(store, record)
    assert (time.perf_counter() - began) / 100 < 0.001, "a remembered answer costs less than a millisecond"
    write(home, other_key, match="a")
    with pytest.raises(Untrusted, match="not this key's"):
        gate.check_start(store, record)


async def test_a_signature_of_another_model_does_not_help(home: Paths, tmp_path: Path, key: PrivateKey) -> None:
    """Its bundle is attached to this model, but it signs the digest of that one."""
    store = Store.open(home.store)
    for seed, name in ((1, "good"), (2, "bad")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(make_gguf(5000, seed))
        await pull(str(path), store=store, settings=SETTINGS, paths=home, name=name)
    write(home, key, match="bad")
    async with place_of("good", store, SETTINGS, {}) as good, place_of("bad", store, SETTINGS, {}) as bad:
        stolen = signed(good.subject, SIGNED, {}, with_key(key))
        await bad.attach(stolen)
    with pytest.raises(Untrusted, match="another model"):
        Gate(home.config).check_start(store, store.get("bad"))


async def test_a_source_that_a_model_only_claims_allows_nothing(home: Paths, tmp_path: Path, key: PrivateKey) -> None:
    """An archive may say that its model came from anywhere; this machine did not see it."""
    store = Store.open(home.store)
    path = tmp_path / "a.gguf"
    path.write_bytes(make_gguf(5000))
    honest = await pull(str(path), store=store, settings=SETTINGS, paths=home, name="a")
    layers = [Layer(f.digest, f.size, f.media_type, f.name, f.role) for f in honest.files]
    claimed = store.commit_model(
        "b", layers=layers, metadata=honest.metadata, annotations={SOURCE: "hf:good/model"}, by="import"
    )
    home.config.mkdir(parents=True)
    rules = '[[rules]]\nmatch = ["hf:good/*", "file:**", "/**"]\nrequire = "nothing"\n'
    (home.config / "policy.toml").write_text(f'default = "deny"\n{rules}')
    gate = Gate(home.config)
    assert gate.check_start(store, honest) == []
    with pytest.raises(Untrusted, match="default is deny"):
        gate.check_start(store, claimed)


async def test_an_earlier_version_is_asked_about_by_the_name_that_it_had(
    home: Paths, tmp_path: Path, key: PrivateKey
) -> None:
    store = Store.open(home.store)
    for seed in (1, 2):
        path = tmp_path / f"{seed}.gguf"
        path.write_bytes(make_gguf(5000, seed))
        await pull(str(path), store=store, settings=SETTINGS, paths=home, name="a")
    await sign(store, "a", key)
    (earlier,) = store.versions("a")
    write(home, key, match="a")
    gate = Gate(home.config)
    assert gate.check_start(store, store.get("a")) == []
    with pytest.raises(Untrusted, match="not signed"):
        gate.check_start(store, store.get(earlier.name))


async def test_a_chosen_name_does_not_let_in_what_comes_from_elsewhere(
    tmp_path: Path, home: Paths, registry: Double
) -> None:
    where = await publish(tmp_path, home, registry, None)
    home.config.mkdir(parents=True)
    (home.config / "policy.toml").write_text('default = "deny"\n[[rules]]\nmatch = ["good"]\nrequire = "nothing"\n')
    store = Store.open(home.store)
    with pytest.raises(Untrusted, match="default is deny"):
        await pull(where, store=store, settings=SETTINGS, paths=home, env={}, retry=FAST, name="good")
    assert store.models() == []


async def publish_python(tmp_path: Path, home: Paths, registry: Double, key: PrivateKey | None) -> str:
    """A Python model made elsewhere, signed or not, now in the registry."""
    source = tmp_path / "mine.py"
    source.write_text("class Mine:\n    def load(self): ...\n    def predict(self, x: int): return x\n")
    store = Store.open(tmp_path / "maker")
    package(store, Recipe("mine", prepare(find(source), {}, tmp_path, (), lock=False), "2026-01-01T00:00:00Z"))
    if key is not None:
        await sign(store, "mine", key, f"{registry.base}/a/b:v1")
    where = f"oci://{registry.base}/a/b:v1"
    await push_model(store, "mine", image_name(parse(where)), settings=SETTINGS, env={}, listener=ignore, retry=FAST)
    return where


async def test_a_python_model_is_pulled_when_a_rule_wants_a_signature_and_it_is_there(
    tmp_path: Path, home: Paths, registry: Double, key: PrivateKey
) -> None:
    where = await publish_python(tmp_path, home, registry, key)
    write(home, key)
    record = await fetch(where, Store.open(home.store), home)
    assert record.metadata["format"] == "python"


@pytest.mark.parametrize("policy", ["none", "another-rule", "nothing-required"])
async def test_a_python_model_that_nobody_vouches_for_is_refused_until_it_is_allowed(
    tmp_path: Path, home: Paths, registry: Double, key: PrivateKey, policy: str
) -> None:
    where = await publish_python(tmp_path, home, registry, key)
    if policy == "another-rule":
        write(home, key, "oci://elsewhere/**")
    elif policy == "nothing-required":
        home.config.mkdir(parents=True, exist_ok=True)
        (home.config / "policy.toml").write_text(
            'default = "allow"\n[[rules]]\nmatch = ["oci://**"]\nrequire = "nothing"\n'
        )
    store = Store.open(home.store)
    with pytest.raises(UnsafeContent, match="its author's code is run to serve it") as refused:
        await fetch(where, store, home)
    assert "--allow-unsafe" in (refused.value.hint or "")
    assert store.models() == []
    allowed = await pull(
        where, store=store, settings=SETTINGS, paths=home, env={}, retry=FAST, allow_unsafe=True, name="mine"
    )
    assert allowed.metadata["python"]["class"] == "Mine"
