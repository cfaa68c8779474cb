"""The keeper of one engine process: starts it, keeps its log, records how it ended; outlives the daemon.

Standalone (standard library only, no site-packages), started as ``python -I -S -E shim.py FOLDER``. In FOLDER it reads
``run.json`` and writes ``shim.json``, ``log``, ``log.1`` and ``exit.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

LOG_LIMIT = 4 << 20


def write(path: str, value: object) -> None:
    """Replace a JSON file in one step."""
    with open(path + ".new", "w") as file:
        json.dump(value, file)
    os.replace(path + ".new", path)


def started(pid: int) -> int:
    """A process's start time in clock ticks since boot, which with the boot id makes its pid unique."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def limit(limits: dict[str, int]) -> None:
    """Resource limits, for this process and all below it."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        top = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (top, top))


def copy_log(source: int) -> None:
    """Write what the engine says to ``log``; when it is full it becomes ``log.1``."""
    out = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    size = os.fstat(out).st_size
    while chunk := os.read(source, 1 << 16):
        if size > LOG_LIMIT:
            os.close(out)
            os.replace("log", "log.1")
            out = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            size = 0
        with contextlib.suppress(OSError):  # a full disk costs log lines, not the engine
            size += os.write(out, chunk)
    os.close(out)


def program(pid: int, confined: bool) -> int:
    """The engine itself: bubblewrap's grandchild, as neither its monitor nor its init passes signals on."""
    try:
        for _ in range(2 if confined else 0):
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                pid = int(file.read().split()[0])
    except (OSError, IndexError):
        pass  # it is not that far, or gone: the outermost takes all of it down
    return pid


def main() -> int:
    """Run the engine of the folder to its end."""
    os.chdir(sys.argv[1])
    os.umask(0o077)
    with open("run.json") as file:
        run = json.load(file)
    for group in run["cgroups"]:
        try:
            with open(group, "w") as file:
                file.write("0")
        except OSError:
            pass  # the runtime reported it as missing when it made the plan
    limit(run["rlimits"])
    engine: subprocess.Popen[bytes] | None = None
    confined = bool(run["confined"])

    def forward(number: int, _frame: object) -> None:
        if engine is None:
            sys.exit(128 + number)
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(program(engine.pid, confined), number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    reader, writer = os.pipe()
    try:
        engine = subprocess.Popen(
            run["argv"], env=run["env"], stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, close_fds=True
        )
    except OSError as exc:
        write("exit.json", {"code": 127, "signal": 0, "at": time.time(), "reason": f"could not be started: {exc}"})
        return 127
    os.close(writer)
    own = os.getpid()
    write("shim.json", {"boot": boot(), "pid": own, "start": started(own), "engine": engine.pid})
    log = threading.Thread(target=copy_log, args=(reader,), daemon=True)
    log.start()
    code = engine.wait()
    log.join(1.0)  # something that the engine left behind may hold the pipe open for ever
    if confined and code > 128:  # bubblewrap's way to tell of a signal
        code = 128 - code
    how = {"code": code if code >= 0 else 128 - code, "signal": max(0, -code), "at": time.time(), "reason": ""}
    write("exit.json", how)
    return 0


if __name__ == "__main__":
    os._exit(main())  # who waits for this end need not wait for the interpreter's
