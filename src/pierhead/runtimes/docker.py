"""The docker runtime: each replica a hardened container without network; Podman's service speaks the same API."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path
from typing import Any

import msgspec

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.errors import PierError, RuntimeUnavailable
from pierhead.events import BuildProgress, Listener, Note
from pierhead.runtimes import devices
from pierhead.runtimes import docker_config as config
from pierhead.runtimes import docker_folder as folders
from pierhead.runtimes import docker_network as network
from pierhead.runtimes.base import Capabilities
from pierhead.runtimes.docker_api import Engine, find
from pierhead.runtimes.docker_image import Images
from pierhead.runtimes.docker_instance import DockerInstance
from pierhead.runtimes.job import OUTPUT
from pierhead.runtimes.readiness import Notify

NPROC = 16384  # per user of this machine; what one container may have is bounded by its cgroup
BY_PORT = (
    "The engine is reached by a port on loopback, which every user of this machine can use: "
    "its unix socket cannot leave Docker's virtual machine."
)
ALWAYS = ("network", "filesystem", "processes", "capabilities", "user")


class DockerRuntime:
    """Starts engines as containers; ``replicas_dir`` holds the folders that they share with the gateway."""

    def __init__(self, replicas_dir: Path, settings: RuntimeSettings) -> None:
        self._root = replicas_dir
        self._settings = settings
        self._home = config.home_label(replicas_dir)
        self._engine: Engine | None = None
        self._opening = asyncio.Lock()

    async def _open(self) -> Engine:
        async with self._opening:
            if self._engine is None:
                host = find(self._settings.docker_host)
                await asyncio.to_thread(_import_client)
                engine = Engine(host)
                try:
                    await engine.open()
                except BaseException:
                    await engine.close()
                    raise
                self._engine = engine
            return self._engine

    async def close(self) -> None:
        """Let go of the Engine; containers go on."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    def _images(self, engine: Engine) -> Images:
        return Images(engine, self._settings, self._root)

    async def images(self) -> Images:
        """The engine images of this Engine."""
        return self._images(await self._open())

    # --- what works here --------------------------------------------------------------------------------------------

    async def capabilities(self, spec: LaunchSpec | None = None) -> Capabilities:
        """See ``Runtime.capabilities``."""
        try:
            engine = await self._open()
            await engine.ping()
            prepared = spec is None or await self._image(engine, spec) is not None
        except PierError as exc:
            missing = (exc.hint,) if exc.hint else ()
            return Capabilities(name="docker", available=False, reason=exc.message, missing=missing)
        isolation, missing = _isolation(engine)
        if self._by_port(engine):
            isolation, missing = tuple(i for i in isolation if i != "network"), (*missing, BY_PORT)
        version = str(engine.info.get("ServerVersion", ""))
        return Capabilities(
            name="docker", available=True, isolation=isolation, missing=missing, version=version, prepared=prepared
        )

    async def _image(self, engine: Engine, spec: LaunchSpec) -> str | None:
        """The id of the image that ``spec`` needs, if it is here."""
        images = self._images(engine)
        if spec.image_name:
            return await images.find(spec.image_name)
        return await images.of(spec.image) if spec.image else None

    async def prepare(self, spec: LaunchSpec, listener: Listener) -> LaunchSpec:
        """Build or pull the image; the spec then names it by its id."""
        engine = await self._open()
        images = self._images(engine)
        if self._by_port(engine):
            listener(Note(message=BY_PORT))
        if spec.image_name:

            def report(step: str, done: int, total: int) -> None:
                listener(BuildProgress(image=spec.image_name, step=step, done=done, total=total))

            found = await images.base(spec.image_name, report)
        elif spec.image is not None:
            with devices.wanting(spec.devices):
                found = await images.ensure(spec.image, listener)
        else:
            raise RuntimeUnavailable(
                f"the engine '{spec.engine}' has no container image", hint="Use `--runtime process` for it."
            )
        return msgspec.structs.replace(spec, image_name=found)

    # --- start and adopt --------------------------------------------------------------------------------------------

    async def start(self, spec: LaunchSpec) -> DockerInstance:
        """See ``Runtime.start``."""
        engine = await self._open()
        image = await self._image(engine, spec)
        if image is None:
            raise RuntimeUnavailable(
                f"the container image of '{spec.model}' is not here", hint="Start it again: the image is built first."
            )
        spec = msgspec.structs.replace(spec, image_name=image)
        user = _user(engine)
        folder = self._root / spec.replica
        await self._replace(engine, spec.replica)
        await asyncio.to_thread(folders.make, folder, user.uid, user.gid)
        if spec.kind == "job":
            await asyncio.to_thread(folders.make_output, folder / OUTPUT, user.uid, user.gid)
        notify: Notify | None = None
        try:
            notify = Notify(folder / folders.NAME)
            encoded = msgspec.json.encode(spec)
            (folder / "spec.json").write_bytes(encoded)
            tags = config.labels(spec, self._home, config.spec_digest(encoded))
            fitted = msgspec.structs.replace(spec, ulimits={**_ulimits(engine), **spec.ulimits})
            by_port = self._by_port(engine)
            net = await network.ensure(engine) if by_port else ""
            body = config.create_request(fitted, self._settings, user, folder / folders.NAME, tags, net)
            container = await self._run(engine, body, config.container_name(spec.replica, self._home))
            if not by_port:
                return DockerInstance(engine, spec, container, folder, notify)
            notify.close()
            return DockerInstance(engine, spec, container, folder, None, await self._published(engine, container))
        except BaseException:
            if notify is not None:
                notify.close()
            await asyncio.to_thread(folders.remove, folder)
            raise

    async def _run(self, engine: Engine, body: dict[str, Any], name: str) -> str:
        """Create and start; nothing is left when that fails. Returns the container's id."""
        with engine.refusals("start the container"):
            try:
                made = await engine.docker.containers.create(body, name=name)
            except engine.docker_error as exc:
                if "init binary not found" not in str(exc):  # Podman without catatonit: the engine is process 1 itself
                    raise
                body = {**body, "HostConfig": {**body["HostConfig"], "Init": False}}
                made = await engine.docker.containers.create(body, name=name)
            try:
                await made.start()
            except BaseException:
                await asyncio.shield(made.delete(force=True, v=True))
                raise
            return str(made.id)

    def _by_port(self, engine: Engine) -> bool:
        """Whether containers are reached by a port instead of a socket file."""
        desktop = "Docker Desktop" in str(engine.info.get("OperatingSystem", ""))
        return self._settings.docker_transport == "port" or (desktop and self._settings.docker_transport == "auto")

    async def _published(self, engine: Engine, container: str) -> str:
        """Where a started container is reached; it is removed when it cannot be."""
        made: Any = engine.docker.containers.container(container)
        try:
            with engine.refusals("look at the container"):
                shown: dict[str, Any] = await made.show()
            ports: dict[str, Any] = shown["NetworkSettings"].get("Ports") or {}
            found = network.address(ports)
            if found or not shown["State"].get("Running"):  # one that has ended already says why itself
                return found or "tcp://127.0.0.1:0"
            raise RuntimeUnavailable(
                "Docker published no port for the container", hint="`--runtime process` needs none."
            )
        except BaseException:
            with engine.refusals("remove the container"):
                await asyncio.shield(made.delete(force=True, v=True))
            raise

    async def _replace(self, engine: Engine, replica: str) -> None:
        """Remove an ended container of ours that still has the name."""
        for found in await self._ours(engine, f"{config.LABEL}.replica={replica}"):
            if found["State"] != "running":
                with engine.refusals("remove an old container"):
                    await engine.docker.containers.container(found["Id"]).delete(force=True, v=True)

    async def _ours(self, engine: Engine, *more: str) -> list[dict[str, Any]]:
        tags = [f"{config.LABEL}.home={self._home}", *more]
        filters = msgspec.json.encode({"label": tags}).decode()
        with engine.refusals("list containers"):
            async with engine.request("GET", "containers/json", {"all": "1", "filters": filters}) as answer:
                return await answer.json(content_type=None)

    async def list(self) -> list[str]:
        """See ``Runtime.list``; nothing when no Engine is here."""
        try:
            engine = await self._open()
            found = await self._ours(engine)
        except PierError:
            return []
        return sorted({str(c["Labels"][f"{config.LABEL}.replica"]) for c in found})

    async def adopt(self, replica: str) -> DockerInstance | None:
        """See ``Runtime.adopt``; what carries our label but cannot be gone on with is removed."""
        engine = await self._open()
        taken: DockerInstance | None = None
        for found in await self._ours(engine, f"{config.LABEL}.replica={replica}"):
            folder = self._root / replica
            spec = self._provable(found, folder)
            if spec is not None and taken is None:
                ports = {f"{p['PrivatePort']}/{p['Type']}": [_binding(p)] for p in found.get("Ports") or ()}
                taken = DockerInstance(engine, spec, str(found["Id"]), folder, None, network.address(ports))
                continue
            with engine.refusals("remove an old container"):
                await engine.docker.containers.container(found["Id"]).delete(force=True, v=True)
            if taken is None:
                await asyncio.to_thread(folders.remove, folder)
        return taken

    def _provable(self, found: dict[str, Any], folder: Path) -> LaunchSpec | None:
        """The spec of a running container, if the folder, the label and the image all say the same."""
        if found["State"] != "running" or not (folder / folders.NAME).is_dir():
            return None
        try:
            encoded = (folder / "spec.json").read_bytes()
            spec = msgspec.json.decode(encoded, type=LaunchSpec)
        except (OSError, msgspec.DecodeError):
            return None
        same = found["Labels"].get(f"{config.LABEL}.spec") == config.spec_digest(encoded)
        return spec if same and found["ImageID"] == spec.image_name else None


