"""Ollama's management through a real gateway: who may change models, what streams through, what is told how."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pierhead.gateway import link, peer
from pierhead.gateway.faults import Fault
from pierhead.gateway.managing import allowed, kind, pours

from .conftest import Call, Engine, Gate

NewEngine = Callable[..., Awaitable[Engine]]
DIGEST = "sha256:" + "a" * 64


async def accept(call: Call) -> None:
    await call.json({"got": len(call.body)})


@pytest.fixture
async def control(new_engine: NewEngine) -> Engine:
    return await new_engine(accept, "control")


def table(*rows: str) -> str:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    return head + "".join(f"   {n}: {row}\n" for n, row in enumerate(rows))


V4 = "0100007F:{} 0100007F:{} {} 00000000:00000000 00:00000000 00000000  {}        0 {} 1 0000 20 4 30 10 -1"


# --- whose process it is ----------------------------------------------------------------------------------------------


def test_the_owner_of_a_connection_is_found_by_both_its_ends() -> None:
    text = table(V4.format("1F90", "0050", "01", 1000, 7), V4.format("0050", "1F90", "01", 0, 8))
    assert peer.owner(text, ("127.0.0.1", 0x1F90), ("127.0.0.1", 0x50)) == 1000
    assert peer.owner(text, ("127.0.0.1", 0x50), ("127.0.0.1", 0x1F90)) == 0
    assert peer.owner(text, ("127.0.0.1", 1), ("127.0.0.1", 0x1F90)) is None


@pytest.mark.parametrize(("state", "inode"), [("06", 0), ("05", 0), ("02", 9), ("0A", 9)])
def test_a_connection_that_its_program_has_left_is_nobodys(state: str, inode: int) -> None:
    """The kernel shows such a socket as root's: nobody may pass for root by closing early."""
    text = table(V4.format("1F90", "0050", state, 0, inode))
    assert peer.owner(text, ("127.0.0.1", 0x1F90), ("127.0.0.1", 0x50)) is None


def test_addresses_of_ipv6_and_those_of_ipv4_inside_it_are_found() -> None:
    six = "00000000000000000000000001000000:1F90 00000000000000000000000001000000:0050 01 0:0 0:0 0 1000 0 7"
    mapped = "0000000000000000FFFF00000100007F:1F90 0000000000000000FFFF00000100007F:0050 01 0:0 0:0 0 1001 0 7"
    assert peer.owner(table(six), ("::1", 0x1F90), ("::1", 0x50)) == 1000
    assert peer.owner(table(mapped), ("127.0.0.1", 0x1F90), ("127.0.0.1", 0x50)) == 1001
    assert peer.owner(table(mapped), ("::ffff:127.0.0.1", 0x1F90), ("::ffff:127.0.0.1", 0x50)) == 1001


@pytest.mark.parametrize("text", ["", "x", table("junk"), table("0100007F:1F90 0100007F:0050 01 a b c d x e 7")])
def test_a_table_that_is_not_one_names_nobody(text: str) -> None:
    assert peer.owner(text, ("127.0.0.1", 0x1F90), ("127.0.0.1", 0x50)) is None


async def test_another_users_process_may_not_change_anything() -> None:
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    own, other = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
    peer.may_change(own, other)
    with pytest.raises(Fault) as caught:
        peer.may_change(own, other, uids=frozenset({os.getuid() + 1}))
    assert caught.value.status == 401
    assert "pier key create" in (caught.value.hint or "")
    with pytest.raises(Fault):
        peer.may_change(("192.0.2.1", 80), ("192.0.2.2", 5000))
    writer.close()
    await writer.wait_closed()
    server.close()


