"""Variants of one model in a repository: the weights that belong together, and the tag that chooses them; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pierhead.errors import NotFound, UsageError
from pierhead.sources.choose import Entry, human


@dataclass(frozen=True)
class Variant:
    """Weights that make one model. ``aliases`` choose it too; ``indexes`` are the lists of its shards.

    A ``pipeline`` is several models in folders of their own, with their small files beside them. It is not ``sure``
    that a model is meant which is only one of several of different names.
    """

    label: str
    weights: tuple[Entry, ...]
    aliases: tuple[str, ...] = ()
    indexes: frozenset[str] = frozenset()
    pipeline: bool = False
    sure: bool = True

    @property
    def size(self) -> int:
        return sum(e.size for e in self.weights)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tag that chooses it, in lower case."""
        return (self.label.lower(), *self.aliases)


def name_of(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def pick(found: Sequence[Variant], tag: str, where: str) -> Variant:
    """The variant that a tag means (the first without one); NotFound and UsageError list what there is."""
    data = {"choices": [{"tag": v.label, "file": v.weights[0].path, "size": v.size} for v in found]}
    listed = ", ".join(f"{v.label or 'default'} ({human(v.size)})" for v in found[:40])
    if not tag and not found[0].sure:
        raise UsageError(f"{where} has several models", hint=f"Write one of their names as tag: {listed}.", data=data)
    if not tag:
        return found[0]
    wanted = tag.lower()
    matches = [v for v in found if wanted in v.names]
    if not matches:
        raise NotFound(f"{where} has nothing with tag '{tag}'", hint=f"It has: {listed}.", data=data)
    if len(matches) > 1:
        names = ", ".join(m.label for m in matches)
        raise UsageError(f"{where} has several models with tag '{tag}'", hint=f"Write one of: {names}.", data=data)
    return matches[0]
