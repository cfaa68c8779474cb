"""The configured routes as they hold: reads ``routes.toml`` and its secrets, keeps the last good file, edits it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from msgspec.structs import replace

from pierhead.daemon import routefile, tomlfile
from pierhead.daemon.providers import make
from pierhead.daemon.routefile import RouteFile, RouteTable, To, When
from pierhead.daemon.secrets import Secrets
from pierhead.daemon.tomlfile import read_text, write_text
from pierhead.daemon.wire import RouteInfo, RouteList
from pierhead.errors import NotFound, PierError
from pierhead.gateway.link import Route

log = logging.getLogger(__name__)


class RouteBook:
    """The routes of one installation. ``error`` says what is wrong with a file that is not in force."""

    def __init__(self, file: Path, secrets: Secrets, ca_file: str = "") -> None:
        self.file = file
        self._ca_file = ca_file  # of providers that name none
        self.secrets = secrets
        self.error: PierError | None = None
        self.current = RouteFile()
        self._values: dict[str, str | PierError] = {}
        self._editing = asyncio.Lock()

    # --- reading --------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read file and secrets again; a file that is broken changes nothing but ``error``. Blocking."""
        try:
            read = routefile.read(read_text(self.file), str(self.file))
            providers = {n: replace(p, ca_file=p.ca_file or self._ca_file) for n, p in read.providers.items()}
            self.current = replace(read, providers=providers)
            self.error = None
        except PierError as exc:
            if self.error is None or self.error.message != exc.message:
                log.warning("%s; the last good routes stay in force", exc)
            self.error = exc
        self._values = {p.secret: self._secret(p.secret) for p in self.current.providers.values() if p.secret}

    def _secret(self, reference: str) -> str | PierError:
        try:
            return self.secrets.read(reference)
        except PierError as exc:
            return exc

    def _read(self, reference: str) -> str:
        found = self._values.get(reference) or NotFound(f"the secret '{reference}' was not read yet")
        if isinstance(found, PierError):
            raise found
        return found

    def routes(self, models: tuple[Route, ...], keys: Mapping[str, str]) -> tuple[Route, ...]:
        """All routes: the configured ones first, so that theirs are the names, then the models'."""
        made = make(self.current, models, keys, self._read).routes
        taken = {route.name for route in made if not route.hidden}
        return (*made, *(replace(m, hidden=True) if m.name in taken else m for m in models))

    def list(self, models: tuple[Route, ...], keys: Mapping[str, str]) -> RouteList:
        """What is offered, by whom it is answered, and what does not work as it is written."""
        return listed(self.current, models, keys, self._read, str(self.file), self.error)

    def check(self, text: str, models: tuple[Route, ...], keys: Mapping[str, str]) -> RouteList:
        """The same for a text that is not in force. Blocking."""
        return listed(routefile.read(text, "the text"), models, keys, self.secrets.read, "", None)

    # --- watching -------------------------------------------------------------------------------------------------

    def _folders(self) -> set[Path]:
        named = [
            p.secret.removeprefix("file:") for p in self.current.providers.values() if p.secret.startswith("file:")
        ]
        return {self.file.parent, self.secrets.folder, *(Path(name).parent for name in named)}

    async def follow(self, changed: Callable[[], None]) -> None:
        """Read again whenever file or secrets change, until cancelled; ``changed`` is called afterwards."""
        await tomlfile.follow(self._folders, self.refresh, changed)

    # --- editing --------------------------------------------------------------------------------------------------

    async def put(self, name: str, table: RouteTable) -> None:
        """Write one route into the file, whose other lines stay as they are; ConfigError when it would be wrong."""
        async with self._editing:
            await asyncio.to_thread(self._edit, name, table)

    async def remove(self, name: str) -> None:
        """Take one route out of the file; NotFound when it is not there."""
        async with self._editing:
            await asyncio.to_thread(self._edit, name, None)

    def _edit(self, name: str, table: RouteTable | None) -> None:
        import tomlkit  # only here: it keeps comments and order, and is slow to import

        before = read_text(self.file)
        if name not in routefile.read(before, str(self.file)).routes and table is None:
            raise NotFound(f"there is no configured route '{name}'", hint="`pier route list` shows what there is.")
        document = tomlkit.parse(before)
        routes = document.setdefault("routes", tomlkit.table(is_super_table=True))
        if table is None:
            del routes[name]
        else:
            routes[name] = _table(table)
        after = tomlkit.dumps(document)
        routefile.read(after, str(self.file))
        write_text(self.file, after)
        self.refresh()


def _table(table: RouteTable) -> dict[str, object]:
    """A route as plain values, without what has its default."""
    empty = RouteTable(to=())
    full = msgspec.to_builtins(table)
    plain = {k: v for k, v in full.items() if k == "to" or getattr(table, k) != getattr(empty, k)}
    for part in ("to", "fallback"):
        if part in plain:
            plain[part] = [_lean(value) for value in plain[part]]
    if plain.get("mirror"):
        plain["mirror"] = _lean(plain["mirror"])
    return plain


def _lean(table: dict[str, object]) -> dict[str, object]:
    if isinstance(when := table.get("when"), dict):
        table["when"] = {k: v for k, v in when.items() if v}  # pyright: ignore[reportUnknownVariableType]
    weight = table.get("weight")
    if isinstance(weight, float) and weight.is_integer():
        table["weight"] = int(weight)
    return {k: v for k, v in table.items() if v not in ("", {}, [], None)}


def listed(
    file: RouteFile,
    models: tuple[Route, ...],
    keys: Mapping[str, str],
    read: Callable[[str], str],
    path: str,
    error: PierError | None,
) -> RouteList:
    """A file and the models beside it as one list; pure but for ``read``."""
    made = make(file, models, keys, read)
    works = {route.name: route for route in made.routes}
    problems: dict[str, list[str]] = {}
    for name, what in made.problems:
        problems.setdefault(name, []).append(what)
    infos = [
        RouteInfo(
            name=name,
            kind="route",
            active=name in works,
            to=tuple(_told(to) for to in table.to),
            fallback=tuple(f"{_name(f)} on {', '.join(f.on)}" for f in table.fallback),
            mirror=f"{table.mirror.share:.0%} to {_name(table.mirror)}" if table.mirror is not None else "",
            sticky=table.sticky,
            problems=tuple(problems.pop(name, ())),
        )
        for name, table in file.routes.items()
    ]
    infos += [
        RouteInfo(name=route.name, kind="provider", to=(f"{e.remote.provider}: {e.model}",))
        for route in works.values()
        if not route.hidden
        for e in route.endpoints
        if e.remote is not None
    ]
    taken = {info.name for info in infos if info.active}
    infos += [RouteInfo(name=m.name, kind="model", to=(m.name,)) for m in models if m.name not in taken]
    loose = tuple(f"{name}: {what}" for name, texts in problems.items() for what in texts)
    return RouteList(path, error.to_dict() if error is not None else None, tuple(infos), loose)


def _name(to: To | routefile.Fallback | routefile.Mirror) -> str:
    return f"{to.provider}/{to.model}" if to.provider else to.model


def _told(to: To) -> str:
    text = f"{_name(to)} ({to.weight:g})"
    if to.when == When():
        return text
    conditions = [f"key {to.when.key}"] if to.when.key else []
    conditions += [f"{header}: {value}" for header, value in to.when.header.items()]
    return f"{text} for {', '.join(conditions)}"