def test_what_reads_and_what_changes_is_told_apart_by_method_and_path() -> None:
    assert kind("GET", "/api/tags") == "read"
    assert kind("POST", "/api/show") == "read"
    assert {kind("POST", f"/api/{verb}") for verb in ("pull", "push", "create", "copy")} == {"change"}
    assert kind("DELETE", "/api/delete") == "change"
    assert kind("HEAD", f"/api/blobs/{DIGEST}") == "change"
    assert kind("POST", "/api/v1/models/pull") == ""
    with pytest.raises(Fault, match="answers POST only"):
        kind("GET", "/api/pull")
    assert allowed("/api/pull") == ("POST",)
    assert allowed("/api/other") == ()
    assert pours("POST", f"/api/blobs/{DIGEST}")
    assert not pours("HEAD", f"/api/blobs/{DIGEST}")


# --- through the gateway ----------------------------------------------------------------------------------------------


async def test_reading_needs_no_key_where_the_listener_needs_none(gate: Gate, control: Engine) -> None:
    await gate.serve(control_socket=str(control.path))
    for method, path in (("GET", "/api/tags"), ("GET", "/api/ps"), ("GET", "/api/version"), ("POST", "/api/show")):
        assert (await gate.ask(method, path, b"{}" if method == "POST" else None)).status == 200, path
    assert (await gate.ask("GET", "/api/v1/models")).status == 401


async def test_changing_without_a_key_is_for_this_users_own_programs(gate: Gate, control: Engine) -> None:
    await gate.serve(control_socket=str(control.path))
    assert (await gate.ask("POST", "/api/pull", {"model": "x"})).status == 200
    assert (await gate.ask("DELETE", "/api/delete", {"model": "x"})).status == 200
    assert (await gate.ask("POST", "/api/pull", {"model": "x"}, unix=True)).status == 200


async def test_a_listener_that_needs_a_key_needs_it_for_reading_too(
    new_gate: Callable[..., Awaitable[Gate]], control: Engine
) -> None:
    gate = await new_gate(require_key=True)
    await gate.serve(control_socket=str(control.path))
    for method, path in (("GET", "/api/tags"), ("POST", "/api/pull"), ("POST", f"/api/blobs/{DIGEST}")):
        answer = await gate.ask(method, path, b"{}" if method == "POST" else None)
        assert answer.status == 401, path
        assert isinstance(answer.json()["error"], str)


async def test_a_key_needs_admin_to_change_and_sees_its_own_models_only(gate: Gate, control: Engine) -> None:
    def key(name: str, **grants: Any) -> link.Key:
        mac = hmac.new(b"p" * 32, name.encode(), hashlib.sha256).hexdigest()
        return link.Key(id=name, mac=mac, grants=link.Grants(**grants))

    keys = (key("admin", admin=True), key("plain", models=("ai/*",)), key("other", dialects=("openai",)))
    await gate.serve(control_socket=str(control.path), keys=keys, pepper=(b"p" * 32).hex())

    async def ask(name: str, method: str, path: str) -> int:
        headers = {"authorization": f"Bearer {name}"}
        return (await gate.ask(method, path, b"{}" if method == "POST" else None, headers=headers)).status

    assert await ask("admin", "POST", "/api/pull") == 200
    assert await ask("plain", "POST", "/api/pull") == 403
    assert await ask("plain", "POST", f"/api/blobs/{DIGEST}") == 403
    assert await ask("other", "GET", "/api/tags") == 403
    assert await ask("plain", "GET", "/api/tags") == 200
    assert control.calls[-1].headers["x-pierhead-models"] == "ai/%2A"


async def test_pages_and_rebound_names_change_nothing(gate: Gate, control: Engine) -> None:
    await gate.serve(control_socket=str(control.path))
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        answer = await gate.ask("POST", "/api/pull", {"model": "x"}, headers=headers)
        assert answer.status in (403, 421)
        answer = await gate.ask("POST", f"/api/blobs/{DIGEST}", b"x", headers=headers)
        assert answer.status in (403, 421)
    assert not control.calls


