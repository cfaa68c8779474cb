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


def has_cuda(devices: Sequence[Device]) -> bool:
    """Whether one of them is NVIDIA's."""
    return any(device.name.startswith(f"{NVIDIA}=") for device in devices)


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
    full = next((d for d in best if d.free < need), None)
    if full is not None:
        raise OutOfMemory(
            f"'{model}' needs {need / MIB:,.0f} MiB of a GPU's memory, and {max(0, full.free) / MIB:,.0f} MiB "
            f"are free on {full.name} ({full.title}, {full.total / MIB:,.0f} MiB)",
            hint="Use a smaller --context or a smaller quantization, or stop another model.",
            data={"device": full.name, "needed": need, "free": max(0, full.free), "total": full.total},
        )
    return {d.name: need for d in sorted(best, key=lambda d: d.name)}


def visible(devices: Mapping[str, int], fallback: Sequence[str]) -> tuple[str, ...]:
    """The CDI names for a launch spec: those that were taken, or what a user named where nothing is known."""
    return tuple(devices) or tuple(fallback)
