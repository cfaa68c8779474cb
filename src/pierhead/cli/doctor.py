"""The verb doctor: what of this machine can be used, and what to install for more; changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import here, print_json, settings, size, wrapped
from pierhead.config import Settings
from pierhead.errors import PierError
from pierhead.paths import Paths

CPU_FEATURES = (
    "avx",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "fma",
    "f16c",
    "neon",
    "asimd",
    "sve",
)

RUNTIMES = ("auto", "process", "docker")
_DOCKER = "For containers install Docker Engine (Debian: docker.io) or Podman, or set [runtime] docker_host."


class Check(msgspec.Struct, frozen=True):
    """One finding: ``ok`` works, ``warn`` works less than it could, ``fail`` does not; ``fix`` is what to do."""

    name: str
    state: str
    text: str
    fix: str = ""


@click.command(cls=Verb)
@option("--online", is_flag=True, help="Also see whether the places that models come from can be reached.")
@json_option
def doctor(online: bool, as_json: bool) -> None:
    """Say what of this machine can be used, and what to install for more.

    Nothing is changed. The exit status is 1 when something that is needed does not work.
    """
    paths = here()
    checks = [*configuration(paths), *machine(), *gpus(), *disk(paths)]
    if checks[0].state == "ok":
        checks[1:1] = starting(paths)
        checks += asyncio.run(runtimes(paths))
        checks += asyncio.run(places(paths)) if online else []
    well = all(c.state != "fail" for c in checks)
    if as_json:
        print_json({"checks": checks, "ok": well})
    else:
        _show(checks)
    if not well:
        raise click.exceptions.Exit(1)


def _show(checks: list[Check]) -> None:
    marks = {
        "ok": click.style("✓", fg="green"),
        "warn": click.style("!", fg="yellow"),
        "fail": click.style("✗", fg="red"),
    }
    width = max(len(c.name) for c in checks)
    for check in checks:
        click.echo(wrapped(f"{marks[check.state]} {check.name.ljust(width)}  {check.text}", sys.stdout, width + 4))
        if check.fix:
            click.echo(wrapped(f"  {' ' * width}  → {check.fix}", sys.stdout, width + 6))


def machine() -> list[Check]:
    """Processor and memory."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = set(
        next((x.split(":", 1)[1] for x in info.splitlines() if x.startswith(("flags", "Features"))), "").split()
    )
    have = [f for f in CPU_FEATURES if f in flags]
    model = next((x.split(":", 1)[1].strip() for x in info.splitlines() if "model name" in x), platform.machine())
    cores = len(os.sched_getaffinity(0))
    cpu = Check("CPU", "ok" if have else "warn", f"{model}, {cores} cores; {', '.join(have) or 'no vector features'}")
    from pierhead.fleet.memory import read_memory

    memory = read_memory()
    free, total = memory.available, memory.total
    state = "ok" if free > 2 << 30 else "warn"
    fix = "" if state == "ok" else "Close something, or use small models and a small --context."
    return [cpu, Check("Memory", state, f"{size(free)} free of {size(total)}", fix)]


def gpus() -> list[Check]:
    """Graphics processors, what is free on them, and whether containers can be given them."""
    from pierhead.runtimes.gpu import NVML

    nvidia = NVML.devices()
    silent = Path("/proc/driver/nvidia/gpus").is_dir() and not nvidia
    render = sorted(p.name for p in Path("/dev/dri").glob("renderD*")) if Path("/dev/dri").is_dir() else []
    if silent:
        return [Check("GPU", "warn", "NVIDIA's driver is loaded and lists no GPU", "Does `nvidia-smi` work?")]
    if not nvidia and not render:
        return [Check("GPU", "ok", "none found; models run on the CPU")]
    specs = [p for folder in ("/etc/cdi", "/var/run/cdi") for p in Path(folder).glob("*") if Path(folder).is_dir()]
    fix = "" if specs else "Containers need CDI: install nvidia-container-toolkit and run `nvidia-ctk cdi generate`."
    if not nvidia:
        return [Check("GPU", "ok", f"{', '.join(render)}; models run on the CPU unless their settings say otherwise")]
    return [
        Check("GPU", "ok" if specs else "warn", f"{d.title}: {size(d.free)} free of {size(d.total)}", fix)
        for d in nvidia
    ]


def disk(paths: Paths) -> list[Check]:
    """Room for models."""
    place = paths.state
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    low = free < 5 << 30
    return [
        Check(
            "Disk",
            "warn" if low else "ok",
            f"{size(free)} free for models in {paths.store}",
            "Free some space." if low else "",
        )
    ]


