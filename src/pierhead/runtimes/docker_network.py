"""The network of engines that are reached by a port: published on loopback, and without a way out."""

from __future__ import annotations

from typing import Any

from pierhead.errors import RuntimeUnavailable
from pierhead.runtimes.docker_api import Engine, Refused
from pierhead.runtimes.docker_config import LABEL, PORT

NAME = "pierhead-engines"
# Docker publishes no port on an ``internal`` network. Without masquerading no answer finds the way back in.
OPTIONS = {
    "com.docker.network.bridge.enable_ip_masquerade": "false",
    "com.docker.network.bridge.enable_icc": "false",
    "com.docker.network.bridge.host_binding_ipv4": "127.0.0.1",
}


async def ensure(engine: Engine) -> str:
    """The network's name; it is made when it is not there. RuntimeUnavailable when somebody else's has its name."""
    found = await _inspect(engine)
    if found is None:
        body = {"Name": NAME, "Driver": "bridge", "Options": OPTIONS, "Labels": {LABEL: "network"}}
        try:
            with engine.refusals("make a network without a way out", passing=(409,)):
                await engine.docker.networks.create({**body, "CheckDuplicate": True})
        except Refused:
            pass  # somebody was faster
        found = await _inspect(engine)
    options: dict[str, str] = (found or {}).get("Options") or {}
    if any(options.get(name) != value for name, value in OPTIONS.items()):
        raise RuntimeUnavailable(
            f"the Docker network {NAME} is not one that Pierhead made", hint=f"Remove it: docker network rm {NAME}"
        )
    return NAME


async def _inspect(engine: Engine) -> dict[str, Any] | None:
    try:
        with engine.refusals("look for a network", passing=(404,)):
            async with engine.request("GET", f"networks/{NAME}") as answer:
                return await answer.json(content_type=None)
    except Refused:
        return None


def address(ports: dict[str, Any]) -> str:
    """``tcp://host:port`` from a container's ``NetworkSettings.Ports``; "" where nothing is published."""
    for binding in ports.get(f"{PORT}/tcp") or ():
        if binding.get("HostIp") == "127.0.0.1" and binding.get("HostPort"):
            return f"tcp://127.0.0.1:{binding['HostPort']}"
    return ""
