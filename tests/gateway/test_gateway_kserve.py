"""KServe's protocol at the gateway's door for an engine that speaks it itself; the engine is scripted."""

from __future__ import annotations

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
