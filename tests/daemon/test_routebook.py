"""The routes in force: made of the file, the store, the keys and the secrets; a broken file changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pierhead.daemon.routebook import RouteBook
from pierhead.daemon.routefile import Fallback, RouteTable, To
from pierhead.daemon.secrets import Secrets
from pierhead.errors import ConfigError, NotFound
from pierhead.gateway.link import Match, Route

MODELS = (Route(name="small", aliases=("small:latest",)), Route(name="big"))
KEYS = {"laptop": "key_1", "key_1": "key_1"}
FAST = '[routes.fast]\nto = [{ model = "small", weight = 3 }, { model = "big" }]\n'
PROVIDER = '[providers.p]\nbase_url = "https://p.example/v1"\nsecret = "p"\nmodels = ["m"]\n'


class Book:
    """A book with ``text`` in its file."""

    def __init__(self, folder: Path, text: str) -> None:
        self.secrets = Secrets(folder / "secrets", {})
        self.secrets.open_folder()
        self.file = folder / "routes.toml"
        self.file.write_text(text)
        self.book = RouteBook(self.file, self.secrets)
        self.book.refresh()

    @property
    def routes(self) -> dict[str, Route]:
        return {r.name: r for r in self.book.routes(MODELS, KEYS) if not r.hidden}

    @property
    def problems(self) -> str:
        return "\n".join(self.book.list(MODELS, KEYS).told())


def test_a_route_is_offered_beside_the_models(tmp_path: Path) -> None:
    book = Book(tmp_path, FAST)
    assert set(book.routes) == {"fast", "small", "big"}
    plan = book.routes["fast"].plan
    assert plan is not None
    assert [(to.model, to.weight) for to in plan.to] == [("small", 3), ("big", 1)]
    assert book.routes["fast"].card["id"] == "fast"


def test_destinations_may_be_spelt_as_clients_spell_models(tmp_path: Path) -> None:
    plan = Book(tmp_path, '[routes.r]\nto = [{ model = "small:latest" }]\n').routes["r"].plan
    assert plan is not None
    assert plan.to[0].model == "small"


def test_a_broken_file_keeps_the_last_good_routes_and_is_told(tmp_path: Path) -> None:
    book = Book(tmp_path, FAST)
    book.file.write_text("[routes.fast\n")
    book.book.refresh()
    assert "fast" in book.routes
    assert "no TOML" in book.problems
    book.file.write_text("")
    book.book.refresh()
    assert "fast" not in book.routes
    assert not book.problems


def test_a_models_name_stays_the_models_unless_the_route_says_so(tmp_path: Path) -> None:
    text = '[routes.small]\nto = [{ model = "big" }]\n'
    book = Book(tmp_path, text)
    assert book.routes["small"].plan is None
    assert "replaces = true" in book.problems
    book = Book(tmp_path, text.replace("to =", "replaces = true\nto ="))
    assert book.routes["small"].plan is not None
    hidden = [r.name for r in book.book.routes(MODELS, KEYS) if r.hidden]
    assert hidden == ["small"], "the model is still there for the route"


def test_a_providers_models_are_offered_under_its_name_and_others_only_to_routes(tmp_path: Path) -> None:
    book = Book(
        tmp_path, PROVIDER + '[routes.r]\nto = [{ provider = "p", model = "secret-model" }, { model = "p/m" }]\n'
    )
    book.secrets.set("p", "sk-1")
    book.book.refresh()
    assert {"p/m", "r"} <= set(book.routes)
    assert "p/secret-model" not in book.routes
    endpoint = book.routes["p/m"].endpoints[0]
    assert endpoint.model == "m"
    assert endpoint.remote is not None
    assert endpoint.remote.credential is not None
    assert (endpoint.remote.credential.header, endpoint.remote.credential.value) == ("authorization", "Bearer sk-1")


def test_providers_trust_the_authorities_that_all_else_trusts(tmp_path: Path) -> None:
    book = Book(tmp_path, PROVIDER.replace('secret = "p"\n', ""))
    ours = RouteBook(book.file, book.secrets, "/etc/ours.pem")
    ours.refresh()
    remote = next(r for r in ours.routes(MODELS, KEYS) if r.name == "p/m").endpoints[0].remote
    assert remote is not None
    assert remote.ca_file == "/etc/ours.pem"


def test_no_listing_and_no_repr_has_the_key(tmp_path: Path) -> None:
    book = Book(tmp_path, PROVIDER)
    book.secrets.set("p", "sk-secret-text")
    book.book.refresh()
    assert "sk-secret-text" not in repr(book.routes)
    assert "sk-secret-text" not in repr(book.book.list(MODELS, KEYS))


def test_a_provider_without_its_secret_is_left_out_and_told(tmp_path: Path) -> None:
    book = Book(tmp_path, PROVIDER + '[routes.r]\nto = [{ model = "p/m" }, { model = "small" }]\n')
    assert "p/m" not in book.routes
    assert "pier secret set p" in book.problems
    plan = book.routes["r"].plan
    assert plan is not None
    assert [to.model for to in plan.to] == ["small"]


def test_a_route_that_nobody_could_answer_for_is_not_offered(tmp_path: Path) -> None:
    book = Book(tmp_path, '[routes.r]\nto = [{ model = "gone" }]\n')
    assert "r" not in book.routes
    assert "pier pull gone" in book.problems
    assert "[providers" not in book.problems
    assert not next(r for r in book.book.list(MODELS, KEYS).routes if r.name == "r").active


def test_a_destination_that_may_be_a_providers_is_told_so(tmp_path: Path) -> None:
    book = Book(tmp_path, '[routes.r]\nto = [{ model = "cloud/m" }]\n')
    assert "or describe its provider: [providers.cloud]" in book.problems


def test_conditions_on_keys_know_them_by_name(tmp_path: Path) -> None:
    when = '{ key = "%s", header = { X-Tier = "gold*" } }'
    text = f'[routes.r]\nto = [{{ model = "small" }}, {{ model = "big", when = {when} }}]\n'
    plan = Book(tmp_path, text % "laptop").routes["r"].plan
    assert plan is not None
    assert plan.rules[0].when == (Match("key_1"), Match("gold", "x-tier", True))
    book = Book(tmp_path, text % "lost")
    assert book.routes["r"].plan is not None
    assert "no key 'lost'" in book.problems


def test_a_model_of_the_store_comes_before_a_provider_of_the_same_name(tmp_path: Path) -> None:
    book = Book(tmp_path, PROVIDER.replace('secret = "p"\n', "") + '[routes.r]\nto = [{ model = "p/m" }]\n')
    models = (*MODELS, Route(name="p/m"))
    routes = [r for r in book.book.routes(models, KEYS) if r.name == "p/m"]
    assert len(routes) == 1
    assert not routes[0].endpoints
    assert "call the provider otherwise" in "\n".join(book.book.list(models, KEYS).told())


async def test_editing_keeps_comments_and_other_lines(tmp_path: Path) -> None:
    book = Book(tmp_path, f"# ours\n{FAST}# the end\n")
    table = RouteTable(to=(To(model="big", weight=2.0),), fallback=(Fallback(model="small"),), sticky="user")
    await book.book.put("new", table)
    text = book.file.read_text()
    assert "# ours" in text
    assert "# the end" in text
    assert "weight = 3" in text
    assert set(book.routes) == {"fast", "new", "small", "big"}
    await book.book.remove("fast")
    assert set(book.routes) == {"new", "small", "big"}
    with pytest.raises(NotFound):
        await book.book.remove("fast")


async def test_an_edit_that_would_be_wrong_changes_nothing(tmp_path: Path) -> None:
    book = Book(tmp_path, FAST)
    with pytest.raises(ConfigError):
        await book.book.put("x", RouteTable(to=(To(model="fast"),)))
    assert book.file.read_text() == FAST
    book.file.write_text("broken = [")
    with pytest.raises(ConfigError):
        await book.book.put("x", RouteTable(to=(To(model="small"),)))
    assert book.file.read_text() == "broken = ["


async def test_changes_of_file_secrets_and_mounted_secrets_are_noticed(tmp_path: Path) -> None:
    mounted = tmp_path / "mounted" / "key"
    mounted.parent.mkdir()
    book = Book(tmp_path, PROVIDER)
    seen: asyncio.Queue[None] = asyncio.Queue()
    following = asyncio.create_task(book.book.follow(lambda: seen.put_nowait(None)))

    async def until(what: str) -> None:
        async with asyncio.timeout(10):
            while what not in book.routes:
                await seen.get()

    try:
        async with asyncio.timeout(10):
            await seen.get()
        book.secrets.set("p", "sk-1")
        await until("p/m")
        book.file.write_text(PROVIDER.replace("providers.p", "providers.q").replace('"p"', f'"file:{mounted}"'))
        async with asyncio.timeout(10):
            while "p/m" in book.routes:
                await seen.get()
        mounted.write_text("sk-2")
        await until("q/m")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