def _import_client() -> None:
    """Import the client library off the loop: it takes a quarter second."""
    import aiodocker  # noqa: F401  # pyright: ignore[reportUnusedImport]


def _binding(port: dict[str, Any]) -> dict[str, str]:
    """A line of the container list's ``Ports`` as inspecting the container shows it."""
    return {"HostIp": str(port.get("IP", "")), "HostPort": str(port.get("PublicPort", ""))}


def _user(engine: Engine) -> config.User:
    """A user that is not root inside and whom this process can share a folder with."""
    uid, gid = os.geteuid(), os.getegid()
    if engine.option("rootless"):  # inside, root is this very user; Podman can also keep the number
        if _podman(engine) and uid != 0:
            return config.User(f"{uid}:{gid}", uid, gid, "keep-id")
        return config.User("0:0", uid, gid)
    if uid != 0:
        return config.User(f"{uid}:{gid}", uid, gid, "host" if engine.option("userns") else "")
    inside = f"{folders.UID}:{folders.UID}"
    shift, shift_gid = _remapped(engine)
    return config.User(inside, shift + folders.UID, shift_gid + folders.UID)


def _remapped(engine: Engine) -> tuple[int, int]:
    """Where the container's users begin on this machine; Docker names its data folder after it."""
    if not engine.option("userns"):
        return 0, 0
    uid, _, gid = Path(str(engine.info.get("DockerRootDir", ""))).name.partition(".")
    return (int(uid), int(gid)) if uid.isdigit() and gid.isdigit() else (0, 0)


