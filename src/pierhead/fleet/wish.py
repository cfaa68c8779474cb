"""What a model was started with; nothing that was changed since then."""

from __future__ import annotations

from typing import Any

import msgspec


class Wish(msgspec.Struct, frozen=True):
    """The engine, all its settings under its own names, and the LoRA ``adapters`` by name with their scales.

    Every replica of a model that runs is started with that of the first, so that all answer alike: what is changed in
    ``models.toml`` or in the configuration holds from the model's next start on.
    """

    engine: str
    settings: dict[str, Any]
    adapters: dict[str, float] = {}

    @property
    def picked(self) -> dict[str, Any]:
        """The engine as a setting."""
        return {"engine": self.engine}

    def differences(self, other: Wish) -> tuple[str, ...]:
        """The names of settings that are not the same in both."""
        names = [n for n in {**self.settings, **other.settings} if self.settings.get(n) != other.settings.get(n)]
        return (*(("engine",) if self.engine != other.engine else ()), *sorted(names))
