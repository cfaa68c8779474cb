"""What one replica was seen to use of memory, and what it claims by that; reads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pierhead.engines.base import Plan


@dataclass
class Uses:
    """Bytes: ``awake`` and ``asleep`` its anonymous memory as last read in that state, ``peak`` the most of all, with
    its mapped weights; ``devices`` what it was last seen to have on accelerators, by CDI name.

    Asleep, what it had on accelerators may be in the machine's memory.
    """

    awake: int = 0
    asleep: int = 0
    peak: int = 0
    devices: dict[str, int] = field(default_factory=dict[str, int])
    device_peaks: dict[str, int] = field(default_factory=dict[str, int])

    def note(self, anonymous: int, used: int, devices: Mapping[str, int], *, sleeping: bool) -> None:
        """Take in a reading."""
        if sleeping:
            self.asleep = anonymous
        else:
            self.awake = anonymous
        self.peak = max(self.peak, used)
        self.devices = dict(devices)
        self.device_peaks |= {d: n for d, n in devices.items() if n > self.device_peaks.get(d, 0)}

    def anonymous(self, *, sleeping: bool) -> int:
        """What it has now, as last read; 0: not known."""
        return (sleeping and self.asleep) or self.awake

    def on_devices(self, plan: Plan, *, sleeping: bool) -> dict[str, int]:
        """What it claims of each accelerator: awake all that it may need, asleep what it was seen to keep."""
        if sleeping and self.devices:
            return self.devices
        return {d: max(need, self.device_peaks.get(d, 0)) for d, need in plan.devices.items()}
