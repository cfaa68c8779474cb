"""The way to a Docker Engine (or Podman's service): finding it, asking it, and its refusals as errors of ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import AccessDenied, OutOfSpace, PierError, RuntimeUnavailable

OLDEST_API = (1, 41)
STALL = 300.0  # seconds without a byte before a pull or build counts as dead
FRAME_LIMIT = 1 << 20
GROUP_HINT = "Join its group (`sudo usermod -aG docker $USER`, then log in anew) or use rootless Docker."


class Refused(Exception):
    """The Engine's answer with an error status; ``status`` 0 when it said so inside a progress stream."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def candidates(configured: str, env: Mapping[str, str]) -> list[str]:
    """Addresses to try, the user's own wish alone when there is one."""
    if configured or env.get("DOCKER_HOST"):
        return [configured or env["DOCKER_HOST"]]
    run = env.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    home = env.get("HOME") or "/"
    places = ["/var/run/docker.sock", f"{run}/docker.sock", f"{home}/.docker/run/docker.sock"]
    places += [f"{run}/podman/podman.sock", "/run/podman/podman.sock"]
    return [f"unix://{p}" for p in places if os.path.exists(p)]  # not in a folder closed to us


def find(configured: str, env: Mapping[str, str] | None = None) -> str:
    """The address of the Engine; RuntimeUnavailable when there is none, AccessDenied when it is not for this user."""
    denied = ""
    for host in candidates(configured, os.environ if env is None else env):
        if not host.startswith("unix://"):
            raise RuntimeUnavailable(
                f"the Docker Engine at {host} cannot share a unix socket with this machine",
                hint="Only an Engine on this machine, reached through its unix socket, is supported so far.",
            )
        path = host.removeprefix("unix://")
        if os.access(path, os.R_OK | os.W_OK):
            return host
        if _there(path):
            denied = path
        elif configured:
            raise RuntimeUnavailable(
                f"there is no Docker Engine at {path}", hint="Start it, or correct [runtime] docker_host."
            )
    if denied:
        raise AccessDenied(f"the Docker Engine at {denied} is not for this user", hint=GROUP_HINT)
    raise RuntimeUnavailable(
        "no Docker Engine's socket is here", hint="Start Docker or Podman's service, or set [runtime] docker_host."
    )


def _there(path: str) -> bool:
    """Whether something is at ``path``, as far as this user may know; a folder that is closed to him may hold it."""
    try:
        Path(path).stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def explain(refused: Refused, doing: str) -> PierError:
    """``refused`` as an error for people; ``doing`` says what was tried ("start the container")."""
    text = f"Docker could not {doing}: {refused.message.strip()[:2000]}"
    if "no space left on device" in refused.message:
        return OutOfSpace(text, hint="Make room in Docker's data folder, for example with `docker system prune`.")
    if refused.status in (401, 403):
        return AccessDenied(text, hint=GROUP_HINT)
    return RuntimeUnavailable(text, hint="See the Docker Engine's own log (`journalctl -u docker`).")


class Engine:
    """One connection pool to one Engine. ``docker`` is aiodocker's client, for what that offers."""

    def __init__(self, host: str) -> None:
        import aiodocker  # a quarter second: only once it is needed
        import aiohttp

        self.path = host.removeprefix("unix://")
        self._aiohttp = aiohttp
        self.connection_error: type[Exception] = aiohttp.ClientError
        self.docker_error: type[Exception] = aiodocker.DockerError
        connector = aiohttp.UnixConnector(self.path, limit=0)  # every running container holds one, waiting
        self.docker: Any = aiodocker.Docker(
            "unix://localhost",
            connector=connector,
            session=aiohttp.ClientSession(connector=connector),
        )
        self.info: dict[str, Any] = {}
        self.api = ""

    async def open(self) -> None:
        """Agree on an API version and learn what the Engine can do."""
        with self.refusals("be reached"):
            version: dict[str, Any] = await self.docker.version()
            self.api = str(version.get("ApiVersion", "0"))
            if tuple(int(p) for p in self.api.split(".")) < OLDEST_API:
                raise RuntimeUnavailable(
                    f"the Docker Engine speaks API {self.api}, which is too old",
                    hint="Docker Engine 20.10 (API 1.41) or newer is needed.",
                )
            self.info = await self.docker.system.info()

    async def ping(self) -> None:
        """RuntimeUnavailable when the Engine has gone away."""
        with self.refusals("be reached"):
            async with self.request("GET", "_ping") as answer:
                await answer.read()

    async def close(self) -> None:
        """Close every connection."""
        await self.docker.close()
        await self.docker.session.close()

    def option(self, name: str) -> bool:
        """Whether the Engine reports a security option such as ``rootless``, ``userns`` or ``seccomp``."""
        options: list[str] = self.info.get("SecurityOptions") or []
        return any(o == f"name={name}" or o.startswith(f"name={name},") for o in options)

    @contextlib.contextmanager
    def refusals(self, doing: str, *, passing: tuple[int, ...] = ()) -> Generator[None]:
        """Turn what aiodocker, aiohttp and ``request`` raise into our errors; ``Refused`` passes for some statuses."""
        try:
            yield
        except Refused as exc:
            if exc.status in passing:
                raise
            raise explain(exc, doing) from exc
        except self.docker_error as exc:
            refused = Refused(int(getattr(exc, "status", 0)), str(getattr(exc, "message", exc)))
            if refused.status in passing:
                raise refused from exc
            raise explain(refused, doing) from exc
        except TimeoutError:  # the caller's own deadline, though an OSError by birth
            raise
        except (self.connection_error, OSError) as exc:
            raise RuntimeUnavailable(
                f"the Docker Engine at {self.path} does not answer ({exc})", hint="Start it, then try again."
            ) from exc

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Any]:
        """One request that aiodocker has no (or only a blunt) call for; ``Refused`` for an error status."""
        timeout = self._aiohttp.ClientTimeout(total=None, sock_read=None)
        url = f"{self.docker.docker_host}/v{self.api}/{path}"
        async with self.docker.session.request(
            method, url, params=params, data=data, headers=headers, timeout=timeout
        ) as answer:
            if answer.status >= 400:
                body = await answer.content.read(1 << 16)
                with contextlib.suppress(msgspec.DecodeError, ValueError, TypeError, KeyError):
                    body = str(msgspec.json.decode(body)["message"]).encode()
                raise Refused(answer.status, body.decode("utf-8", "replace"))
            yield answer

    async def progress(
        self,
        path: str,
        params: Mapping[str, str],
        data: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """The JSON lines of a pull or build; ``Refused`` for the failure that it may end with."""
        async with self.request("POST", path, params, data, headers) as answer:
            while True:
                async with asyncio.timeout(STALL):
                    line: bytes = await answer.content.readline()
                if not line:
                    return
                item = msgspec.json.decode(line, type=dict[str, Any])
                if "error" in item:
                    raise Refused(0, str(item["error"]))
                yield item


async def frames(content: Any) -> AsyncIterator[tuple[int, bytes]]:
    """The parts of a multiplexed stream: 1 for standard output or 2 for error, and the bytes (bounded in size)."""
    while True:
        try:
            stream, length = struct.unpack(">BxxxL", await content.readexactly(8))
        except asyncio.IncompleteReadError:
            return
        while length:
            part: bytes = await content.read(min(length, FRAME_LIMIT))
            if not part:
                return
            length -= len(part)
            yield stream, part
