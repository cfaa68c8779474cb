"""Every request ends once, for its client and in the books, also when something of ours breaks."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import textwrap
import time
from types import FunctionType
from typing import Any
from unittest import mock

import msgspec
import pytest

from pierhead.config import TrafficSettings
from pierhead.gateway import link
from pierhead.gateway.faults import Fault
from pierhead.gateway.holder import Holder
from pierhead.gateway.lanes import Lane, Ticket
from pierhead.gateway.local import LocalAnswer
from pierhead.gateway.operations import OPERATIONS
from pierhead.gateway.relay import Relay
from pierhead.gateway.remembered import Remembered
from pierhead.gateway.upload import Upload
from pierhead.gateway.upstream import Target, UpstreamConnection
from pierhead.gateway.usage import NOTHING

# --- one namespace ----------------------------------------------------------------------------------------------------

inside = pytest.mark.skipif(
    not isinstance(Relay.start, FunctionType),
    reason="it looks into classes, which is not possible where they are compiled",
)
CHAIN = [cls for cls in reversed(Remembered.__mro__) if cls is not object]


def _function(value: Any) -> FunctionType | None:
    return value.fget if isinstance(value, property) else value if isinstance(value, FunctionType) else None


def _body(function: FunctionType) -> list[ast.stmt]:
    (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(parsed, ast.FunctionDef | ast.AsyncFunctionDef)
    return parsed.body[1:] if ast.get_docstring(parsed) else parsed.body


def _stands_for_another(function: FunctionType) -> bool:
    """Whether it only says that a class further down does it: a docstring alone, NotImplementedError or a constant."""
    body = _body(function)
    return not body or (len(body) == 1 and ast.unparse(body[0]).startswith("raise NotImplementedError"))


def _assigned(cls: type) -> set[str]:
    """The attributes that the methods of a class give its instances."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    targets = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {n.attr for n in targets if isinstance(n.value, ast.Name) and n.value.id == "self"}


def _declared(cls: type) -> set[str]:
    """The attributes that a class brings: with a default, or given by its ``__init__``."""
    own = {n for n, v in vars(cls).items() if not n.startswith("__") and _function(v) is None}
    init = vars(cls).get("__init__")
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(init)))) if init is not None else ():
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    return own


@inside
def test_no_two_classes_of_a_request_mean_different_things_by_one_name() -> None:
    methods: dict[str, list[tuple[type, FunctionType]]] = {}
    attributes: dict[str, list[type]] = {}
    for cls in CHAIN:
        for name, value in vars(cls).items():
            function = _function(value)
            if function is not None and not name.startswith("__"):
                methods.setdefault(name, []).append((cls, function))
        for name in _declared(cls):
            attributes.setdefault(name, []).append(cls)
    assert not methods.keys() & attributes.keys()
    assert {name: classes for name, classes in attributes.items() if len(classes) > 1} == {}
    for name, found in methods.items():
        for cls, function in found[1:]:  # it goes on with the one before, or that one is there to be replaced
            before = [f for c, f in found if c is not cls and issubclass(cls, c)]
            goes_on = f"super().{name}(" in inspect.getsource(function)
            assert goes_on or all(map(_stands_for_another, before)), f"{cls.__name__}.{name} hides another"


@inside
def test_every_attribute_of_a_request_has_one_class_that_brings_it() -> None:
    known: set[str] = set()
    for cls in CHAIN:
        known |= _declared(cls) | set(inspect.get_annotations(cls))
        assert not _assigned(cls) - known, cls
        assert not _assigned(cls) & {n for c in CHAIN for n, v in vars(c).items() if _function(v) is not None}, cls


# --- bugs of ours -----------------------------------------------------------------------------------------------------


class Breaks:
    """Who gets an answer and fails on it."""

    def __init__(self) -> None:
        self.lost: list[tuple[str, bool]] = []

    def on_whole(self, answer: Any, body: bytes) -> None:
        raise ValueError("a bug")

    def on_head(self, answer: Any) -> None:
        pass

    def on_piece(self, piece: bytes) -> None:
        pass

    def on_end(self) -> None:
        raise ValueError("a bug")

    def on_lost(self, reason: str, pristine: bool) -> None:
        self.lost.append((reason, pristine))


