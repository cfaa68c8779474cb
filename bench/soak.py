"""Memory of the gateway over a million requests of every kind: ``rss_growth`` is end over warm, minus one.

A real gateway process with keys (limits, budgets in tokens and money), slots, queues, the usage journal and metrics; a
scripted engine in a process of its own; clients here. Most requests are whole answers, the others stream, fail in the
engine, are cut off by it, are left by the client, name no model or are no JSON. Connections are renewed, prompts never
repeat, and now and then a new snapshot takes a model and keys away and brings others.

Warm-up is the first tenth, and 20,000 requests at least (half of a shorter run): until then pools, memos and the
allocator's arenas fill up, and the index of prompts, which holds at most 8,192 blocks of 256 bytes a replica. After it
the resident memory is read, and again at the end, both times after the load has stopped. ``--quick``: 40,000 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from harness import machine
from pierhead.gateway import link

PEPPER = "22" * 32
MODELS, KEYS = 4, 50
KINDS = ("whole",) * 80 + ("stream",) * 10 + ("error",) * 3 + ("cut",) * 2 + ("leave",) * 3 + ("unknown", "broken")
USAGE = {"prompt_tokens": 31, "completion_tokens": 4, "total_tokens": 35}
WHOLE = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "y" * 100}}],
        "usage": USAGE,
    }
).encode()
CHUNK = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"yyyy"}}]}\n\n'
LAST = b'data: {"id":"c","choices":[],"usage":%b}\n\ndata: [DONE]\n\n' % json.dumps(USAGE).encode()


def head(status: int, rest: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n%b\r\n" % (status, rest)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    b"whole": [head(200, b"Content-Length: %d\r\n" % len(WHOLE)) + WHOLE],
    b"stream": [SSE + chunk(CHUNK), chunk(CHUNK), chunk(CHUNK), chunk(LAST) + b"0\r\n\r\n"],
    b"error": [head(500, b"Content-Length: 27\r\n") + b'{"error":{"message":"no!"}}'],
    b"cut": [SSE + chunk(CHUNK) + b"ff\r\ndata: "],
    b"leave": [SSE + chunk(CHUNK)],
}


class Engine(asyncio.Protocol):
    """Answers as a word in the prompt says; one write a turn, as engines do."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        if b"\r\n\r\n" in self.data and (self.data.endswith(b"}") or self.data.startswith(b"GET")):
            kind = self.data.partition(b"kind=")[2].partition(b" ")[0]
            self.data = b""
            self.play(kind, list(ANSWERS.get(kind, ANSWERS[b"error"])))

    def play(self, kind: bytes, pieces: list[bytes]) -> None:
        self.transport.write(pieces.pop(0))
        if pieces:
            asyncio.get_running_loop().call_soon(self.play, kind, pieces)
        elif kind == b"cut":
            self.transport.abort()


async def serve_engine(path: str) -> None:
    server = await asyncio.get_running_loop().create_unix_server(Engine, path)
    print("ready", flush=True)
    await server.serve_forever()


class World:
    """Which models and keys there are now; each change replaces a few by ones that never were."""

    def __init__(self, engine: str) -> None:
        self.engine, self.version, self.made = engine, 0, 0
        self.models = [self.new("model") for _ in range(MODELS)]
        self.keys = [self.new("key") for _ in range(KEYS)]

    def new(self, what: str) -> str:
        self.made += 1
        return f"{what}-{self.made}"

    def change(self) -> None:
        del self.models[:1], self.keys[:5]
        self.models.append(self.new("model"))
        self.keys += [self.new("key") for _ in range(5)]

    def endpoints(self, model: str) -> tuple[link.Endpoint, ...]:
        return tuple(link.Endpoint(replica=f"{model}-{n}", socket=self.engine, slots=16) for n in range(2))

    def snapshot(self) -> link.Snapshot:
        self.version += 1
        budgets = (link.Budget(10**15), link.Budget(10**15, "usd", "month"))
        grants = link.Grants(rpm=10**8, tpm=10**11, concurrent=10**4, budgets=budgets)
        return link.Snapshot(
            version=self.version,
            pepper=PEPPER,
            keys=tuple(link.Key(k, mac(k), grants=grants) for k in self.keys),
            routes=tuple(link.Route(name=m, endpoints=self.endpoints(m)) for m in self.models),
            prices=(link.Price("*", 150_000, 600_000),),
        )


def mac(key: str) -> str:
    return hmac.digest(bytes.fromhex(PEPPER), f"sk-{key}".encode(), hashlib.sha256).hex()


