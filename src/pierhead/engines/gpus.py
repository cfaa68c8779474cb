"""The accelerators that a plan may use: what each has free, and which of them a replica takes; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pierhead.errors import OutOfMemory, UsageError

NVIDIA = "nvidia.com/gpu"
MIB = 1 << 20


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One accelerator of this machine by its CDI name, such as ``nvidia.com/gpu=0``.

    Bytes of its own memory: ``total``, and ``free`` for a new replica. ``capability`` is NVIDIA's number of what it can
    compute, such as 9.0; ``driver`` the version of its driver.
    """

    name: str
    title: str
    total: int
    free: int
    capability: str = ""
    driver: str = ""


def capable(devices: Sequence[Device], *, driver: int = 0, capability: float = 0.0) -> bool:
    """Whether one of them is NVIDIA's with a driver of this major version and this computing, at least.

    What nobody could read of a device counts as enough.
    """
    return any(
        d.name.startswith(f"{NVIDIA}=")
        and _number(d.driver.partition(".")[0], driver) >= driver
        and _number(d.capability, capability) >= capability
        for d in devices
    )


def chosen(wanted: str, devices: Sequence[Device], *, driver: int = 0, capability: float = 0.0) -> str:
    """What a ``device`` setting means here: ``auto`` is ``cuda`` where there is a GPU that can do it, else ``cpu``."""
    if wanted != "auto":
        return wanted
    return "cuda" if capable(devices, driver=driver, capability=capability) else "cpu"


def numbers(gpus: str | Sequence[str]) -> tuple[str, ...]:
    """A ``gpus`` setting taken apart: ``all``, ``0``, ``0,1``."""
    parts = gpus.split(",") if isinstance(gpus, str) else gpus
    return tuple(part.strip() for part in parts if part.strip())


def names(gpus: Sequence[str], kind: str = NVIDIA) -> tuple[str, ...]:
    """The CDI names of what a ``gpus`` setting names."""
    return tuple(f"{kind}={gpu}" for gpu in gpus)


def largest(devices: Sequence[Device], among: Sequence[str] = (), kind: str = NVIDIA) -> int:
    """Bytes of all the memory of the largest GPU of a kind that may be used; 0 where none is known."""
    allowed = {f"{kind}={number}" for number in among if number != "all"}
    found = [d.total for d in devices if d.name.startswith(f"{kind}=") and (not allowed or d.name in allowed)]
    return max(found, default=0)


def emptiest(devices: Sequence[Device], among: Sequence[str] = (), count: int = 1, kind: str = NVIDIA) -> int:
    """Bytes that are free on each of the ``count`` devices that ``take`` would choose; 0 where it would not."""
    allowed = {f"{kind}={number}" for number in among if number != "all"}
    free = sorted(d.free for d in devices if d.name.startswith(f"{kind}=") and (not allowed or d.name in allowed))
    return free[-count] if 0 < count <= len(free) else 0


def take(
    model: str, devices: Sequence[Device], need: int, *, count: int = 1, among: Sequence[str] = (), kind: str = NVIDIA
) -> dict[str, int]:
    """``need`` bytes on each of the ``count`` devices with the most free memory, by name; as ``Plan.devices`` has them.

    ``among`` are the numbers that a user allows (none, or ``all``: any). A number that the machine lacks is a
    UsageError. OutOfMemory, whose ``data["device"]`` says that it is no memory of the machine itself, when they are too
    full. Without any ``devices`` the machine's are not known, and nothing is claimed.
    """
    allowed = {f"{kind}={number}" for number in among if number != "all"}
    here = [d for d in devices if d.name.startswith(f"{kind}=")]
    if not here:
        return {}
    unknown = sorted(allowed - {d.name for d in here})
    if unknown or (allowed and len(allowed) < count) or len(here) < count:
        names = ", ".join(d.name.partition("=")[2] for d in here)
        raise UsageError(
            f"'{model}' is to use {unknown[0] if unknown else f'{count} GPUs'}, and this machine has: {names}",
            hint="`pier doctor` lists the GPUs.",
        )
    best = sorted((d for d in here if not allowed or d.name in allowed), key=lambda d: (-d.free, d.name))[:count]
    taken = {d.name: need for d in sorted(best, key=lambda d: d.name)}
    check(model, devices, taken)
    return taken


def check(model: str, devices: Sequence[Device], needs: Mapping[str, int]) -> None:
    """OutOfMemory, as ``take`` raises it, where one of the ``devices`` has less free than is needed of it."""
    full = next((d for d in devices if d.free < needs.get(d.name, 0)), None)
    if full is None:
        return
    need = needs[full.name]
    raise OutOfMemory(
        f"'{model}' needs {need / MIB:,.0f} MiB of a GPU's memory, and {max(0, full.free) / MIB:,.0f} MiB "
        f"are free on {full.name} ({full.title}, {full.total / MIB:,.0f} MiB)",
        hint="Use a smaller --context or a smaller quantization, or stop another model.",
        data={"device": full.name, "needed": need, "free": max(0, full.free), "total": full.total},
    )


def _number(text: str, otherwise: float) -> float:
    try:
        return float(text)
    except ValueError:
        return otherwise


def visible(devices: Mapping[str, int], fallback: Sequence[str]) -> tuple[str, ...]:
    """The CDI names for a launch spec: those that were taken, or what a user named where nothing is known."""
    return tuple(devices) or tuple(fallback)
