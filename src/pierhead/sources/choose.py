"""Which files of a repository make the model that a tag means: quantizations, shards and projectors; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pierhead.errors import CorruptData, NotFound, UsageError

# Without a tag the first of these that a repository has is taken, else its smallest model.
DEFAULT_ORDER = (
    "Q4_K_M", "UD-Q4_K_XL", "Q4_K_S", "Q4_K_L", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "MXFP4", "MXFP4_MOE", "Q5_K_M",
    "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "Q3_K_M", "Q3_K_L", "Q3_K_S", "Q2_K", "F16", "BF16", "F32",
)  # fmt: skip
PROJECTOR_ORDER = ("F16", "BF16", "Q8_0", "F32")

_SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<of>\d{5})\.gguf", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:^|(?<=[-._/]))((?:UD-)?(?:I?Q|TQ)\d+(?:_[A-Z0-9]+)*|B?F16|FP16|F32|FP32|MXFP4(?:_MOE)?|NVFP4)(?=[-._/]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Entry:
    """One file of a repository; ``path`` is relative to it."""

    path: str
    size: int


@dataclass(frozen=True)
class Choice:
    """One model of a repository: its shards in order; ``label`` is its quantization, or its name without one."""

    label: str
    stem: str
    entries: tuple[Entry, ...]
    shards: int = 1

    @property
    def size(self) -> int:
        return sum(e.size for e in self.entries)


def choices(entries: Sequence[Entry]) -> list[Choice]:
    """All models among the files of a repository, the smallest first."""
    groups: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        name = entry.path.rsplit("/", 1)[-1].lower()
        if not name.endswith(".gguf") or is_projector(entry.path) or "imatrix" in name:
            continue
        shard = _SHARD.fullmatch(entry.path)
        key = (shard["stem"], int(shard["of"])) if shard else (entry.path[: -len(".gguf")], 1)
        groups.setdefault(key, []).append(entry)
    found = [
        Choice(label_of(stem), stem, tuple(sorted(group, key=lambda e: e.path)), count)
        for (stem, count), group in groups.items()
    ]
    return sorted(found, key=lambda c: (c.size, c.stem))


def label_of(stem: str) -> str:
    """The quantization in a file's name, else in its folder's, else the name itself."""
    folder, _, name = stem.rpartition("/")
    for text in (name, folder):
        labels = _LABEL.findall(text)
        if labels:
            return labels[-1].upper().replace("FP16", "F16").replace("FP32", "F32")
    return name


def is_projector(path: str) -> bool:
    name = path.rsplit("/", 1)[-1].lower()
    return "mmproj" in name and name.endswith(".gguf")


def choose(entries: Sequence[Entry], tag: str, where: str) -> Choice:
    """The model that ``tag`` means (any case), or the default; NotFound and UsageError list the choices."""
    found = choices(entries)
    if not found:
        raise NotFound(
            f"{where} holds no GGUF file",
            hint="Search for a repository of the same model whose name ends in -GGUF.",
        )
    return complete(_tagged(found, tag, where) if tag and tag.lower() != "latest" else _default(found), where)


def complete(choice: Choice, where: str) -> Choice:
    """The same model; CorruptData when some of its shards are missing."""
    if len(choice.entries) != choice.shards:
        raise CorruptData(
            f"{where} has {len(choice.entries)} of the {choice.shards} parts of {choice.stem}",
            hint="Its upload may not be finished: try again later, or choose another tag.",
        )
    return choice


def _default(found: Sequence[Choice]) -> Choice:
    for label in DEFAULT_ORDER:
        for choice in found:
            if choice.label == label and len(choice.entries) == choice.shards:
                return choice
    return found[0]


def tagged(found: Sequence[Choice], tag: str) -> list[Choice]:
    """The models that a tag may mean: those of that name, else those of that quantization."""
    wanted = tag.upper().removesuffix(".GGUF")
    names = [c for c in found if c.stem.rpartition("/")[2].upper() == wanted]
    return names or [c for c in found if c.label.upper().replace("-", "_") == wanted.replace("-", "_")]


def _tagged(found: Sequence[Choice], tag: str, where: str) -> Choice:
    matches = tagged(found, tag)
    if len(matches) == 1:
        return matches[0]
    listed = _listed(matches or found, by_name=bool(matches))
    data = {"choices": [{"tag": c.label, "file": c.stem, "size": c.size} for c in matches or found]}
    if matches:
        raise UsageError(
            f"{where} has several models with tag '{tag}'", hint=f"Write the file's name: {listed}.", data=data
        )
    raise NotFound(f"{where} has nothing with tag '{tag}'", hint=f"It has: {listed}.", data=data)


def _listed(found: Sequence[Choice], *, by_name: bool) -> str:
    shown = [f"{c.stem.rpartition('/')[2] if by_name else c.label} ({human(c.size)})" for c in found[:40]]
    return ", ".join(shown) + (f" and {len(found) - 40} more" if len(found) > 40 else "")


def projector(entries: Sequence[Entry], choice: Choice) -> Entry | None:
    """The projector that belongs to a model: in its folder or at the top, by the documented order."""
    folder = choice.stem.rpartition("/")[0]
    found = [e for e in entries if is_projector(e.path) and e.path.rpartition("/")[0] in ("", folder)]
    rank = {label: number for number, label in enumerate(PROJECTOR_ORDER)}
    return min(found, key=lambda e: (rank.get(label_of(e.path[: -len(".gguf")]), 99), e.size, e.path), default=None)


def human(size: int) -> str:
    """Bytes for people: ``98.4 MB``."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
