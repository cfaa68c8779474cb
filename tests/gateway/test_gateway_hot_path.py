"""An ordinary request costs what it did: counted in calls, which no other work on the machine can change."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import hmac
import json
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop

from pierhead.config import GatewaySettings
from pierhead.gateway import link
from pierhead.gateway.server import Gateway, GatewayConfig

CALLS_MAX = 175  # Python functions and built-ins together, with all that a request can meet on
KEY, PEPPER = b"sk-hot", "11" * 32
BODY = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 64, "model": "m"}).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk-hot\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
)
USAGE = {"prompt_tokens": 31, "completion_tokens": 4, "total_tokens": 35}
CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "y" * 100}}
ANSWER_BODY = json.dumps({"id": "c", "object": "chat.completion", "choices": [CHOICE], "usage": USAGE}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(ANSWER_BODY),
    ANSWER_BODY,
)


def engine(listener: socket.socket) -> None:
    """Answer every request the same."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def serve(sock: socket.socket) -> None:
    data = b""
    with sock:
        while got := sock.recv(65536):
            data += got
            if data.endswith(BODY[-20:]):
                sock.sendall(ANSWER)
                data = b""


def ask(sock: socket.socket, times: int) -> None:
    for _ in range(times):
        sock.sendall(REQUEST)
        data = b""
        while not data.endswith(ANSWER_BODY):
            got = sock.recv(65536)
            data += got
            assert got, data
            assert data.startswith(b"HTTP/1.1 200"), data


def config(folder: Path) -> GatewayConfig:
    """A gateway with limits, budgets, slots and a journal."""
    budgets = (link.Budget(10**15), link.Budget(10**15, "usd", "month"))
    grants = link.Grants(rpm=10**9, tpm=10**12, concurrent=1000, budgets=budgets)
    key = link.Key("k", hmac.digest(bytes.fromhex(PEPPER), KEY, hashlib.sha256).hex(), grants=grants)
    endpoint = link.Endpoint(replica="r", socket=str(folder / "engine.sock"), slots=4)
    snapshot = link.Snapshot(
        version=1,
        routes=(link.Route(name="m", endpoints=(endpoint,)),),
        keys=(key,),
        pepper=PEPPER,
        prices=(link.Price("*", 150_000, 600_000),),
    )
    settings = GatewaySettings(listen=("127.0.0.1:0",), require_key=True)
    (folder / "state").mkdir()
    data, state = str(folder / "data.sock"), str(folder / "state")
    return GatewayConfig(settings=settings, socket=data, snapshot=snapshot, state=state)


def measure(folder: Path, count: int, look: Any) -> Any:
    """Serve ``count`` requests over TCP with a key while ``look(True)`` … ``look(False)`` watch this thread."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "engine.sock"))
    listener.listen(4)
    threading.Thread(target=engine, args=(listener,), daemon=True).start()
    gateway = Gateway(config(folder), folder / "admin.sock")
    gateway.open()
    port = int(gateway.addresses[0].rpartition(":")[2])

    async def play() -> None:
        serving = asyncio.create_task(gateway.run())
        await asyncio.sleep(0)
        with socket.create_connection(("127.0.0.1", port), 10) as sock:
            await asyncio.to_thread(ask, sock, 200)  # a budget leases its first slices, connections open
            look(True)
            try:
                await asyncio.to_thread(ask, sock, count)
            finally:
                look(False)
        gateway.drain(0.0)
        await serving

    try:
        uvloop.run(play())
    finally:
        listener.close()


def count(folder: Path, times: int) -> dict[str, float]:
    """How often each function is called for one request, if for every second one at least."""
    seen: collections.Counter[str] = collections.Counter()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            seen[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            seen[getattr(arg, "__qualname__", str(arg))] += 1

    measure(folder, times, lambda on: sys.setprofile(watch if on else None))
    return {name: round(number / times, 1) for name, number in seen.most_common() if number >= times / 2}


async def test_an_ordinary_request_with_everything_on_takes_few_calls_and_no_task(folder):
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, str(folder), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(30):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    often: dict[str, float] = json.loads(said)
    assert sum(often.values()) < CALLS_MAX, often
    assert not any(word in name for name in often for word in ("create_task", "to_thread", "call_soon", "Lock"))


if __name__ == "__main__":
    print(json.dumps(count(Path(sys.argv[1]), 500)))
