"""What a container is allowed: the launch spec as Docker's create request; pure."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.runtimes.base import NOBODY, Places, expand
from pierhead.runtimes.job import OUTPUT

LABEL = "ai.pierhead"
MODELS = "/models"
SOCKETS = "/run/pierhead"
TMP_SIZE = 64 << 20
SHM_SIZE = 16 << 20
NOFILE = 4096
PORT = 8080  # inside, where an engine listens that no socket file can reach
PLACES = Places(
    "python3",
    "/opt/engine/site",
    MODELS,
    f"{SOCKETS}/engine.sock",
    "/opt/engine/bridge.py",
    built="/built",
    output="/output",
)


class User(msgspec.Struct, frozen=True):
    """Who the container runs as, inside, and which user of this machine that is."""

    inside: str  # UID:GID
    uid: int
    gid: int
    userns: str = ""


def home_label(replicas_dir: Path) -> str:
    """Tells the containers of one installation from those of another on the same Engine."""
    return hashlib.sha256(str(replicas_dir.absolute()).encode()).hexdigest()[:16]


def spec_digest(encoded: bytes) -> str:
    return hashlib.sha256(encoded).hexdigest()


def container_name(replica: str, home: str) -> str:
    return f"pierhead-{replica}-{home[:4]}"


def labels(spec: LaunchSpec, home: str, digest: str) -> dict[str, str]:
    """Ours come last: a spec's own labels cannot pretend to be them."""
    return {
        **spec.labels,
        f"{LABEL}.home": home,
        f"{LABEL}.replica": spec.replica,
        f"{LABEL}.model": spec.model,
        f"{LABEL}.engine": spec.engine,
        f"{LABEL}.spec": digest,
    }


def create_request(
    spec: LaunchSpec, settings: RuntimeSettings, user: User, sockets: Path, tags: dict[str, str], network: str = ""
) -> dict[str, Any]:
    """The body of ``POST /containers/create``; with a ``network`` the engine listens on a port instead of a socket."""
    places = PLACES if not network else msgspec.structs.replace(PLACES, socket=f"0.0.0.0:{PORT}")
    argv, env = expand(spec, places)
    variables = {**NOBODY, **env}
    return {
        "Image": spec.image_name,
        "Entrypoint": list(argv[:1]),
        "Cmd": list(argv[1:]),
        "Env": [f"{name}={value}" for name, value in variables.items()],
        "User": spec.user or user.inside,
        "WorkingDir": "/",
        "Hostname": "engine",
        "Labels": tags,
        "NetworkDisabled": not network,
        "ExposedPorts": {f"{PORT}/tcp": {}} if network else {},
        "StopSignal": "SIGTERM",
        "StopTimeout": max(1, round(spec.stop_timeout)),
        "Tty": False,
        "OpenStdin": spec.stdio,
        "StdinOnce": spec.stdio,
        "AttachStdin": spec.stdio,
        "AttachStdout": spec.stdio,
        "AttachStderr": spec.stdio,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": _host(spec, settings, user, sockets)
        if not network
        else _published(_host(spec, settings, user, None), network),
    }


def _host(spec: LaunchSpec, settings: RuntimeSettings, user: User, sockets: Path | None) -> dict[str, Any]:
    ulimits = {"core": 0, "nofile": NOFILE, **spec.ulimits}
    host: dict[str, Any] = {
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],  # seccomp and AppArmor stay at the Engine's default profiles
        "Privileged": False,
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "PidsLimit": spec.limits.pids or settings.pids,
        "Init": True,
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}},
        "Tmpfs": {"/tmp": f"rw,noexec,nosuid,nodev,size={spec.tmp_size or TMP_SIZE},mode=1777"},  # noqa: S108
        "ShmSize": spec.shm_size or SHM_SIZE,
        "Ulimits": [{"Name": name, "Soft": value, "Hard": value} for name, value in ulimits.items()],
        "Mounts": _mounts(spec, sockets),
    }
    if user.userns:
        host["UsernsMode"] = user.userns
    if spec.limits.memory:
        host["Memory"] = host["MemorySwap"] = spec.limits.memory  # equal: no swap
    cpus = spec.limits.cpus or settings.cpus
    if cpus:
        host["NanoCpus"] = int(cpus * 1e9)
    if spec.devices:
        host["DeviceRequests"] = [{"Driver": "cdi", "DeviceIDs": list(spec.devices)}]
    return host


def _published(host: dict[str, Any], network: str) -> dict[str, Any]:
    """The port bound to loopback; names are looked up nowhere."""
    binding = [{"HostIp": "127.0.0.1", "HostPort": ""}]
    return {**host, "NetworkMode": network, "PortBindings": {f"{PORT}/tcp": binding}, "Dns": ["127.0.0.1"]}


def _mounts(spec: LaunchSpec, sockets: Path | None) -> list[dict[str, Any]]:
    wanted = [(spec.model_dir, MODELS, True), (str(sockets or ""), SOCKETS, False), (spec.built, PLACES.built, True)]
    if spec.kind == "job" and sockets is not None:
        wanted.append((str(sockets.with_name(OUTPUT)), PLACES.output, False))
    wanted += [(m.source, m.target, m.read_only) for m in spec.mounts]
    return [
        {
            "Type": "bind",
            "Source": source,
            "Target": target,
            "ReadOnly": read_only,
            "BindOptions": {"Propagation": "rprivate", "NonRecursive": True},
        }
        for source, target, read_only in wanted
        if source
    ]
