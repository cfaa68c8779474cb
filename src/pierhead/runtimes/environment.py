"""Python environments of engines: made on first use by the user's own uv or pip, named by what is in them, shared."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pierhead.engines.base import Environment
from pierhead.errors import RuntimeUnavailable, SourceUnavailable
from pierhead.events import BuildProgress, Listener, ignore
from pierhead.runtimes.lock import locked
from pierhead.sources.installer import INSTALL, Tool, tools

DEADLINE = 3600.0
TORCH = "https://download.pytorch.org/whl"  # has the builds of PyTorch that PyPI lacks
# What a user has set beside the index: pip would take a wheel of the same version from there.
ONE_INDEX: Mapping[str, str] = {"PIP_EXTRA_INDEX_URL": ""}
_NOTHING: Mapping[str, str] = {}
_MARK = "ready.json"
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+@")


@dataclass(frozen=True)
class Report:
    """Who hears of the steps of one installation, and the lock that its installers hold."""

    listener: Listener
    name: str
    lock: int

    def __call__(self, step: str) -> None:
        self.listener(BuildProgress(image=self.name, step=step))


class Environments:
    """Those below ``folder``; an environment is whole when its mark is there, and is never changed after that.

    Installers hold the lock with us: one that outlives its daemon has ended before another begins in its place.
    """

    def __init__(self, folder: Path, choice: str = "auto", env: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._choice = choice
        self._env = dict(os.environ if env is None else env)

    def place(self, engine: str, wanted: Environment) -> Path:
        """Where it is or would be; the same wishes on the same kind of machine give the same name."""
        what = {name: value for name, value in msgspec.to_builtins(wanted).items() if name != "index" or value}
        inputs = [what, platform.machine(), wanted.python or f"{sys.version_info.major}.{sys.version_info.minor}"]
        return self._folder / f"{engine}-{hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()[:12]}"

    def find(self, engine: str, wanted: Environment) -> Path | None:
        """Its Python program, if it is here whole."""
        place = self.place(engine, wanted)
        return place / "bin" / "python" if _whole(place) else None

    async def ensure(self, engine: str, wanted: Environment, listener: Listener) -> Path:
        """Its Python program; installed if need be, which callers at the same time share.

        Raises SourceUnavailable with the installer's last words, RuntimeUnavailable when there is no installer or no
        such Python.
        """
        if found := self.find(engine, wanted):
            return found
        place = self.place(engine, wanted)
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        async with locked(self._folder / f".{place.name}.lock") as lock:
            if found := self.find(engine, wanted):
                return found
            await asyncio.to_thread(shutil.rmtree, place, True)
            try:
                await self._make(place, wanted, Report(listener, place.name, lock))
            except BaseException:
                await asyncio.to_thread(shutil.rmtree, place, True)
                raise
        listener(BuildProgress(image=place.name, step="done", done=1, total=1))
        return place / "bin" / "python"

    def all(self) -> list[Path]:
        """The folders of those that are here."""
        return [p for p in sorted(self._folder.glob("*-*")) if p.is_dir()] if self._folder.is_dir() else []

    def of(self, engine: str) -> list[Path]:
        """The folders of an engine's environments that are here whole."""
        return [p for p in self.all() if p.name.rpartition("-")[0] == engine and _whole(p)]

    def prune(self, keep: frozenset[str] = frozenset()) -> list[str]:
        """Remove all but those whose folder's name is in ``keep``; the names of those that are gone."""
        gone: list[str] = []
        for place in sorted(self._folder.glob("*-*")) if self._folder.is_dir() else []:
            if place.is_dir() and place.name not in keep:
                (place / _MARK).unlink(missing_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                gone.append(place.name)
        return gone

    async def _make(self, place: Path, wanted: Environment, tell: Report) -> None:
        tool = next(iter(tools(self._choice, self._env)), None)
        if tool is None:
            raise RuntimeUnavailable("an engine's packages are installed through uv or pip", hint=INSTALL)
        python = place / "bin" / "python"
        tell("making an environment")
        await self._run(_create(tool, self._base(wanted), place, wanted.python), tell)
        tell(f"installing {', '.join(wanted.requirements)}")
        await self._install(tool, python, wanted, tell)
        listed = await self._run(_listing(tool, python), Report(ignore, place.name, tell.lock))
        mark = {"requirements": wanted.requirements, "installed": sorted(listed)}
        temporary = place / f"{_MARK}.new"
        temporary.write_bytes(msgspec.json.encode(mark))
        temporary.replace(place / _MARK)

    async def _install(self, tool: Tool, python: Path, wanted: Environment, tell: Report) -> None:
        """From the user's own index; where that lacks the wanted build of PyTorch, from PyTorch's index as well."""
        if wanted.index:
            first = (*_install(tool, python), "--no-deps", *only_from(wanted.index, tool.kind), wanted.requirements[0])
            await self._run(first, tell, ONE_INDEX)
        command = (*_install(tool, python), *(() if wanted.dependencies else ("--no-deps",)))
        if not wanted.torch:
            await self._run((*command, *wanted.requirements), tell)
        elif tool.kind == "uv":
            await self._run((*command, "--torch-backend", wanted.torch, *wanted.requirements), tell)
        else:
            try:
                await self._run((*command, *wanted.requirements), tell)
            except SourceUnavailable as exc:
                if not any("torch" in line for line in exc.data.get("log", ())):
                    raise
                tell(f"asking {TORCH}/{wanted.torch} as well")
                extra = ("--extra-index-url", f"{TORCH}/{wanted.torch}")
                await self._run((*command, *extra, *wanted.requirements), tell)

    def _base(self, wanted: Environment) -> str:
        """The Python to make it from; "" where only uv can bring it."""
        own = f"{sys.version_info.major}.{sys.version_info.minor}"
        if wanted.python in ("", own):
            return sys.executable
        return shutil.which(f"python{wanted.python}", path=self._env.get("PATH")) or ""

    async def _run(self, argv: tuple[str, ...], tell: Report, more: Mapping[str, str] = _NOTHING) -> list[str]:
        """Run an installer, telling each line; its lines. ``more`` is for its environment."""
        env = {**self._env, **more, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "NO_COLOR": "1"}
        env.pop("PYTHONPATH", None)
        env.pop("VIRTUAL_ENV", None)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=(tell.lock,),
                limit=1 << 20,
            )
        except OSError as exc:
            raise RuntimeUnavailable(f"cannot start {argv[0]}: {exc.strerror}", hint=INSTALL) from exc
        lines: list[str] = []
        try:
            async with asyncio.timeout(DEADLINE):
                assert process.stdout is not None
                async for raw in process.stdout:
                    line = _USERINFO.sub("", raw.decode("utf-8", "replace")).strip()
                    if line:
                        lines.append(line[:500])
                        del lines[:-2000]
                        tell(line[:200])
                await process.wait()
        except TimeoutError as exc:
            raise SourceUnavailable(f"{Path(argv[0]).name} did not end in {DEADLINE:.0f} s") from exc
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode:
            raise SourceUnavailable(
                f"an engine's packages could not be installed: {' '.join(lines[-4:])[-600:]}",
                hint="Check the network and the package index of uv or pip, then try again.",
                data={"log": lines[-20:]},
            )
        return lines


def _whole(place: Path) -> bool:
    """Whether all is installed, and the Python that it was made from is still on this machine."""
    return (place / _MARK).is_file() and (place / "bin" / "python").exists()


def _create(tool: Tool, base: str, place: Path, version: str) -> tuple[str, ...]:
    if tool.kind == "uv":
        return (*tool.argv, "venv", "--no-project", "--python", base or version, str(place))
    if not base:
        raise RuntimeUnavailable(
            f"this engine needs Python {version}, which is not on this machine", hint=f"Install python{version}, or uv."
        )
    return (base, "-m", "venv", str(place))


def _install(tool: Tool, python: Path) -> tuple[str, ...]:
    if tool.kind == "uv":
        return (*tool.argv, "pip", "install", "--python", str(python))
    return (str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off")


def only_from(index: str, kind: str) -> tuple[str, ...]:
    """The options by which uv or pip takes packages from this index and from no other."""
    return ("--index", index, "--default-index", index) if kind == "uv" else ("--index-url", index)


def _listing(tool: Tool, python: Path) -> tuple[str, ...]:
    if tool.kind == "uv":
        return (*tool.argv, "pip", "freeze", "--python", str(python))
    return (str(python), "-m", "pip", "freeze")
