"""Who is let in: keys, hosts, origins, exposure beyond loopback, and the control API behind the gateway."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import time
from typing import Any

import pytest

from pierhead.config import GatewaySettings
from pierhead.errors import AccessDenied, AddressInUse, ConfigError
from pierhead.gateway import link
from pierhead.gateway.listeners import bind_tcp, check_exposure, parse_address

PEPPER = b"p" * 32
KEY = "sk-one"


def key(text: str = KEY, **grants: Any) -> link.Key:
    mac = hmac.new(PEPPER, text.encode(), hashlib.sha256).hexdigest()
    return link.Key(id="k1", mac=mac, grants=link.Grants(**grants))


async def test_a_key_is_needed_over_tcp_when_settings_say_so_and_never_on_the_unix_socket(new_gate):
    gate = await new_gate(require_key=True)
    await gate.serve(keys=(key(),), pepper=PEPPER.hex())
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer nope"}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
    ):
        got = await gate.ask("GET", "/v1/models", headers=headers)
        assert got.status == status, headers
    refused = await gate.ask("POST", "/v1/completions", {"model": "m"})
    assert refused.json()["error"]["code"] == "missing_api_key"
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert (await gate.ask("GET", "/v1/models", unix=True)).status == 200
    assert (await gate.ask("GET", "/health")).status == 200
    assert (await gate.ask("GET", "/metrics")).status == 401


async def test_where_no_key_is_needed_a_wrong_one_is_refused_once_there_are_keys_and_ignored_until_then(gate):
    route = link.Route(name="m")
    wrong = ({"authorization": "Bearer nope"}, {"x-api-key": "nope"})
    await gate.serve(route)
    for headers in ({}, *wrong):  # OpenAI's clients cannot be told to send none
        assert (await gate.ask("GET", "/v1/models/m", headers=headers)).status == 200
    await gate.serve(route, keys=(key(models=("other",)),), pepper=PEPPER.hex())
    for headers in wrong:
        refused = await gate.ask("GET", "/v1/models/m", headers=headers)
        assert (refused.status, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await gate.ask("GET", "/v1/models/m")).status == 200
    assert (await gate.ask("GET", "/v1/models/m", headers={"authorization": "Basic eDp5"})).status == 200
    assert (await gate.ask("GET", "/v1/models/m", headers={"authorization": f"Bearer {KEY}"})).status == 403
    assert (await gate.ask("GET", "/health", headers=wrong[0])).status == 200


async def test_a_revoked_key_stops_on_an_open_connection(new_gate, http):
    gate = await new_gate(require_key=True)
    await gate.serve(keys=(key(),), pepper=PEPPER.hex())
    wire = await gate.wire()
    ask = http("GET", "/v1/models", None, {"authorization": f"Bearer {KEY}"})
    await wire.send(ask)
    assert (await wire.answer()).status == 200
    await gate.serve(keys=(key("another"),), pepper=PEPPER.hex())
    await wire.send(ask)
    assert (await wire.answer()).status == 401


async def test_only_known_hosts_are_answered_over_tcp(new_gate):
    gate = await new_gate(allowed_hosts=("localhost", "model-runner.docker.internal", "[::1]"))
    for host, status in (
        ("localhost", 200),
        ("LOCALHOST:12434", 200),
        ("localhost.", 200),
        ("127.0.0.1:1", 200),  # the address the connection came to
        ("[::1]:80", 200),
        ("model-runner.docker.internal", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.2", 421),
        ("", 421),
    ):
        assert (await gate.ask("GET", "/health", headers={"host": host})).status == status, host
    assert (await gate.ask("GET", "/health", headers={"host": "evil.example"}, unix=True)).status == 200


async def test_only_allowed_origins_may_use_it_from_a_page(new_gate):
    gate = await new_gate(allowed_origins=("https://good.example",))
    await gate.serve(link.Route(name="m"))
    assert (await gate.ask("GET", "/v1/models", headers={"origin": "https://evil.example"})).status == 403
    assert (await gate.ask("GET", "/v1/models", headers={"origin": "null"})).status == 403
    got = await gate.ask("GET", "/v1/models", headers={"origin": "https://good.example"})
    assert got.headers["access-control-allow-origin"] == "https://good.example"
    assert (await gate.ask("GET", "/v1/models", headers={"origin": "http://localhost"})).status == 200
    preflight = {"origin": "https://good.example", "access-control-request-method": "POST"}
    got = await gate.ask("OPTIONS", "/v1/chat/completions", headers=preflight)
    assert got.status == 204
    assert "authorization" in got.headers["access-control-allow-headers"]
    preflight["origin"] = "https://evil.example"
    assert (await gate.ask("OPTIONS", "/v1/chat/completions", headers=preflight)).status == 403


async def test_the_control_api_is_one_more_upstream_and_takes_an_admins_key_over_tcp(gate, new_engine):
    async def answer(call):
        await call.json({"target": call.head.split()[1].decode(), "method": call.head.split()[0].decode()}, 418)

    control = await new_engine(answer, "control")
    await gate.serve(control_socket=str(control.path), keys=(key(),), pepper=PEPPER.hex())
    got = await gate.ask("GET", "/api/v1/status", headers={"authorization": f"Bearer {KEY}"})
    assert got.status == 403
    assert "--admin" in got.json()["error"]["hint"]
    await gate.serve(control_socket=str(control.path), keys=(key(admin=True),), pepper=PEPPER.hex())
    assert (await gate.ask("GET", "/api/v1/status")).status == 401
    got = await gate.ask("DELETE", "/api/v1/models/a/b?x=1", headers={"authorization": f"Bearer {KEY}"})
    assert got.status == 418  # the control API's own answers pass as they are
    assert got.json() == {"target": "/api/v1/models/a/b?x=1", "method": "DELETE"}
    assert (await gate.ask("GET", "/api/v1/status", unix=True)).json()["target"] == "/api/v1/status"
    await control.stop()
    got = await gate.ask("GET", "/api/v1/status", unix=True)
    assert got.status == 503
    assert "pier serve" in got.json()["error"]["message"]


async def test_keys_never_reach_the_access_log(new_gate, chat):
    gate = await new_gate(access_log=True)
    await gate.serve(link.Route(name="m"))
    await gate.ask("POST", "/v1/nothing?key=x", chat, headers={"authorization": "Bearer sk-secret"})
    said = await gate.stop()
    line = json.loads(next(x for x in said.splitlines() if "nothing" in x))
    assert line["status"] == 404
    assert "sk-secret" not in said


def test_beyond_loopback_nothing_listens_without_a_key():
    check_exposure(("127.0.0.1:1", "[::1]:1", "localhost:1"), require_key=False, has_keys=False)
    for address in ("0.0.0.0:1", "192.0.2.1:1", "[::]:1", "*:1"):
        with pytest.raises(AccessDenied, match="no API key"):
            check_exposure((address,), require_key=False, has_keys=False)
        check_exposure((address,), require_key=False, has_keys=True)
        check_exposure((address,), require_key=True, has_keys=False)


async def test_one_listener_beyond_loopback_makes_keys_needed_on_all(new_gate):
    snapshot = {"type": "snapshot", "version": 1, "pepper": PEPPER.hex(), "keys": [{"id": "k1", "mac": key().mac}]}
    gate = await new_gate(listen=("127.0.0.1:0", "0.0.0.0:0"), extra={"snapshot": snapshot})
    assert (await gate.ask("GET", "/v1/models")).status == 401
    assert (await gate.ask("GET", "/v1/models", headers={"authorization": f"Bearer {KEY}"})).status == 200


async def test_the_process_says_why_it_will_not_listen_and_exits(new_gate):
    gate = await new_gate(listen=("0.0.0.0:0",), link_up=False)
    assert gate.process is not None
    said = await gate.stop()
    error = json.loads(said.strip().splitlines()[-1])["error"]
    assert error["code"] == "access_denied"
    assert "pier key create" in error["hint"]
    assert gate.process.returncode == 7


@pytest.mark.parametrize("text", ["", "12434", "localhost", "example.com:80", "127.0.0.1:x", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert "127.0.0.1:12434" in (caught.value.hint or "")


def test_a_port_in_use_is_said_plainly():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(AddressInUse, match="another program"):
            bind_tcp(f"127.0.0.1:{other.getsockname()[1]}")


async def test_a_socket_that_became_a_link_is_not_followed(gate, new_engine, chat, folder):
    async def answer(call):
        await call.json({"stolen": True})

    other = await new_engine(answer, "other")
    trap = folder / "trap.sock"
    trap.symlink_to(other.path)
    await gate.serve(link.Route(name="m", endpoints=(link.Endpoint(replica="r", socket=str(trap)),)))
    asked = asyncio.create_task(gate.ask("POST", "/v1/completions", chat))
    message = await gate.next(link.EnsureReady)
    assert message.failed == "r"
    gate.say(link.StartResult(id=message.id, endpoint=link.Endpoint(replica="r", socket=str(trap))))
    assert (await asked).status == 502
    assert other.calls == []


def test_settings_travel_to_the_process_as_they_are():
    assert GatewaySettings().listen == ("127.0.0.1:12434",)


AUTH = {"authorization": f"Bearer {KEY}"}


async def answer_ok(call):
    await call.json({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


async def test_a_key_reaches_only_the_models_and_dialects_of_its_scopes(gate, new_engine, chat):
    engine = await new_engine(answer_ok)
    routes = [
        link.Route(name="smol", aliases=("smol:latest", "tiny"), endpoints=(engine.endpoint,)),
        link.Route(name="large", endpoints=(engine.endpoint,)),
    ]

    async def post(model: str, path: str = "/v1/chat/completions") -> tuple[int, str]:
        got = await gate.ask("POST", path, chat | {"model": model, "max_tokens": 5}, headers=AUTH)
        return got.status, "" if got.status == 200 else got.json()["error"].get("code", "")

    await gate.serve(*routes, keys=(key(models=("sm*",)),), pepper=PEPPER.hex())
    assert await post("smol") == (200, "")
    assert await post("tiny") == (200, "")
    assert await post("large") == (403, "model_not_allowed")
    listed = (await gate.ask("GET", "/v1/models", headers=AUTH)).json()["data"]
    assert [m["id"] for m in listed] == ["smol"]
    assert (await gate.ask("GET", "/v1/models/large", headers=AUTH)).status == 403
    assert len((await gate.ask("GET", "/models", headers=AUTH)).json()) == 1

    await gate.serve(*routes, keys=(key(models=("tin?",)),), pepper=PEPPER.hex())
    assert await post("smol") == (200, "")  # any of its names counts
    await gate.serve(*routes, keys=(key(dialects=("anthropic",)),), pepper=PEPPER.hex())
    assert await post("smol") == (403, "dialect_not_allowed")
    await gate.serve(*routes, keys=(key(dialects=("openai",)),), pepper=PEPPER.hex())
    assert await post("large") == (200, "")


async def test_a_key_ends_when_it_expires_even_on_an_open_connection(new_gate, http):
    gate = await new_gate(require_key=True)
    await gate.serve(keys=(key(expires=time.time() + 1.2),), pepper=PEPPER.hex())
    wire = await gate.wire()
    ask = http("GET", "/v1/models", None, AUTH)
    seen = []
    async with asyncio.timeout(10):
        while not seen or seen[-1] == 200:
            await wire.send(ask)
            answer = await wire.answer()
            seen.append(answer.status)
    assert seen[0] == 200
    assert seen[-1] == 401
    assert answer.json()["error"]["code"] == "expired_api_key"


async def test_a_rotated_key_holds_under_both_texts_until_its_grace_ends(new_gate):
    gate = await new_gate(require_key=True)
    one, two = key("old"), key("new")
    both = link.Key(id="k1", mac=two.mac, old_mac=one.mac, old_until=time.time() + 3600)
    await gate.serve(keys=(both,), pepper=PEPPER.hex())
    for text in ("old", "new"):
        assert (await gate.ask("GET", "/v1/models", headers={"authorization": f"Bearer {text}"})).status == 200
    past = link.Key(id="k1", mac=two.mac, old_mac=one.mac, old_until=time.time() - 1)
    await gate.serve(keys=(past,), pepper=PEPPER.hex())
    for text, status in (("old", 401), ("new", 200)):
        assert (await gate.ask("GET", "/v1/models", headers={"authorization": f"Bearer {text}"})).status == status


async def test_scopes_hold_for_what_the_gateway_answers_by_itself(gate):
    async def got(path: str) -> tuple[int, str]:
        answer = await gate.ask("GET", path, headers=AUTH)
        error = answer.json().get("error", {}) if answer.status == 403 else {}
        return answer.status, error.get("code", "") if isinstance(error, dict) else error

    await gate.serve(link.Route(name="m"), keys=(key(models=("m",)),), pepper=PEPPER.hex())
    assert await got("/metrics") == (403, "metrics_not_allowed")  # it names all models and keys
    await gate.serve(link.Route(name="m"), keys=(key(models=("m",), admin=True),), pepper=PEPPER.hex())
    assert await got("/metrics") == (200, "")
    await gate.serve(link.Route(name="m"), keys=(key(dialects=("anthropic",)),), pepper=PEPPER.hex())
    assert await got("/v1/conversations/conv_1") == (403, "dialect_not_allowed")
    assert await got("/v1/responses/resp_1") == (403, "dialect_not_allowed")
    assert (await got("/v2/models/m"))[0] == 403
    assert await got("/metrics") == (200, "")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "via", "x-real-ip"])
async def test_what_came_through_a_proxy_is_not_from_a_program_of_this_user(gate, new_engine, header):
    async def answer(call):
        await call.json({})

    control = await new_engine(answer, "control")
    await gate.serve(control_socket=str(control.path))
    body = {"source": "a", "destination": "b"}
    assert (await gate.ask("POST", "/api/copy", body)).status == 200
    assert (await gate.ask("POST", "/api/copy", body, headers={header: "192.0.2.1"})).status == 401
