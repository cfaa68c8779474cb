"""KServe's protocol at the gateway's door for an engine that speaks it itself; the engine is scripted."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from pierhead.gateway import link

TENSOR = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}


async def echo(call) -> None:
    await call.json({"path": call.head.split(b" ", 2)[1].decode()})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("/v2/models/m/infer", "/v2/models/inner/infer"),
        ("/v2/models/m/versions/2/infer", "/v2/models/inner/versions/2/infer"),
        ("/v2/models/m/models/part/infer", "/v2/models/part/infer"),
        ("/v2/models/m/models/part/versions/1/generate", "/v2/models/part/versions/1/generate"),
        ("/v2/models/m/models/a%2Fb/infer", "/v2/models/a%2Fb/infer"),
        ("/v2/models/m/models/..%2F..%2Frepository/infer", "/v2/models/..%2F..%2Frepository/infer"),
        ("/v2/models/models/infer", "/v2/models/inner/infer"),
        ("/v2/models/v2/infer", "/v2/models/inner/infer"),
        ("/v2/models/group/models/whole/infer", "/v2/models/inner/infer"),
        ("/v2/models/group%2Fmodels%2Fwhole/infer", "/v2/models/inner/infer"),
    ],
)
async def test_an_engine_is_asked_by_its_own_name_or_that_of_one_of_its_models(gate, new_engine, asked, told) -> None:
    engine = await new_engine(echo)
    endpoint = link.Endpoint("r", str(engine.path), model="inner", serves=("infer", "generate"))
    aliases = ("models", "v2", "group/models/whole")
    await gate.serve(link.Route(name="m", aliases=aliases, endpoints=(endpoint,)))
    answer = await gate.ask("POST", asked, TENSOR)
    assert (answer.status, answer.json()) == (200, {"path": told})


async def test_a_part_of_a_model_that_is_not_there_is_a_model_that_is_not_there(gate, new_engine) -> None:
    await gate.serve(link.Route(name="m"))
    answer = await gate.ask("POST", "/v2/models/other/models/part/infer", TENSOR)
    assert answer.status == 404
    assert "'other'" in answer.json()["error"]


async def knows(call) -> None:
    """An engine with models of its own, which echoes what it is asked."""
    path = call.head.split(b" ", 2)[1].decode()
    if path == "/v2/repository/index":
        await call.json([{"name": "part", "version": "1", "state": "READY"}, {"name": "other"}])
    elif path.endswith("/gone"):
        await call.json({"error": "no such model"}, 404)
    else:
        await call.json({"name": "inner", "path": path, "body": call.body.decode()})


async def native(gate, new_engine, **route):
    engine = await new_engine(knows)
    endpoint = link.Endpoint("r", str(engine.path), model="inner", serves=("infer", "triton-repository"))
    await gate.serve(link.Route(name="m", endpoints=(endpoint,), card={"capabilities": ["infer"]}), **route)
    return engine


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("/v2/models/m", "/v2/models/inner"),
        ("/v2/models/m/versions/3", "/v2/models/inner/versions/3"),
        ("/v2/models/m/config", "/v2/models/inner/config"),
        ("/v2/models/m/versions/1/stats", "/v2/models/inner/versions/1/stats"),
        ("/v2/models/m/models/part/ready", "/v2/models/part/ready"),
        ("/v2/models/m/models/..%2F..%2Fx/config", "/v2/models/..%2F..%2Fx/config"),
    ],
)
async def test_an_engine_that_speaks_the_protocol_tells_of_its_models_itself(gate, new_engine, asked, told) -> None:
    await native(gate, new_engine)
    answer = await gate.ask("GET", asked)
    assert (answer.status, answer.json()["path"]) == (200, told)
    assert answer.json()["name"] == ("m" if asked == "/v2/models/m" else answer.json()["name"])


async def test_an_engine_s_no_is_passed_on_in_the_protocol_s_words(gate, new_engine) -> None:
    await native(gate, new_engine)
    answer = await gate.ask("GET", "/v2/models/m/models/gone")
    assert answer.status == 404
    assert "no such model" in answer.json()["error"]


async def test_what_an_engine_does_not_tell_is_not_invented(gate, new_engine, talks) -> None:
    engine = await new_engine(talks)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,), card={"capabilities": ["chat"]}))
    answer = await gate.ask("GET", "/v2/models/m/config")
    assert answer.status == 404
    assert not engine.calls


async def test_the_index_lists_models_and_those_that_their_engines_have(gate, new_engine) -> None:
    await native(gate, new_engine)
    answer = await gate.ask("POST", "/v2/repository/index", {})
    assert [(m["name"], m.get("state")) for m in answer.json() if "marker" not in m["name"]] == [
        ("m", "READY"),
        ("m/models/part", "READY"),
        ("m/models/other", None),
    ]


async def test_a_model_of_an_engine_is_loaded_without_what_the_client_would_bring_along(gate, new_engine) -> None:
    engine = await native(gate, new_engine)
    evil = {"parameters": {"config": "{}", "file:1/model.py": "aW1wb3J0IG9z"}}
    answer = await gate.ask("POST", "/v2/repository/models/m/models/part/load", evil)
    assert answer.status == 200
    assert engine.calls[-1].head.startswith(b"POST /v2/repository/models/part/load ")
    assert engine.calls[-1].body == b"{}"


async def test_a_whole_model_is_loaded_and_let_go_by_the_daemon(gate, new_engine) -> None:
    await native(gate, new_engine)
    answer = await gate.ask("POST", "/v2/repository/models/m/unload", {})
    assert answer.status == 200
    told = await gate.next(link.KeepLoaded)
    assert (told.model, told.seconds) == ("m", 0)


@pytest.mark.parametrize(("admin", "status"), [(False, 403), (True, 200)])
async def test_only_an_admin_key_may_load_and_unload(gate, new_engine, admin, status) -> None:
    mac = hmac.digest(b"p" * 32, b"secret", hashlib.sha256).hex()
    key = link.Key(id="k", mac=mac, grants=link.Grants(admin=admin))
    await native(gate, new_engine, keys=(key,), pepper=(b"p" * 32).hex())
    headers = {"authorization": "Bearer secret"}
    answer = await gate.ask("POST", "/v2/repository/models/m/models/part/load", {}, headers=headers)
    assert answer.status == status


async def test_a_proxy_does_not_lend_its_own_rights_to_load(gate, new_engine) -> None:
    engine = await native(gate, new_engine)
    headers = {"x-forwarded-for": "192.0.2.1"}
    answer = await gate.ask("POST", "/v2/repository/models/m/models/part/load", {}, headers=headers)
    assert answer.status == 401
    assert not engine.calls