def starting(paths: Paths) -> list[Check]:
    """What of settings that can be read would keep a daemon from starting, or its models; what a running one lacks."""
    from pierhead.daemon.client import Client
    from pierhead.fleet.memory import parse_size

    wanted = settings(paths).settings
    client = Client(paths)
    runs = client.get("/status") if client.version() else None
    checks = [] if runs else [_tried("Address", functools.partial(_free, address)) for address in wanted.gateway.listen]
    for name, text in (("memory_budget", wanted.fleet.memory_budget), ("gpu_budget", wanted.fleet.gpu_budget)):
        checks.append(_tried(f"[fleet] {name}", functools.partial(parse_size, text)))
    if checks[-2].state == "ok" and 0 < parse_size(wanted.fleet.memory_budget) <= wanted.engine.memory_reserve:
        kept = f"[engine] memory_reserve keeps {size(wanted.engine.memory_reserve)} of it free"
        checks.append(Check("[fleet] memory_budget", "fail", f"leaves nothing for models: {kept}", "Make it larger."))
    if wanted.runtime.default not in RUNTIMES:
        what = f"there is no runtime '{wanted.runtime.default}'"
        checks.append(Check("[runtime] default", "fail", what, f"Use one of: {', '.join(RUNTIMES)}."))
    return [c for c in checks if c.state != "ok"] + _unlike(runs, wanted)


def _tried(name: str, work: Callable[[], object]) -> Check:
    try:
        work()
    except PierError as exc:
        return Check(name, "fail", exc.message, exc.hint or "")
    return Check(name, "ok", "")


def _free(address: str) -> None:
    """Listen for a moment where the gateway would."""
    from pierhead.gateway.listeners import bind_tcp

    bind_tcp(address).sock.close()


def _unlike(runs: Any, wanted: Settings) -> list[Check]:
    """A note where a running daemon was started with other settings; what its flags said is left out."""
    if runs is None:
        return []
    ours: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(wanted))
    keys = [(s, key) for s, table in ours.items() for key in table if table[key] != runs["settings"][s].get(key)]
    names = [f"{s}.{key}" for s, key in keys if runs["origins"].get(f"{s}.{key}") != "flag"]
    if not names:
        return []
    text = f"the daemon that runs was started with other settings: {', '.join(names)}"
    return [Check("Daemon", "warn", text, "`pier stop --all --daemon`; the next command starts one with these.")]


async def runtimes(paths: Paths) -> list[Check]:
    """Where engines can run."""
    from pierhead.daemon.docker import LazyDocker
    from pierhead.runtimes.process import ProcessRuntime

    wanted = settings(paths).settings.runtime
    docker = LazyDocker(paths.replicas, wanted)
    async with contextlib.aclosing(docker):
        found = (await ProcessRuntime(paths.replicas, wanted).capabilities(), await docker.capabilities())
    checks: list[Check] = []
    for can in found:
        name = can.name
        title = f"Runtime {name}"
        if not can.available:
            state = "fail" if name == "process" else "warn"
            fix = " ".join(can.missing) or (_DOCKER if name == "docker" else "")
            checks.append(Check(title, state, f"not available: {can.reason}", fix))
            continue
        missing = " ".join(can.missing)
        checks.append(
            Check(title, "warn" if missing else "ok", f"isolates {', '.join(can.isolation) or 'nothing'}", missing)
        )
    return checks


async def places(paths: Paths) -> list[Check]:
    """Whether a connection to the hub and the package index comes about; nothing is asked of them."""
    index = os.environ.get("UV_INDEX_URL") or os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
    wanted = {"Hub": settings(paths).settings.sources.hf_endpoint, "Package index": index}
    return list(await asyncio.gather(*(_reach(name, address) for name, address in wanted.items())))


async def _reach(name: str, address: str) -> Check:
    host = urlsplit(address).hostname or address
    try:
        port = urlsplit(address).port or (80 if address.startswith("http:") else 443)
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or "no answer in 5 s"
        return Check(name, "warn", f"{host} cannot be reached: {why}", "Check the network and its proxy settings.")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Check(name, "ok", f"{host} can be reached")


def configuration(paths: Paths) -> list[Check]:
    """Settings that can be read, an engine that is installed."""
    from pierhead.engines.llamacpp import engine_version

    checks: list[Check] = []
    try:
        origins = settings(paths).origins
        checks.append(Check("Settings", "ok", f"{len(origins)} set; file {paths.config / 'config.toml'}"))
    except PierError as exc:
        checks.append(Check("Settings", "fail", exc.message, exc.hint or ""))
    checks.append(Check("Engine", "ok", f"llama.cpp (xllamacpp {engine_version()})"))
    return checks
