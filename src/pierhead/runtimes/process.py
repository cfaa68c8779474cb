"""The process runtime: each replica a sandboxed process with a shim that owns it; no container engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pierhead.config import RuntimeSettings
from pierhead.engines import bridge
from pierhead.engines.base import LaunchSpec
from pierhead.errors import EngineFailed, RuntimeUnavailable, UsageError
from pierhead.events import Listener, Note
from pierhead.runtimes import devices, sandbox
from pierhead.runtimes.base import Capabilities, ExecResult, Exit, Places, Stats, expand
from pierhead.runtimes.cgroup import Cgroup
from pierhead.runtimes.environment import Environments
from pierhead.runtimes.family import below
from pierhead.runtimes.gpu import NVML
from pierhead.runtimes.job import OUTPUT
from pierhead.runtimes.logfile import read_log
from pierhead.runtimes.readiness import Notify

SHIM = Path(__file__).with_name("shim.py")
OUTPUT_LIMIT = 1 << 20
EXEC_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}  # nothing of the daemon's own
RLIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 4096, "RLIMIT_FSIZE": 1 << 30}
JOB_RLIMITS = {"RLIMIT_FSIZE": 1 << 42}  # what it writes is what it is for


class ShimState(msgspec.Struct, frozen=True):
    """``shim.json``: who keeps the engine; a pid counts only with its boot and start time."""

    boot: str
    pid: int
    start: int
    engine: int


class ProcessInstance:
    """One engine process, seen through its shim."""

    def __init__(self, spec: LaunchSpec, folder: Path, pidfd: int, shim: int, notify: Notify | None) -> None:
        self._spec = spec
        self.folder = folder
        self.notify = notify
        self.shim = shim
        self._pidfd = pidfd
        self._cgroup = Cgroup(spec.replica)
        self._cgroup.attach()
        self._ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @property
    def spec(self) -> LaunchSpec:
        return self._spec

    @property
    def socket(self) -> str:
        return str(self.folder / "s" / "engine.sock")

    @property
    def output(self) -> Path | None:
        """See ``Instance.output``."""
        return self.folder / OUTPUT if self._spec.kind == "job" else None

    @property
    def pid(self) -> int | None:
        """The shim's process id."""
        return None if self._ended.done() else self.shim

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.shim, os.WNOHANG)
        if self.notify is not None:
            self.notify.close()
        self._ended.set_result(self._read_exit())

    def _read_exit(self) -> Exit:
        try:
            found = msgspec.json.decode((self.folder / "exit.json").read_bytes(), type=Exit)
        except (FileNotFoundError, msgspec.DecodeError):
            found = Exit(137, signal.SIGKILL, at=time.time(), reason="lost its shim, which was killed")
        oom = found.signal == signal.SIGKILL and self._cgroup.oom_kills() > 0
        return msgspec.structs.replace(found, oom=oom)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._ended)

    async def stop(self, timeout: float | None = None) -> Exit:
        grace = self._spec.stop_timeout if timeout is None else timeout
        if not self._ended.done():
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace):
                    await self.wait()
            except TimeoutError:
                self._kill()
        found = await self.wait()
        await asyncio.to_thread(self._cgroup.remove)
        shutil.rmtree(self.folder, ignore_errors=True)
        return found

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _kill(self) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._signal(signal.SIGKILL)

    def _family(self) -> list[psutil.Process]:
        """The engine and what it started, without the shim; the innermost last."""
        return [] if self._ended.done() else below(self.shim)

    async def stats(self) -> Stats:
        """See ``Instance.stats``."""
        return await asyncio.to_thread(self._read_stats)

    def _read_stats(self) -> Stats:
        memory = pids = anonymous = mapped = 0
        cpu = 0.0
        read = written = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                used = process.memory_info()
                memory += used.rss
                mapped += used.shared
                anonymous += used.rss - used.shared
                times = process.cpu_times()
                cpu += times.user + times.system
                counters = process.io_counters()
                read, written = read + counters.read_bytes, written + counters.write_bytes
                pids += process.num_threads()
        limit = self._cgroup.memory_limit() or self._spec.limits.memory
        return Stats(memory, limit, cpu, pids, read, written, time.time(), anonymous, mapped)

    def logs(self, *, tail: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        return read_log(self.folder / "log", self._ended, tail=tail, follow=follow)

    async def exec(self, argv: tuple[str, ...], *, timeout: float = 30.0) -> ExecResult:
        family = self._family()
        if not family:
            raise EngineFailed(
                f"'{self._spec.model}' does not run", hint=f"Start it with `pier run {self._spec.model}`."
            )
        enter: list[str] = []
        if (self.folder / "bwrap").exists():
            enter = ["nsenter", "-t", str(family[-1].pid), "-U", "-m", "-n", "-p", "-i", "-u"]
            enter += ["-S", str(sandbox.UID), "-G", str(sandbox.UID), "--"]
        process = await asyncio.create_subprocess_exec(
            *enter,
            *argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=EXEC_ENV,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(timeout):
                out, err = await asyncio.gather(_bounded(process.stdout), _bounded(process.stderr))
                await process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return ExecResult(process.returncode or 0, out, err)

    async def attach(self) -> tuple[Any, Any]:
        raise UsageError("this instance was started without stdio", hint="Set stdio in its launch spec.")


class ProcessRuntime:
    """Starts engines as processes of this user below ``replicas_dir``."""

    def __init__(self, replicas_dir: Path, settings: RuntimeSettings, environments: Environments | None = None) -> None:
        self._root = replicas_dir
        self._settings = settings
        self._environments = environments or Environments(replicas_dir.parent / "environments")
        self._bwrap: bool | None = None

    async def _sandboxed(self) -> bool:
        if self._settings.sandbox == "plain":
            return False
        if self._bwrap is None:
            self._bwrap = await asyncio.to_thread(sandbox.bwrap_works)
        if not self._bwrap and self._settings.sandbox == "bwrap":
            raise RuntimeUnavailable(
                "the bubblewrap sandbox was asked for but does not work here", hint=sandbox.INSTALL
            )
        return self._bwrap

    async def capabilities(self, spec: LaunchSpec | None = None) -> Capabilities:
        """See ``Runtime.capabilities``."""
        try:
            confined = await self._sandboxed()
        except RuntimeUnavailable as exc:
            return Capabilities(name="process", available=False, reason=exc.message, missing=(sandbox.INSTALL,))
        can = Cgroup("probe").possible()
        spaces = ("network", "filesystem", "processes", "capabilities", "user") if confined else ()
        missing = () if confined else (sandbox.INSTALL,)
        here = spec is None or spec.environment is None or self._python(spec) is not None
        if not can:
            missing += ("No control group can be made here: memory, process and CPU limits are not enforced.",)
        return Capabilities(name="process", available=True, isolation=(*spaces, *can), missing=missing, prepared=here)

    async def prepare(self, spec: LaunchSpec, listener: Listener) -> LaunchSpec:
        """Install the engine's own environment where it has one; says what isolation is missing."""
        if not await self._sandboxed():
            listener(Note(message=sandbox.INSTALL, level="warning"))
        if spec.environment is not None:
            with devices.wanting(spec.devices):
                await self._environments.ensure(spec.engine, spec.environment, listener)
        return spec

    def _python(self, spec: LaunchSpec) -> str | None:
        """The Python that runs this engine; None while its environment is not here."""
        if spec.environment is None:
            return sys.executable
        found = self._environments.find(spec.engine, spec.environment)
        return None if found is None else str(found)

    async def start(self, spec: LaunchSpec) -> ProcessInstance:
        """See ``Runtime.start``."""
        confined = await self._sandboxed()
        folder = self._root / spec.replica
        sockets = folder / "s"
        sockets.mkdir(parents=True, mode=0o700, exist_ok=True)
        if spec.kind == "job":
            (folder / OUTPUT).mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        for name in ("bwrap", "exit.json", "shim.json", "log", "log.1"):
            (folder / name).unlink(missing_ok=True)
        (sockets / "engine.sock").unlink(missing_ok=True)
        (folder / "log").touch(0o600)  # who follows it at once finds it
        limits = msgspec.structs.replace(
            spec.limits, pids=spec.limits.pids or self._settings.pids, cpus=spec.limits.cpus or self._settings.cpus
        )
        group = Cgroup(spec.replica)
        group.create(limits)
        notify = Notify(sockets)
        try:
            minors = await asyncio.to_thread(NVML.minors) if spec.devices else {}
            argv, env = self._command(spec, folder, confined, devices.files(spec.devices, minors))
            run = {
                "argv": argv,
                "env": env,
                "rlimits": RLIMITS | (JOB_RLIMITS if spec.kind == "job" else {}),
                "cgroups": group.procs(),
                "confined": confined,
            }
            (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
            (folder / "run.json").write_bytes(msgspec.json.encode(run))
            shim = _spawn(folder)
            return ProcessInstance(spec, folder, os.pidfd_open(shim), shim, notify)
        except BaseException:
            notify.close()
            group.remove()
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _command(
        self, spec: LaunchSpec, folder: Path, confined: bool, files: list[str]
    ) -> tuple[list[str], dict[str, str]]:
        sockets = folder / "s"
        python = self._python(spec)
        if python is None:
            raise RuntimeUnavailable(f"the environment of the engine {spec.engine} is gone", hint="Try again.")
        if not confined:
            places = Places(python, spec.entry, spec.model_dir, str(sockets / "engine.sock"), str(bridge.ENTRY), False)
            places = msgspec.structs.replace(places, built=spec.built, output=str(folder / OUTPUT))
            argv, env = expand(spec, places)
            own = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **devices.visible(spec.devices)}
            return sandbox.plain(argv), own | env
        argv, env = expand(spec, sandbox.inside(python))
        (folder / "bwrap").touch()
        command = sandbox.bwrap(
            argv,
            env,
            model_dir=spec.model_dir,
            entry=spec.entry,
            sockets=str(sockets),
            python=python,
            tmp_size=spec.tmp_size,
            mounts=spec.mounts,
            built=spec.built,
            output=str(folder / OUTPUT) if spec.kind == "job" else "",
            devices=files,
        )
        return command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}

    async def list(self) -> list[str]:
        """See ``Runtime.list``."""
        if not self._root.is_dir():
            return []
        return sorted(p.name for p in self._root.iterdir() if (p / "run.json").exists())

    async def adopt(self, replica: str) -> ProcessInstance | None:
        """See ``Runtime.adopt``; what is left of a replica that ended is removed."""
        folder = self._root / replica
        try:
            spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=LaunchSpec)
            state = msgspec.json.decode((folder / "shim.json").read_bytes(), type=ShimState)
            pidfd = os.pidfd_open(state.pid)
        except (OSError, OverflowError, msgspec.DecodeError):
            await asyncio.to_thread(self._forget, replica)
            return None
        if (state.boot, state.start) != (_boot(), _started(state.pid)):
            os.close(pidfd)
            await asyncio.to_thread(self._forget, replica)
            return None
        return ProcessInstance(spec, folder, pidfd, state.pid, None)

    def _forget(self, replica: str) -> None:
        folder = self._root / replica
        if (folder / "run.json").exists():
            group = Cgroup(replica)
            group.attach()
            group.remove()
            shutil.rmtree(folder, ignore_errors=True)


async def _bounded(stream: asyncio.StreamReader) -> bytes:
    """What the stream says up to the limit; the rest is read and dropped."""
    kept = bytearray()
    while chunk := await stream.read(1 << 16):
        kept += chunk[: OUTPUT_LIMIT - len(kept)]
    return bytes(kept)


def _spawn(folder: Path) -> int:
    """Start the shim in a session of its own; nothing of this process leaks into it."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        files = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
        argv = [sys.executable, "-I", "-S", "-E", str(SHIM), str(folder)]
        return os.posix_spawn(sys.executable, argv, {"LANG": "C.UTF-8"}, file_actions=files, setsid=True)
    finally:
        os.close(null)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int:
    """Start time in clock ticks since boot; -1 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return -1
