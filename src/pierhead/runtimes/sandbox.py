"""The command line that confines an engine process: bubblewrap where it works, else what the system offers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pierhead.engines import bridge
from pierhead.engines.base import Mount
from pierhead.runtimes.base import NOBODY, Places

MODEL_DIR = "/model"
ENTRY = "/engine/entry"
BRIDGE = "/engine/bridge"
BUILT = "/engine/built"
OUTPUT = "/output"
SOCKET_DIR = "/run/pierhead"
UID = 65532
TMP_SIZE = 64 << 20

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
# What drivers in the user's space read beside the system's folders.
_DRIVERS = ("/etc/vulkan", "/etc/OpenCL", "/etc/nvidia")

INSTALL = (
    "bubblewrap does not work here: no network or filesystem isolation for processes. "
    "Install it (`apt install bubblewrap`); on Ubuntu 23.10 and newer also allow it unprivileged user namespaces "
    "(an AppArmor profile for bwrap, or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`)."
)


def inside(python: str = sys.executable) -> Places:
    """Where things are inside the sandbox."""
    return Places(python, ENTRY, MODEL_DIR, f"{SOCKET_DIR}/engine.sock", BRIDGE, built=BUILT, output=OUTPUT)


def bwrap_works() -> bool:
    """Whether a sandbox like ours can be made here; tried for real."""
    program = shutil.which("bwrap")
    if program is None:
        return False
    argv = [program, *_confine(), "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--", "/bin/true"]
    try:
        return subprocess.run(argv, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _confine() -> list[str]:
    return [
        "--unshare-user",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--uid",
        str(UID),
        "--gid",
        str(UID),
        "--hostname",
        "engine",
    ]


def bwrap(
    argv: tuple[str, ...],
    env: dict[str, str],
    *,
    model_dir: str,
    entry: str,
    sockets: str,
    python: str = sys.executable,
    tmp_size: int = 0,
    mounts: tuple[Mount, ...] = (),
    built: str = "",
    output: str = "",
    devices: Sequence[str] = (),
) -> list[str]:
    """``argv`` in a sandbox: no network, read-only system and model, private /tmp, no capabilities, not root.

    ``devices`` are files below ``/dev``; who gets one also sees what the kernel tells of the machine's devices.
    """
    command = [shutil.which("bwrap") or "bwrap", *_confine(), "--clearenv"]
    for name, value in {"PATH": "/usr/bin:/bin", **NOBODY, **env}.items():
        command += ["--setenv", name, value]
    for folder in _SYSTEM:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    for file in _FILES:
        command += ["--ro-bind-try", file, file]
    command += ["--size", str(tmp_size or TMP_SIZE), "--tmpfs", "/tmp"]  # noqa: S108  # first, since Python itself may live below it
    for prefix in _interpreter(python):
        command += ["--ro-bind", prefix, prefix]
    command += ["--proc", "/proc", "--dev", "/dev", *_hardware(devices)]
    command += ["--ro-bind", model_dir, MODEL_DIR, "--bind", sockets, SOCKET_DIR]
    if entry:
        command += ["--ro-bind", entry, ENTRY, "--ro-bind", str(bridge.ENTRY), BRIDGE]
    for mount in mounts:
        command += ["--ro-bind" if mount.read_only else "--bind", mount.source, mount.target]
    command += ["--ro-bind", built, BUILT] if built else []
    command += ["--bind", output, OUTPUT] if output else []
    return [*command, "--remount-ro", "/", "--chdir", "/", "--", *argv]


def _hardware(devices: Sequence[str]) -> list[str]:
    """What may be seen of the machine's devices: the processor, or all that the kernel says and some of their files."""
    places = ("/sys", *_DRIVERS) if devices else ("/sys/devices/system/cpu",)
    told = [word for place in places for word in ("--ro-bind-try", place, place)]
    return told + [word for file in devices for word in ("--dev-bind", file, file)]


def _interpreter(python: str) -> list[str]:
    """The folders of a Python and its packages that are not below a system folder."""
    found: list[str] = []
    own = (sys.base_prefix, sys.prefix) if python == sys.executable else (str(Path(python).parent.parent),)
    for prefix in (*own, str(Path(python).resolve().parent.parent)):
        inside_system = any(prefix == s or prefix.startswith(f"{s}/") for s in _SYSTEM)
        if not inside_system and not any(prefix == f or prefix.startswith(f"{f}/") for f in found):
            found.append(prefix)
    return found


def plain(argv: tuple[str, ...]) -> list[str]:
    """``argv`` that dies with its keeper and gains no privileges, without namespaces."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--no-new-privs", "--", *argv] if setpriv else list(argv)