class Client:
    """One after another on a connection that is renewed now and then; ``left`` is shared by all."""

    def __init__(self, port: int, world: World, dice: random.Random, left: list[int], seen: dict[str, int]) -> None:
        self.port, self.world, self.dice, self.left, self.seen = port, world, dice, left, seen

    async def run(self) -> None:
        while self.left[0] > 0:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                for _ in range(self.dice.randrange(20, 400)):
                    if self.left[0] <= 0 or not await self.one(reader, writer):
                        break
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.transport.abort()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        self.left[0] -= 1
        kind = self.dice.choice(KINDS)
        writer.write(self.request(kind))
        raw = await reader.readuntil(b"\r\n\r\n")
        status = raw[9:12].decode()
        self.seen[f"{kind} {status}"] = self.seen.get(f"{kind} {status}", 0) + 1
        if kind == "leave" and status == "200":
            return False
        if b"content-length:" in raw:
            await reader.readexactly(int(raw.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        elif b"chunked" in raw:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                await reader.readexactly(size + 2)
            await reader.readexactly(2)
        return b"connection: close" not in raw

    def request(self, kind: str) -> bytes:
        dice = self.dice
        model = dice.choice(self.world.models) if kind != "unknown" else f"none-{dice.randrange(1 << 40)}"
        text = f"kind={kind} {dice.getrandbits(800):x} " + "word " * dice.randrange(10, 300)
        body: Any = {"messages": [{"role": "user", "content": text}], "max_tokens": 64, "model": model}
        if kind in ("stream", "cut", "leave"):
            body["stream"] = True
        data = json.dumps(body).encode() if kind != "broken" else b'{"model": ' + os.urandom(20)
        key = dice.choice(self.world.keys)
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer sk-%b\r\nContent-Length: %d\r\n\r\n%b" % (key.encode(), len(data), data)
        )


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Link:
    """The daemon's end, as far as the gateway needs one: it names an endpoint of a model that is asked for."""

    async def open(self, admin: Path, world: World) -> None:
        self.world = world
        reader, self.writer = await asyncio.open_unix_connection(str(admin), limit=1 << 24)
        self.drain = asyncio.create_task(self.listen(reader))

    async def listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = msgspec.json.decode(line, type=link.ToDaemon)
            if isinstance(message, link.EnsureReady):
                if message.model in self.world.models:
                    self.say(link.StartResult(id=message.id, endpoint=self.world.endpoints(message.model)[0]))
                else:
                    error = {"code": "model_not_found", "message": "it is gone", "http_status": 404}
                    self.say(link.StartResult(id=message.id, error=error))

    def say(self, message: Any) -> None:
        self.writer.write(msgspec.json.encode(message) + b"\n")


async def load(port: int, world: World, daemon: Link, count: int, seen: dict[str, int], args: Any) -> None:
    """``count`` requests, then wait until the gateway is at rest."""
    left = [count]
    dice = random.Random(world.version)
    step, mark = args.change, count
    clients = [
        asyncio.create_task(Client(port, world, random.Random(dice.random()), left, seen).run())
        for _ in range(args.clients)
    ]
    while left[0] > 0:
        await asyncio.sleep(0.05)
        if mark - left[0] >= step:
            mark = left[0]
            world.change()
            daemon.say(world.snapshot())
    await asyncio.gather(*clients)
    await asyncio.sleep(2)  # deadlines of what was cut, reports, journals


async def soak(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    engine = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--engine", str(folder / "engine.sock"), stdout=asyncio.subprocess.PIPE
    )
    assert engine.stdout is not None
    await engine.stdout.readline()
    world = World(str(folder / "engine.sock"))
    (folder / "state").mkdir()
    settings = {"listen": ["127.0.0.1:0"], "require_key": True}
    config = {"settings": settings, "snapshot": world.snapshot(), "state": str(folder / "state")}
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pierhead.gateway", "--admin", str(folder / "admin.sock"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert gateway.stdin is not None
    assert gateway.stdout is not None
    gateway.stdin.write(msgspec.json.encode(config))
    gateway.stdin.close()
    port = int(json.loads(await gateway.stdout.readline())["listening"][0].rpartition(":")[2])
    seen: dict[str, int] = {}
    try:
        daemon = Link()
        await daemon.open(folder / "admin.sock", world)
        curve: list[float] = []
        begun = time.monotonic()
        first = max(args.requests // 10, min(20_000, args.requests // 2))
        await load(port, world, daemon, first, seen, args)
        warm = resident(gateway.pid)
        for _ in range(9):
            await load(port, world, daemon, (args.requests - first) // 9, seen, args)
            curve.append(round(resident(gateway.pid) / 2**20, 2))
            if args.verbose:
                print(curve[-1], file=sys.stderr)
        end = resident(gateway.pid)
        out: dict[str, Any] = {"rss_growth": round(end / warm - 1, 4), "rss_warm_mb": round(warm / 2**20, 2)}
        out |= {"rss_end_mb": round(end / 2**20, 2), "requests": sum(seen.values())}
        out |= {"requests_per_s": round(sum(seen.values()) / (time.monotonic() - begun))}
        out["curve_mb"], out["seen"] = curve, dict(sorted(seen.items()))
        daemon.drain.cancel()
        return out
    finally:
        for process in (gateway, engine):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--change", type=int, default=25_000, help="requests between two snapshots")
    parser.add_argument("--quick", action="store_true", help="40,000 requests, under a minute on an idle machine")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        uvloop.run(serve_engine(args.engine))
        return
    if args.quick:
        args.requests, args.change = 40_000, 5_000
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as name:
        out = uvloop.run(soak(Path(name), args))
    if args.json:
        print(json.dumps({k: v for k, v in out.items() if isinstance(v, int | float)}))
        return
    print(machine())
    for name, value in out.items():
        print(f"{name:<16}{value}")


if __name__ == "__main__":
    main()