def _podman(engine: Engine) -> bool:
    return "podman" in str(engine.info.get("InitBinary", "")) or engine.info.get("ProductLicense") == "Apache-2.0"


def _ulimits(engine: Engine) -> dict[str, int]:
    """Podman gives each container more processes than it may itself have where it lacks CAP_SYS_RESOURCE."""
    if not _podman(engine):
        return {}
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    return {"nproc": NPROC if most == resource.RLIM_INFINITY else min(NPROC, most)}


def _isolation(engine: Engine) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What holds, and in full sentences what does not."""
    holds, missing = list[str](ALWAYS), list[str]()
    for name, field, words in (
        ("memory", "MemoryLimit", "The Docker Engine cannot limit memory here."),
        ("pids", "PidsLimit", "The Docker Engine cannot limit the number of processes here."),
        ("cpu", "CpuCfsQuota", "The Docker Engine cannot limit CPU time here."),
    ):
        if engine.info.get(field, True):
            holds.append(name)
        else:
            missing.append(words)
    if engine.option("seccomp"):
        holds.append("seccomp")
    else:
        missing.append("The Docker Engine filters no system calls (it was built or started without seccomp).")
    if engine.option("rootless") and not _podman(engine):
        missing.append("Rootless Docker: inside the container the user is root of the user namespace (you, outside).")
    return tuple(holds), tuple(missing)