@pytest.mark.parametrize("framing", [b"content-length: 2\r\n\r\nhi", b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n"])
def test_who_fails_on_an_answer_hears_that_it_is_lost_and_waits_for_nothing(framing: bytes) -> None:
    conn = UpstreamConnection(Target(link.Endpoint("r", "/nowhere")))
    transport = mock.Mock()
    transport.get_write_buffer_size.return_value = 0
    conn.connection_made(transport)
    asker = Breaks()
    conn.begin(asker, b"", (b"",), False)
    with pytest.raises(ValueError, match="a bug"):
        conn.data_received(b"HTTP/1.1 200 OK\r\n" + framing)
    assert [pristine for _, pristine in asker.lost] == [False]
    assert conn.target.take() is None  # the connection is not used again


@inside
def test_a_request_that_fails_after_its_end_cuts_the_connection_and_answers_nothing() -> None:
    relay: Any = Relay.__new__(Relay)
    relay._booked, relay._client = True, mock.Mock()
    relay._fail(Fault(500, "internal", "a bug"))
    relay._client.abort.assert_called_once_with()
    relay._client.send_fault.assert_not_called()


class Fragile:
    """A client's connection on which the second step of an answer fails."""

    def __init__(self, breaks: str) -> None:
        self.done: list[str] = []
        self.breaks = breaks
        self.ended = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        def step(*_: Any, **__: Any) -> None:
            self.done.append(name)
            if name == "abort":
                self.ended.set()
            if name == self.breaks:
                raise ValueError("a bug")

        return step


@pytest.mark.parametrize("breaks", ["send_local", "relay_done"])
@pytest.mark.parametrize("kind", ["local", "upload"])
async def test_a_local_answer_that_breaks_after_it_began_is_cut_off_and_not_followed_by_another(
    kind: str, breaks: str
) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    client: Any = Fragile(breaks)

    async def respond() -> Any:
        return 200, b"application/json", b"{}", ()

    async def exchange() -> Any:
        return 200, b"application/json", b"{}"

    if kind == "local":
        LocalAnswer(client, b"req_1").start(respond())
    else:
        upload = Upload(mock.Mock(), client, mock.Mock(own=False), b"req_1")
        with mock.patch.object(upload, "_exchange", exchange):
            upload.start()
            async with asyncio.timeout(10):
                await client.ended.wait()
    async with asyncio.timeout(10):
        await client.ended.wait()
    assert client.done.count("send_local") == 1
    assert "send_fault" not in client.done
    assert client.done[-1] == "abort"


@inside
def test_a_client_that_leaves_before_the_head_that_was_held_back_had_no_200() -> None:
    relay: Any = Relay.__new__(Relay)
    relay._booked, relay._held, relay.status = True, True, 200
    relay.cancel()
    assert relay.status == 499


@inside
async def test_a_key_whose_limits_go_away_while_its_request_waits_is_granted_it() -> None:
    holder = Holder(link.Key(id="k", mac=""))
    nothing: Any = None
    hold = await holder.wait(nothing, nothing, 0, OPERATIONS["chat"])
    assert holder.open == 1
    hold.settle(mock.Mock())
    assert holder.open == 0


@inside
async def test_a_slot_is_passed_on_though_its_endpoint_has_gone_to_a_route_of_another_name() -> None:
    target = Target(link.Endpoint("r", "/nowhere", slots=1))
    old, new = Lane("old", TrafficSettings()), Lane("new", TrafficSettings())
    old.update((target,))
    assert old.claim() is target
    old.update(())
    new.update((target,))
    never: Any = None
    waits = asyncio.create_task(new.seat(Ticket("k", 1, time.monotonic() + 10), never))
    await asyncio.sleep(0)
    relay: Any = Relay.__new__(Relay)
    relay._services, relay._entry, relay._seat = mock.Mock(), mock.Mock(lane=old), target
    relay.started = time.monotonic()
    target.open = 1
    relay._release(target, True, NOTHING)
    async with asyncio.timeout(5):
        assert await waits is target


# --- a head that went out early ---------------------------------------------------------------------------------------


async def test_an_engine_that_does_not_stream_to_a_client_that_was_promised_events_is_told_as_an_event(
    new_gate: Any, new_engine: Any, chat: dict[str, Any], http: Any
) -> None:
    waits: list[Any] = []
    come, go = asyncio.Event(), asyncio.Event()

    async def answer(call: Any) -> None:
        if json.loads(call.body or b"{}").get("user") == "first":
            come.set()
            await go.wait()
            await call.json({})
        elif call.body:
            waits.append(call)
            await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            await call.send(b'e\r\n{"choices":[]}\r\n0\r\n\r\n')
        else:
            await call.json({})

    gate = await new_gate(traffic={"*": {"notice": 0.05}})
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(msgspec.structs.replace(engine.endpoint, slots=1),)))
    first = await gate.wire()
    await first.send(http("POST", "/v1/chat/completions", chat | {"user": "first"}))
    await come.wait()
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat | {"stream": True}))
    await wire.head()
    chunks = wire.chunks()
    await anext(chunks)
    go.set()
    events = [c async for c in chunks if not c.startswith(b":")]
    assert len(events) == 1
    assert json.loads(events[0].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert (await first.answer()).status == 200
    assert len(waits) == 1
