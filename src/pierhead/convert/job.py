"""Runs a program of ``jobs`` in its environment, sandboxed where that works; knows nothing of what it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pierhead.engines.base import Environment
from pierhead.errors import EngineFailed, PierError, UnsafeContent, UsageError
from pierhead.events import Listener
from pierhead.runtimes import sandbox
from pierhead.runtimes.environment import Environments

MAX_LINE = 1 << 20
_KEPT = 40
_JOBS = Path(__file__).resolve().parent / "jobs"
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Job:
    """A program, the environment it needs, what it is told (JSON), and room for its temporary files in bytes."""

    script: str
    name: str
    environment: Environment
    told: dict[str, Any]
    tmp_size: int = 0


class Workshop:
    """Where jobs run: ``environments`` brings what they need; ``confined`` whether a sandbox works here."""

    def __init__(self, environments: Environments, *, confined: bool) -> None:
        self._environments = environments
        self._confined = confined

    async def run(self, job: Job, source: Path, target: Path, listener: Listener, tell: Progress) -> dict[str, Any]:
        """The result of a job that reads the folder ``source`` and writes below ``target``.

        It has no network. Ended, whatever it does, when this is cancelled; EngineFailed with its last words when it
        fails.
        """
        python = str(await self._environments.ensure(job.name, job.environment, listener))
        argv, env = self._command(job, python, source, target)
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            limit=MAX_LINE,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            result, words = await asyncio.gather(_results(process.stdout, tell), _words(process.stderr))
            await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return _outcome(process.returncode, result, words)

    def _command(self, job: Job, python: str, source: Path, target: Path) -> tuple[list[str], dict[str, str]]:
        env = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        told = json.dumps(job.told)
        if self._confined:
            argv = (python, "-I", f"{sandbox.ENTRY}/{job.script}", sandbox.MODEL_DIR, sandbox.SOCKET_DIR, told)
            command = sandbox.bwrap(
                argv,
                env,
                model_dir=str(source),
                entry=str(_JOBS),
                sockets=str(target),
                python=python,
                tmp_size=job.tmp_size,
            )
            return command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        path = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": str(target)}
        return sandbox.plain((python, "-I", str(_JOBS / job.script), str(source), str(target), told)), {**path, **env}


async def _results(stream: asyncio.StreamReader, tell: Progress) -> dict[str, Any]:
    """The lines of a job are JSON: ``progress``, and at the end ``result`` or ``error``."""
    result: dict[str, Any] = {}
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than any line of ours
            continue
        if not line:
            return result
        try:
            found: Any = json.loads(line)
        except ValueError:
            continue
        if not isinstance(found, dict):
            continue
        said = cast("dict[str, Any]", found)
        if isinstance(said.get("progress"), int | float):
            tell(str(said.get("text", ""))[:200], float(said["progress"]))
        else:
            result = said


async def _words(stream: asyncio.StreamReader) -> list[str]:
    kept: list[str] = []
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return kept
        if text := line.decode("utf-8", "replace").strip():
            kept.append(text[:500])
            del kept[:-_KEPT]


def _outcome(code: int | None, said: dict[str, Any], words: list[str]) -> dict[str, Any]:
    if not code and isinstance(said.get("result"), dict):
        return cast("dict[str, Any]", said["result"])
    error = said.get("error")
    log = {"log": words[-20:]}
    if isinstance(error, str):
        kinds: dict[str, type[PierError]] = {"usage": UsageError, "unsafe": UnsafeContent}
        raise kinds.get(str(said.get("kind")), EngineFailed)(
            error[:600], hint=str(said.get("hint") or "") or None, data=log
        )
    if code and code < 0:
        why = "it was killed, perhaps for lack of memory" if code == -signal.SIGKILL else f"signal {-code}"
    else:
        why = words[-1] if words else f"exit status {code}"
    raise EngineFailed(f"the conversion broke off: {why}", hint="`pier doctor` looks at this machine.", data=log)
