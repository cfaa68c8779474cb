"""A user's settings of each model as they hold: reads ``models.toml``, keeps the last good one, edits it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pierhead.daemon import tomlfile
from pierhead.daemon.tomlfile import read_text, write_text
from pierhead.engines.common_settings import COMMON
from pierhead.engines.setting_table import spelled
from pierhead.errors import PierError, UsageError
from pierhead.fleet import modelsfile
from pierhead.fleet.modelsfile import ADAPTERS, KEEPING, ModelsFile

log = logging.getLogger(__name__)


class ModelBook:
    """The settings of one installation. ``error`` says what is wrong with a file that is not in force."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.error: PierError | None = None
        self.current = ModelsFile(path=str(file))
        self._editing = asyncio.Lock()

    def refresh(self) -> None:
        """Read the file again; one that is broken changes nothing but ``error``. Blocking."""
        before = self.current
        try:
            self.current = modelsfile.read(read_text(self.file), str(self.file))
            self.error = None
        except PierError as exc:
            if self.error is None or self.error.message != exc.message:
                log.warning("%s; the last good settings stay in force", exc)
            self.error = exc
        changed = [n for n in {**before.models, **self.current.models} if before.of([n]) != self.current.of([n])]
        if changed:
            log.info("settings changed, for the next start: %s", ", ".join(changed))

    async def follow(self, changed: Callable[[], None]) -> None:
        """Read again whenever the file changes, until cancelled; ``changed`` is called afterwards."""
        await tomlfile.follow(lambda: (self.file.parent,), self.refresh, changed)

    async def edit(
        self,
        names: Sequence[str],
        wanted: Mapping[str, Any],
        unwanted: Sequence[str],
        check: Callable[[ModelsFile], object],
    ) -> None:
        """Set and take out settings of the model called ``names``, whose other lines stay as they are.

        ``check`` looks at the file as it would be; what it raises, or a file that is not understood, changes nothing.
        """
        async with self._editing:
            await asyncio.to_thread(self._edit, names, wanted, unwanted, check)

    def _edit(
        self,
        names: Sequence[str],
        wanted: Mapping[str, Any],
        unwanted: Sequence[str],
        check: Callable[[ModelsFile], object],
    ) -> None:
        import tomlkit  # only here: it keeps comments and order, and is slow to import

        before = read_text(self.file)
        found = modelsfile.read(before, str(self.file)).of(names)
        name = found[0] if found else names[0].removesuffix(":latest")
        document = tomlkit.parse(before)
        models: Any = document.setdefault("models", tomlkit.table(is_super_table=True))
        table: Any = models.setdefault(name, tomlkit.table())
        for key in unwanted:
            _take_out(table, key, name)
        for key, value in wanted.items():
            _put(table, key, value)
        if not table:
            del models[name]
        after = tomlkit.dumps(document)
        check(modelsfile.read(after, str(self.file)))
        if after != before:
            write_text(self.file, after)
        self.refresh()


def _put(table: Any, given: str, value: Any) -> None:
    name = spelled(given)
    if name in KEEPING or name in COMMON:
        table[name] = value
        return
    if name == ADAPTERS:
        adapters = table.setdefault(ADAPTERS, {})
        for adapter, scale in dict(value).items():
            adapters[adapter] = scale
        return
    options = table.setdefault("options", {})
    _take_out_of(options, name)
    options[name] = value


def _take_out(table: Any, given: str, model: str) -> None:
    name = spelled(given)
    if name in table and (name in KEEPING or name in COMMON):
        del table[name]
        return
    if given.startswith(f"{ADAPTERS}.") and given.partition(".")[2] in table.get(ADAPTERS, {}):
        del table[ADAPTERS][given.partition(".")[2]]
        if not table[ADAPTERS]:
            del table[ADAPTERS]
        return
    if not _take_out_of(table.get("options", {}), name):
        raise UsageError(
            f"models.toml sets no '{given}' for {model}", hint=f"`pier settings {model}` shows what is set, and where."
        )
    if not table["options"]:
        del table["options"]


def _take_out_of(options: Any, name: str) -> bool:
    """Remove an engine's setting in whatever spelling it was written; whether it was there."""
    found = [key for key in cast("list[str]", list(options)) if spelled(key) == name]
    for key in found:
        del options[key]
    return bool(found)
