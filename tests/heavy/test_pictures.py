"""The real stable-diffusion.cpp behind the gateway, asked by OpenAI's own client; its model is small and random."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.engines import tiny_pictures
from tests.engines.onnx.conftest import Served
from tests.engines.onnx.conftest import request as asked
from tests.heavy.conftest import ENVIRONMENTS, Installation

from pierhead.engines.diffusion import WHEELS, Diffusion
from pierhead.engines.serving import PROGRAMS
from pierhead.errors import EngineFailed, UsageError
from pierhead.events import ignore
from pierhead.runtimes.base import Places, expand
from pierhead.runtimes.environment import Environments

pytestmark = pytest.mark.timeout(900)
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "max_pixels": 256 * 256}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(installation: Installation, tiny: Path) -> Installation:
    installation.pier("package", str(tiny), "art")
    installation.start("art", **SMALL)
    return installation


@pytest.fixture(scope="module")
def client(served: Installation) -> Iterator[openai.OpenAI]:
    with served.openai as made:
        yield made


def make(client: openai.OpenAI, prompt: str = "a boat", **more: Any) -> list[bytes]:
    """The pictures' files; what OpenAI's API has no word for goes into the body as it is."""
    ours = {name: more.pop(name) for name in ("seed", "steps", "cfg_scale", "negative_prompt") if name in more}
    given: Any = {"model": "art", "prompt": prompt, **more}
    answer = client.images.generate(**given, extra_body=ours or None)
    assert answer.data
    return [base64.b64decode(one.b64_json or "") for one in answer.data]


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def pixels(png: bytes) -> bytes:
    """What a PNG unpacks to."""
    wide, high = size(png)
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    rows = zlib.decompress(data)
    assert len(rows) == high * (3 * wide + 1)
    return rows


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(wide: int, high: int, rows: bytes | None = None, colour: int = 2) -> bytes:
    """A picture of one's own; ``colour`` 2 is without, 6 with transparency."""
    body = zlib.compress((b"\0" + bytes(range(wide)) * (3 if colour == 2 else 4)) * high) if rows is None else rows
    head = struct.pack(">IIBBBBB", wide, high, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# --- through the gateway ----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_picture_and_words_change_it(client: openai.OpenAI) -> None:
    (first,) = make(client, seed=7)
    assert size(first) == (64, 64)
    assert len(set(pixels(first))) > 50, "it is no plain area"
    assert make(client, seed=7) == [first]
    assert make(client, "a castle in the clouds", seed=7) != [first]
    assert make(client, seed=8) != [first]


def test_several_pictures_have_the_seeds_that_follow(client: openai.OpenAI) -> None:
    one, two = make(client, n=2, seed=40)
    assert make(client, seed=41) == [two]
    assert one != two


def test_size_and_kind_of_file_are_as_asked(client: openai.OpenAI) -> None:
    assert size(make(client, size="96x64")[0]) == (96, 64)
    assert make(client, output_format="jpeg")[0].startswith(b"\xff\xd8\xff")
    assert make(client, output_format="webp")[0][8:12] == b"WEBP"


def test_a_picture_is_repainted_where_the_mask_lets(client: openai.OpenAI) -> None:
    image = png(64, 64)
    rows = zlib.compress(b"".join(b"\0" + b"\0\0\0\xff" * 32 + b"\0\0\0\0" * 32 for _ in range(64)))
    mask = png(64, 64, rows, colour=6)
    given: dict[str, Any] = {
        "model": "art",
        "image": ("boat.png", image),
        "prompt": "a boat",
        "extra_body": {"seed": 3},
    }
    whole = client.images.edit(**given)
    part = client.images.edit(**given, mask=("mask.png", mask))
    files = [base64.b64decode((answer.data or [])[0].b64_json or "") for answer in (whole, part)]
    assert [size(file) for file in files] == [(64, 64)] * 2
    assert files[0] != files[1]
    with pytest.deprecated_call():  # OpenAI's own are no more; the operation stays
        like = client.images.create_variation(model="art", image=("boat.png", image), n=2)
    assert len(like.data or []) == 2


def test_rough_pictures_are_streamed_before_the_whole_one(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            model="art", prompt="a boat", stream=True, partial_images=2, extra_body={"seed": 7, "steps": 6}
        )
    )
    assert [event.type.partition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    files = [base64.b64decode(event.b64_json) for event in events]
    assert [size(file) for file in files] == [(64, 64)] * 3
    assert files[2:] == make(client, seed=7, steps=6)
    with pytest.raises(openai.BadRequestError):
        client.images.generate(model="art", prompt="a boat", stream=True, size="1x1")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "0x0"}, "size"),
        ({"size": "-64x64"}, "size"),
        ({"size": "100000x100000"}, "size"),
        ({"size": "65x64"}, "size"),
        ({"n": 1000}, "n"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"steps": 100_000}, "steps"),
        ({"response_format": "url"}, "response_format"),
    ],
    ids=str,
)
def test_what_cannot_be_painted_is_refused_in_openais_shape(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        make(client, **fields)
    assert refused.value.param == param


HOSTILE = {
    "no picture": b"hello",
    "nothing": b"",
    "a bomb": png(60_000, 60_000, zlib.compress(bytes(1 << 20))),
    "cut off": png(64, 64)[:60],
    "of no width": png(0, 64),
    "a kind that is not read": b"GIF89a\x01\x00\x01\x00\x80\x00\x00",
}


@pytest.mark.parametrize("image", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_picture_is_refused_and_the_next_request_is_answered(client: openai.OpenAI, image: bytes) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(model="art", image=("x.png", image), prompt="a boat")
    assert refused.value.param == "image"
    with pytest.raises(openai.BadRequestError, match="the mask has 32x32"):
        client.images.edit(model="art", image=("x.png", png(64, 64)), mask=("m.png", png(32, 32)), prompt="a boat")


def test_the_list_of_models_says_that_it_makes_pictures_and_chat_is_refused(client: openai.OpenAI) -> None:
    (card,) = [one for one in client.models.list().data if one.id == "art"]
    assert card.model_dump()["capabilities"] == ["images"]
    with pytest.raises(openai.APIStatusError, match="cannot answer"):
        client.chat.completions.create(model="art", messages=[{"role": "user", "content": "hi"}])


def test_pier_run_writes_the_picture_into_a_file(client: openai.OpenAI, served: Installation, tmp_path: Path) -> None:
    target = tmp_path / "boat.png"
    said = json.loads(served.pier("run", "art", "a boat", "--seed", "7", "--output", str(target), "--json"))
    assert said["files"] == [str(target)]
    assert [target.read_bytes()] == make(client, seed=7)


@pytest.mark.docker
@pytest.mark.skipif("PIERHEAD_TEST_DOCKER" not in os.environ, reason="no Docker Engine for tests is here")
def test_it_paints_in_a_container_without_a_network(client: openai.OpenAI, served: Installation, tiny: Path) -> None:
    served.pier("package", str(tiny), "boxed")
    assert served.start("boxed", runtime="docker", **SMALL).runtime == "docker"
    answer = client.images.generate(model="boxed", prompt="a boat", extra_body={"seed": 7})
    assert size(base64.b64decode((answer.data or [])[0].b64_json or "")) == (64, 64)
    served.stop("boxed")


# --- models that cannot be served -------------------------------------------------------------------------------------


def of_other_shapes(folder: Path) -> None:
    """The last layer has other shapes than the rest of the model wants."""
    tensors = tiny_pictures.flux() | {"final_layer.linear.weight": (64, 64)}
    tiny_pictures.write(folder / "flux-tiny.gguf", tensors, "flux")


def without_a_layer(folder: Path) -> None:
    tensors = {name: shape for name, shape in tiny_pictures.flux().items() if not name.startswith("img_in")}
    tiny_pictures.write(folder / "flux-tiny.gguf", tensors, "flux")


@pytest.mark.parametrize("spoil", [of_other_shapes, without_a_layer])
def test_a_bad_model_is_refused_with_the_engines_own_reason(
    installation: Installation, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tiny_pictures.model(tmp_path / "bad")
    spoil(folder)
    name = spoil.__name__.replace("_", "-")
    installation.pier("package", str(folder), name)
    with pytest.raises(EngineFailed, match=r"stable-diffusion\.cpp cannot use the model: ") as failed:
        installation.start(name, **SMALL)
    assert "tensor" in failed.value.message
    assert "\n" not in failed.value.message


def test_a_painter_alone_is_refused_with_what_is_missing(installation: Installation, tmp_path: Path) -> None:
    tiny_pictures.write(tmp_path / "alone.gguf", tiny_pictures.flux(), "flux")
    installation.pier("package", str(tmp_path / "alone.gguf"), "alone")
    with pytest.raises(UsageError, match="a text encoder"):
        installation.start("alone")


# --- the server by itself ---------------------------------------------------------------------------------------------


class Engine(Served):
    """The server as the engine plans it, reached without the gateway."""

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii")
        return [int(word) for word in text.split()]

    def peak(self) -> int:
        """The most memory that its processes had, in bytes."""
        found = 0
        for pid in (self.process.pid, *self.children()):
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
            found += next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        return found


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Engine]:
    python = asyncio.run(Environments(ENVIRONMENTS).ensure("stable-diffusion", WHEELS, ignore))
    spec = Diffusion().plan(asked(folder, **{**SMALL, "threads": 1, **settings})).spec
    with tempfile.TemporaryDirectory(prefix="sd-") as place:
        argv, _ = expand(spec, Places(str(python), str(PROGRAMS), str(folder), f"{place}/engine.sock"))
        engine = Engine(python, folder, tuple(argv), Path(place))
        try:
            yield engine.wait()  # pyright: ignore[reportReturnType]
        finally:
            assert engine.close() in (0, -signal.SIGTERM)


def test_a_picture_that_nobody_waits_for_is_given_up(tiny: Path) -> None:
    with running(tiny, max_steps=1000) as engine:
        with (
            pytest.raises(httpx.ReadTimeout),
            engine.client.stream(
                "POST", "/v1/images/generations", json={"prompt": "a boat", "size": "256x256", "steps": 1000}, timeout=2
            ),
        ):
            pass
        assert engine.ask("/v1/images/generations", {"prompt": "a boat"})["data"]
        assert engine.counted("sd_pictures_given_up_total") == 1
        assert engine.counted("sd_pictures_total") == 1


def test_too_many_wait_and_a_lost_painter_costs_one_request(tiny: Path) -> None:
    with running(tiny, queue=1) as engine:
        slow = {"prompt": "a boat", "size": "256x256", "steps": 12}
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(engine.post("/v1/images/generations", slow).status_code))
            for _ in range(4)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join(120)
        assert sorted(answers)[0] == 200
        assert 429 in answers
        (painter,) = engine.children()
        os.kill(painter, signal.SIGKILL)
        reason = engine.refused("/v1/images/generations", {"prompt": "a boat"}, 500)
        assert "SIGKILL" in reason
        assert engine.ask("/v1/images/generations", {"prompt": "a boat"})["data"]


def test_it_needs_no_more_memory_than_its_plan_says(tiny: Path) -> None:
    planned = Diffusion().plan(asked(tiny, **SMALL)).memory
    with running(tiny) as engine:
        engine.ask("/v1/images/generations", {"prompt": "a boat", "size": "256x256"})
        peak = engine.peak()
    assert planned * 0.5 < peak <= planned, (peak >> 20, planned >> 20)


def test_a_body_that_is_too_large_or_no_form_is_refused(tiny: Path) -> None:
    with running(tiny, max_body_mb=1) as engine:
        assert "larger" in engine.refused("/v1/images/generations", b"x" * (2 << 20), 413)
        assert "JSON" in engine.refused("/v1/images/generations", b"[" * 100_000)
        files = {"image": ("x.png", io.BytesIO(bytes(2 << 20)))}
        assert engine.client.post("/v1/images/edits", files=files, data={"prompt": "a"}).status_code == 413
        broken = {"content-type": "multipart/form-data; boundary=x"}
        assert engine.client.post("/v1/images/edits", content=b"--y\r\n", headers=broken).status_code == 400
