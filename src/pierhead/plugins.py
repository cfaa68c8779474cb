"""What can be added without changing Pierhead: built-in tables of lazy import strings, and entry points beside them."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from pierhead.errors import ConfigError


def names(group: str, builtin: Mapping[str, str]) -> dict[str, str]:
    """Name to ``module:attribute``: the built-in ones in their order, then those that installed packages offer.

    ``group`` is the entry points' group, such as ``pierhead.engines``. A package cannot take a built-in name.
    """
    found = dict(builtin)
    for entry in importlib.metadata.entry_points(group=group):
        found.setdefault(entry.name, entry.value)
    return found


def load(name: str, place: str) -> Any:
    """What ``module:attribute`` means; ConfigError when a package promises what it does not have."""
    module, _, attribute = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            f"the plugin '{name}' ({place}) cannot be loaded: {exc}",
            hint="Update or remove the package that brings it.",
        ) from exc
    return found
