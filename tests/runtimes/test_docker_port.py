"""Engines behind a port, for where no socket file crosses: tried on the real Engine, from inside and from outside."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.errors import RuntimeUnavailable
from pierhead.events import AnyEvent, Note, ignore
from pierhead.runtimes import docker_network as network
from pierhead.runtimes.docker import DockerRuntime
from pierhead.runtimes.readiness import healthy, wait_ready

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]

LOOK = """
import json, socket
def attempt(do):
    try:
        do()
        return "done"
    except OSError as exc:
        return type(exc).__name__
def reach(host, port):
    return attempt(lambda: socket.create_connection((host, port), 2).close())
print(json.dumps({
    "out": [reach("192.0.2.1", 80), reach(HOST, 53), reach("8.8.8.8", 53)],
    "names": attempt(lambda: socket.getaddrinfo("example.org", 80)),
    "self": reach("127.0.0.1", 8080),
}))
"""


async def test_an_engine_behind_a_port_serves_on_loopback_alone_and_has_no_way_out(
    docker_settings: RuntimeSettings, replicas: Path, smollm2_spec: LaunchSpec
) -> None:
    runtime = DockerRuntime(replicas / "port", msgspec.structs.replace(docker_settings, docker_transport="port"))
    events: list[AnyEvent] = []
    spec = await runtime.prepare(msgspec.structs.replace(smollm2_spec, replica="port"), events.append)
    assert any("every user of this machine" in e.message for e in events if isinstance(e, Note))
    capabilities = await runtime.capabilities(spec)
    assert "network" not in capabilities.isolation
    instance = await runtime.start(spec)
    try:
        await wait_ready(instance, timeout=60)
        assert instance.socket.startswith("tcp://127.0.0.1:")
        assert await healthy(instance.socket)

        gateway = (await instance.exec(("python3", "-c", GATEWAY))).stdout.decode().strip()
        found = json.loads((await instance.exec(("python3", "-c", LOOK.replace("HOST", repr(gateway))))).stdout)
        assert found["self"] == "done"
        assert "done" not in found["out"]
        assert found["names"] != "done"

        other = DockerRuntime(replicas / "port", msgspec.structs.replace(docker_settings, docker_transport="port"))
        taken = await other.adopt("port")
        assert taken is not None
        assert taken.socket == instance.socket
        await taken.stop(0)
        await other.close()
        assert (await asyncio.wait_for(instance.wait(), 20)).code == 137
        assert not await healthy(instance.socket, timeout=2)
    finally:
        await instance.stop(0)
        await runtime.close()


GATEWAY = """
import socket
for line in open("/proc/net/route").read().splitlines()[1:]:
    name, target, gateway = line.split()[:3]
    if target == "00000000":
        print(socket.inet_ntoa(int(gateway, 16).to_bytes(4, "little")))
"""


async def test_a_network_that_somebody_else_made_is_not_used(
    docker_settings: RuntimeSettings, replicas: Path, smollm2_spec: LaunchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "NAME", "pierhead-test-foreign")
    runtime = DockerRuntime(replicas / "foreign", msgspec.structs.replace(docker_settings, docker_transport="port"))
    spec = await runtime.prepare(msgspec.structs.replace(smollm2_spec, replica="foreign"), ignore)
    docker = (await runtime.images())._engine.docker
    made = await docker.networks.create({"Name": "pierhead-test-foreign", "Driver": "bridge"})
    try:
        with pytest.raises(RuntimeUnavailable, match="not one that Pierhead made"):
            await runtime.start(spec)
        assert await runtime.list() == []
    finally:
        await made.delete()
        await runtime.close()


def test_only_a_binding_on_loopback_is_an_address() -> None:
    assert network.address({"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": "4000"}]}) == "tcp://127.0.0.1:4000"
    for ports in ({}, {"8080/tcp": None}, {"8080/tcp": [{"HostIp": "0.0.0.0", "HostPort": "4000"}]}):
        assert network.address(ports) == ""
