"""Audio, images and other forms through a real gateway, by the official client, to engines that offer them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.gateway import forms, link
from pierhead.gateway.faults import Fault

from .conftest import Call, Engine, Gate

NewEngine = Callable[..., Awaitable[Engine]]
AUDIO = b"RIFF" + bytes(range(256)) * 50
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    + b"model=x\r\n--bb\r\n"
    + b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
)
TYPE = 'multipart/form-data; boundary="b"'


async def answer(call: Call) -> None:
    path = call.head.split()[1].decode()
    if path == "/v1/audio/speech":
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: 3\r\n\r\nmp3")
    elif path.startswith("/v1/images"):
        await call.json({"created": 1, "data": [{"b64_json": "AAAA"}]})
    else:
        await call.json({"text": "hello"})


def endpoint(engine: Engine, *serves: str, model: str = "") -> link.Endpoint:
    return msgspec.structs.replace(engine.endpoint, serves=serves, model=model)


ALL = ("transcriptions", "translations", "speech", "images", "image-edits", "image-variations")


@pytest.fixture
async def client(gate: Gate, new_engine: NewEngine) -> tuple[openai.AsyncOpenAI, Engine]:
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(endpoint(engine, *ALL, model="inner"),)))
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gate.port}/v1", api_key="x", max_retries=0), engine


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own older calls
async def test_the_official_clients_audio_and_images_reach_an_engine_under_its_own_name(
    client: tuple[openai.AsyncOpenAI, Engine],
) -> None:
    asked, engine = client
    async with asked:
        said = await asked.audio.transcriptions.create(model="m", file=("a.wav", AUDIO))
        assert said.text == "hello"
        body = engine.calls[-1].body
        kind = engine.calls[-1].headers["content-type"]
        assert forms.fields(body, kind)["model"] == "inner"
        assert AUDIO in body
        assert (await asked.audio.translations.create(model="m", file=("a.wav", AUDIO))).text == "hello"
        speech = await asked.audio.speech.create(model="m", voice="alloy", input="hi")
        assert speech.content == b"mp3"
        assert msgspec.json.decode(engine.calls[-1].body)["model"] == "inner"
        image = await asked.images.generate(model="m", prompt="a cat")
        assert image.data is not None
        assert image.data[0].b64_json == "AAAA"
        assert (await asked.images.edit(model="m", image=("a.png", AUDIO), prompt="x")).data
        assert (await asked.images.create_variation(model="m", image=("a.png", AUDIO))).data


async def test_an_engine_that_offers_none_of_it_is_said_to(gate: Gate, new_engine: NewEngine) -> None:
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(endpoint(engine, "chat"),)))
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gate.port}/v1", api_key="x", max_retries=0)
    async with client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.audio.transcriptions.create(model="m", file=("a.wav", AUDIO))
        assert caught.value.type == "invalid_request_error"
        assert caught.value.param == "model"
        assert "cannot answer /v1/audio/transcriptions" in caught.value.message
        with pytest.raises(openai.NotFoundError):
            await client.images.generate(model="m", prompt="x")
    assert not engine.calls


async def test_a_form_without_a_model_or_an_end_is_refused(gate: Gate) -> None:
    await gate.serve(link.Route(name="m"))
    for body, kind, status in (
        (FORM.replace(b'name="model"', b'name="x"'), TYPE, 400),
        (FORM[:-6], TYPE, 400),
        (b"{}", "application/json", 415),
        (FORM, "multipart/form-data", 415),
        (b"", TYPE, 400),
    ):
        wire = await gate.wire()
        lines = f"host: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        await wire.send(b"POST /v1/audio/transcriptions HTTP/1.1\r\n" + lines.encode() + body)
        assert (await wire.answer()).status == status
        wire.close()


async def test_a_large_form_does_not_hold_up_others(client: tuple[openai.AsyncOpenAI, Engine]) -> None:
    asked, _ = client
    async with asked, asyncio.timeout(20):
        said = await asked.audio.transcriptions.create(model="m", file=("a.wav", AUDIO * 600))
    assert said.text == "hello"


def test_the_models_field_is_found_and_replaced_and_nothing_else() -> None:
    assert forms.fields(FORM, TYPE) == {"model": "whisper"}
    made = forms.renamed(FORM, TYPE, "other")
    assert made == FORM.replace(b"whisper", b"other")
    assert forms.fields(made, TYPE)["model"] == "other"


@given(st.binary(max_size=300), st.sampled_from([TYPE, "multipart/form-data; boundary=", "x", ""]))
def test_hostile_forms_are_refused(body: bytes, kind: str) -> None:
    for text in (body, FORM[:120] + body, FORM + body):
        status = 400
        try:
            forms.fields(text, kind)
        except Fault as fault:
            status = fault.status
        assert status in (400, 415)