async def test_another_method_is_refused_with_those_that_there_are(gate: Gate, control: Engine) -> None:
    await gate.serve(control_socket=str(control.path))
    answer = await gate.ask("GET", "/api/pull")
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"


async def test_the_root_says_that_somebody_is_there(gate: Gate) -> None:
    assert (await gate.ask("GET", "/")).body == b"Pierhead is running"
    assert (await gate.ask("HEAD", "/")).status == 200


async def test_a_model_that_is_not_here_is_named_as_ollama_names_it(gate: Gate) -> None:
    await gate.serve()
    answer = await gate.ask("POST", "/api/chat", {"model": "nope", "messages": []})
    assert answer.status == 404
    assert answer.json()["error"].startswith("model 'nope' not found")


async def test_names_are_found_in_any_case_and_with_their_tag(gate: Gate, new_engine: NewEngine) -> None:
    async def answer(call: Call) -> None:
        await call.json({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="Tiny", endpoints=(engine.endpoint,)))
    for name in ("tiny", "TINY:latest", "registry.ollama.ai/library/tiny:latest"):
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "stream": False}
        said = await gate.ask("POST", "/api/chat", body)
        assert said.status == 200, said.body
        assert said.json()["model"] == name


async def test_keep_alive_is_told_to_the_daemon_and_unloading_starts_nothing(gate: Gate) -> None:
    await gate.serve(link.Route(name="m"))
    answer = await gate.ask("POST", "/api/generate", {"model": "m", "keep_alive": 0})
    assert answer.json()["done_reason"] == "unload"
    told = await gate.next(link.KeepLoaded)
    assert (told.model, told.seconds) == ("m", 0)


async def test_a_plain_key_cannot_change_how_long_a_model_stays_for_all_and_is_served_all_the_same(
    gate: Gate, new_engine: NewEngine, talks: Any
) -> None:
    engine = await new_engine(talks)
    pepper = bytes(16)
    keys = tuple(
        link.Key(name, hmac.digest(pepper, name.encode(), hashlib.sha256).hex(), grants=link.Grants(admin=admin))
        for name, admin in (("plain", False), ("ops", True))
    )
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)), keys=keys, pepper=pepper.hex())
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

    async def ask(who: str, **members: Any) -> Any:
        return await gate.ask("POST", "/api/chat", asked | members, headers={"authorization": f"Bearer {who}"})

    for members in ({"keep_alive": 0}, {"keep_alive": "24h", "stream": False}, {"keep_alive": -1, "messages": []}):
        got = await ask("plain", **members)
        assert got.status == 200, got.body
        assert got.headers["x-pierhead-keep-alive"] == "ignored"
    assert "x-pierhead-keep-alive" not in (await ask("plain", stream=False)).headers
    refused = await ask("plain", keep_alive=0, messages=[])
    assert refused.status == 403
    assert "--admin" in refused.json()["error"]
    assert "x-pierhead-keep-alive" not in (await ask("ops", keep_alive=7)).headers
    assert (await gate.next(link.KeepLoaded)).seconds == 7, "nothing of the plain key's came before it"


# --- blobs ------------------------------------------------------------------------------------------------------------


