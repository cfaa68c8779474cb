"""Models pushed to ModelScope: a double of its API that checks what it is sent, read back by our own pull."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, NotFound, UsageError
from pierhead.events import PushDone, ignore
from pierhead.refs import parse
from pierhead.sources.publish import Options, push_to_hub
from pierhead.sources.scope_push import _own  # pyright: ignore[reportPrivateUsage]

from .servers import FAST, Puller, Server, make_gguf, serving

MODEL = make_gguf(150_000)
TOKEN = "ms_write"


@dataclass
class ScopeDouble:
    """Repositories by name; large files go to ``storage`` in one request each."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: int = 0
    messages: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the storage
    url: str = ""
    storage: str = ""
    refuse: str = ""
    leaked: bool = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path.endswith("/repo/files"):
            return self._list(path.removeprefix("/api/v1/models/").removesuffix("/repo/files"))
        allowed = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.endswith("/repo"):
            return self._file(path.removeprefix("/api/v1/models/").removesuffix("/repo"), request.query["FilePath"])
        if not allowed or request.cookies.get("m_session_id") != TOKEN:
            return web.json_response({"Code": 10010101003, "Message": "token", "Success": False}, status=401)
        body = await request.json()
        if path == "/api/v1/models":
            self.made.append(body)
            self.repos[f"{body['Path']}/{body['Name']}"] = {}
            return web.json_response({"Code": 200, "Data": {}, "Success": True})
        if path.endswith("/info/lfs/objects/batch"):
            return web.json_response({"Code": 200, "Data": {"objects": [self._object(o) for o in body["objects"]]}})
        return self._commit(path.removeprefix("/api/v1/repos/models/").partition("/commit/")[0], body)

    def _list(self, repo: str) -> web.Response:
        if repo not in self.repos:
            return web.json_response({"Code": 10010205001, "Success": False}, status=404)
        rows = [
            {"Path": p, "Size": len(d), "Sha256": hashlib.sha256(d).hexdigest(), "Type": "blob", "Revision": "a" * 40}
            for p, d in self.repos[repo].items()
        ]
        return web.json_response({"Code": 200, "Data": {"Files": rows}, "Success": True})

    def _file(self, repo: str, path: str) -> web.Response:
        return web.Response(body=self.repos[repo][path])

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.storage}/{wanted['oid']}?sig=secret"}}}

    def _commit(self, repo: str, body: dict[str, Any]) -> web.Response:
        if self.refuse:
            return web.json_response({"Code": 10030000001, "Message": self.refuse, "Success": False})
        for action in body["actions"]:
            large = action["type"] == "lfs"
            data = self.objects[action["sha256"]] if large else base64.b64decode(action["content"])
            assert len(data) == action["size"]
            self.repos[repo][action["path"]] = data
        self.messages.append(body["commit_message"])
        return web.json_response({"Code": 200, "Data": {}, "Success": True})

    async def store(self, request: web.Request) -> web.StreamResponse:
        self.leaked |= "Authorization" in request.headers or "Cookie" in request.headers
        data = await request.read()
        if self.statuses:
            return web.Response(status=self.statuses.pop(0))
        self.puts += 1
        oid = request.path.strip("/")
        assert hashlib.sha256(data).hexdigest() == oid
        self.objects[oid] = data
        return web.json_response({"Code": 200})


@pytest.fixture
async def double() -> AsyncGenerator[ScopeDouble]:
    found = ScopeDouble()
    async with serving() as service, serving() as storage:
        service.answer, storage.answer = found.handle, found.store
        found.storage, found.url = storage.url, service.url
        yield found
        assert not found.leaked


@pytest.fixture
async def push(server: Server, puller: Puller, double: ScopeDouble) -> Any:
    await puller(server.add("/Tiny-Q4_0.gguf", MODEL), name="tiny")
    puller.settings = SourceSettings(ms_endpoint=double.url, connect_timeout=5, read_timeout=5)
    env = {"MODELSCOPE_API_TOKEN": TOKEN, "HOME": puller.env["HOME"]}

    async def run(target: str, options: Options = Options(), token: str = TOKEN) -> PushDone:  # noqa: B008
        async with asyncio.timeout(60):
            return await push_to_hub(
                puller.store, "tiny", parse(target), options, settings=puller.settings, listener=ignore, retry=FAST,
                env={**env, "MODELSCOPE_API_TOKEN": token},
            )  # fmt: skip

    return run


async def test_a_model_goes_to_modelscope_with_a_card_and_comes_back(
    push: Any, puller: Puller, double: ScopeDouble
) -> None:
    double.statuses = [503]
    done = await push("ms:me/tiny", Options(private=True, message="First"))
    assert done.sent == len(MODEL)
    assert double.made == [{"Path": "me", "Name": "tiny", "Visibility": 1}]
    assert double.messages == ["First"]
    assert "pier run ms:me/tiny:F32" in double.repos["me/tiny"]["README.md"].decode()
    record = await puller("ms:me/tiny", name="back")
    assert puller.content(record) == MODEL


async def test_what_modelscope_has_is_not_sent_again(push: Any, double: ScopeDouble) -> None:
    await push("ms:me/tiny")
    assert (await push("ms:me/tiny")).sent == 0
    await push("ms:me/other")
    assert (double.puts, len(double.messages)) == (1, 2)


async def test_a_storage_that_refuses_is_one_error(push: Any, double: ScopeDouble) -> None:
    double.statuses = [403] * 10
    with pytest.raises(AccessDenied, match="answers 403"):
        await push("ms://me/tiny", Options())
    assert not double.repos.get("me/tiny")


async def test_modelscopes_refusals_are_shown(push: Any, double: ScopeDouble) -> None:
    with pytest.raises(NotFound, match="no repository me/tiny"):
        await push("ms:me/tiny", Options(create=False))
    with pytest.raises(AccessDenied):
        await push("ms:me/tiny", token="ms_other")
    double.refuse = "license is not allowed"
    with pytest.raises(UsageError, match="license is not allowed"):
        await push("ms:me/tiny")


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("https://lfs.modelscope.cn/x", True),
        ("http://lfs.modelscope.cn/x", False),
        ("https://modelscope.cn.evil.com/x", False),
        ("https://evilmodelscope.cn/x", False),
        ("https://oss.aliyuncs.com/x", False),
    ],
)
def test_the_token_goes_to_the_services_own_domain_alone(url: str, own: bool) -> None:
    assert _own(url, "www.modelscope.cn") is own
