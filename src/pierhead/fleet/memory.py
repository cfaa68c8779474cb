"""How much memory this machine, or our control group, has left, and what its processor can do; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pierhead.engines.setting_table import byte_count
from pierhead.errors import UsageError

UNLIMITED = 1 << 62
BUDGET = "[fleet] memory_budget"


@dataclass(frozen=True)
class Memory:
    """Bytes: ``total`` that may ever be used, ``available`` now, and what sets the ``bound`` (for messages)."""

    total: int
    available: int
    bound: str = "this machine's memory"


def read_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """The tightest of ``MemAvailable`` and the limits of our control groups (version 1 and 2) up to the root."""
    facts = _table(proc / "meminfo", ":")
    best = Memory(facts.get("MemTotal", 0) * 1024, facts.get("MemAvailable", facts.get("MemFree", 0)) * 1024)
    for group in _groups(proc, cgroup):
        limited = _group(group)
        if limited is not None:
            total = min(best.total, limited.total)
            if limited.available < best.available:
                best = Memory(total, limited.available, limited.bound)
            else:
                best = Memory(total, best.available, best.bound)
    return best


def limited(memory: Memory, budget: int) -> Memory:
    """The same within a budget (0: none)."""
    if budget <= 0 or budget >= memory.total:
        return memory
    return Memory(budget, memory.available, BUDGET)


def parse_size(text: int | str) -> int:
    """Bytes that ``3GiB``, ``3 GB``, ``500M`` or a plain number means (GB and GiB are the same); UsageError else."""
    try:
        return byte_count(text)
    except ValueError as exc:
        raise UsageError(f"{text!r} is no size of memory", hint="Write bytes, or for example 3GiB.") from exc


def processor_features(proc: Path = Path("/proc")) -> frozenset[str]:
    """What this machine's processor can do, by Linux's names (``avx2``, ``asimddp``); empty where it does not say."""
    try:
        for line in (proc / "cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def _groups(proc: Path, cgroup: Path) -> Iterator[Path]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            root = cgroup / "unified" if (cgroup / "unified").is_dir() else cgroup
        elif "memory" in controllers.split(","):
            root = cgroup / "memory"
        else:
            continue
        here = root / path.strip("/")
        yield from (folder for folder in (here, *here.parents) if folder == root or folder.is_relative_to(root))


def _group(folder: Path) -> Memory | None:
    for limit_name, used_name, files, writing in (
        ("memory.max", "memory.current", ("inactive_file", "active_file"), ("file_dirty", "file_writeback")),
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file"),
            ("total_dirty", "total_writeback"),
        ),
    ):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is None or used is None or limit >= UNLIMITED:
            continue
        # as the kernel reckons for the whole machine: pages of files can be dropped, also those in use, once written
        told = _table(folder / "memory.stat", None)
        cache = max(0, sum(told.get(key, 0) for key in files) - sum(told.get(key, 0) for key in writing))
        return Memory(limit, max(0, limit - max(0, used - cache)), f"the memory limit of control group {folder}")
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _table(file: Path, separator: str | None) -> dict[str, int]:
    found: dict[str, int] = {}
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        key, _, rest = line.partition(separator or " ")
        word = rest.split()[:1]
        if word and word[0].isdecimal():
            found[key] = int(word[0])
    return found