def head(path: str, framing: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n".encode()


async def test_a_blob_larger_than_any_other_body_passes_through(
    new_gate: Callable[..., Awaitable[Gate]], new_engine: NewEngine
) -> None:
    control = await new_engine(accept, "control")
    gate = await new_gate(max_body=100_000)
    await gate.serve(control_socket=str(control.path))
    size = 5_000_000
    wire = await gate.wire()
    await wire.send(head(f"/api/blobs/{DIGEST}", f"content-length: {size}"))
    for _ in range(50):
        await wire.send(b"x" * (size // 50))
    answer = await wire.answer()
    assert answer.json() == {"got": size}
    await wire.send(head("/api/show", "content-length: 2") + b"{}")
    assert (await wire.answer()).status == 200, "the connection is kept"
    assert (await gate.ask("POST", "/api/show", b"x" * 100_001)).status == 413


async def test_memory_stays_small_while_the_daemon_reads_slowly(gate: Gate, folder: Path) -> None:
    go_on, seen = asyncio.Event(), 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        while seen < 40_000_000:
            seen += len(await reader.read(1 << 20))
        writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    path = folder / "slow.sock"
    server = await asyncio.start_unix_server(slow, str(path))
    await gate.serve(control_socket=str(path))
    wire = await gate.wire()
    before = resident(gate.pid)
    sending = asyncio.create_task(
        wire.send(head(f"/api/blobs/{DIGEST}", "content-length: 40000000") + b"x" * 40_000_000)
    )
    done, _ = await asyncio.wait({sending}, timeout=0.5)
    assert not done, "the gateway stopped reading"
    assert resident(gate.pid) - before < 12_000_000
    go_on.set()
    await sending
    assert (await wire.answer()).status == 201
    server.close()


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_a_blob_in_chunks_arrives_whole(gate: Gate, folder: Path) -> None:
    got = bytearray()

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readuntil(b"\r\n"), 16):
            got.extend((await reader.readexactly(size + 2))[:-2])
        writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    path = folder / "chunks.sock"
    server = await asyncio.start_unix_server(read, str(path))
    await gate.serve(control_socket=str(path))
    wire = await gate.wire()
    await wire.send(head(f"/api/blobs/{DIGEST}", "transfer-encoding: chunked"))
    for piece in (b"one", b"two" * 1000, b"three"):
        await wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    await wire.send(b"0\r\n\r\n")
    answer = await wire.answer()
    assert (answer.status, answer.body) == (201, b"ok")
    assert bytes(got) == b"one" + b"two" * 1000 + b"three"
    server.close()


async def test_a_refusal_comes_before_the_body_has_ended(gate: Gate, folder: Path) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 400 Bad\r\ncontent-length: 15\r\n\r\n{"error":"no."}')
        await writer.drain()
        writer.close()

    path = folder / "refuse.sock"
    server = await asyncio.start_unix_server(refuse, str(path))
    await gate.serve(control_socket=str(path))
    wire = await gate.wire()
    await wire.send(head(f"/api/blobs/{DIGEST}", "content-length: 1000000") + b"x" * 1000)
    answer = await wire.answer()
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    server.close()


async def test_without_a_daemon_a_blob_is_refused_in_words(gate: Gate, folder: Path) -> None:
    await gate.serve(control_socket=str(folder / "nobody.sock"))
    wire = await gate.wire()
    await wire.send(head(f"/api/blobs/{DIGEST}", "content-length: 3") + b"abc")
    answer = await wire.answer()
    assert answer.status == 503
    assert "daemon" in answer.json()["error"]


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(gate: Gate, folder: Path) -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        came.set()
        with contextlib.suppress(OSError):
            while await reader.read(65536):
                pass
        left.set()
        writer.close()

    path = folder / "wait.sock"
    server = await asyncio.start_unix_server(wait, str(path))
    await gate.serve(control_socket=str(path))
    wire = await gate.wire()
    await wire.send(head(f"/api/blobs/{DIGEST}", "content-length: 1000000") + b"x" * 1000)
    async with asyncio.timeout(10):
        await came.wait()
        wire.close()
        await left.wait()
    assert (await gate.ask("GET", "/health")).status == 200
    server.close()


@pytest.mark.parametrize("junk", ["zz\r\n", "5\r\nabcdefg\r\n"])
async def test_chunks_that_are_none_are_refused(gate: Gate, control: Engine, junk: str) -> None:
    await gate.serve(control_socket=str(control.path))
    wire = await gate.wire()
    await wire.send(head(f"/api/blobs/{DIGEST}", "transfer-encoding: chunked") + junk.encode())
    assert (await wire.answer()).status == 400
