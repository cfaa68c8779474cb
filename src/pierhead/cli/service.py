"""Verbs about the systemd service: a user unit, or as root a system unit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from pierhead.cli.help import Verb, Verbs, json_option, option
from pierhead.cli.output import here, pairs, print_json, say
from pierhead.errors import AccessDenied, NotFound, PierError, RuntimeUnavailable, UsageError
from pierhead.paths import Paths

UNIT = "pierhead.service"
_FOLDERS = ("PIERHEAD_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR")

_TEXT = """\
[Unit]
Description=Pierhead: generative models behind one gateway
{after}
[Service]
Type=exec
ExecStart={program} -m pierhead.cli.main serve
Restart=on-failure
RestartSec=2
# The daemon lets running requests end; engines that are left after that end with the service.
KillMode=mixed
TimeoutStopSec=90
{environment}UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
{system}
[Install]
WantedBy={target}
"""
# Each of these takes a capability that a user's own service manager does not have to give. What would hide parts of
# /proc or forbid namespaces is left out on purpose: the engines' own, stricter sandbox needs both.
_SYSTEM_ONLY = """\
ProtectClock=yes
ProtectHostname=yes
ProtectKernelModules=yes
ProtectSystem=full
"""


@click.group(
    cls=Verbs,
    examples=(
        ("pier service install --print", "Look at the unit first."),
        ("pier service install", "Write, enable and start it: for yourself, or as root for the machine."),
    ),
)
def service() -> None:
    """Start Pierhead with the machine (systemd)."""


def unit_path(paths: Paths) -> Path:
    """Where the unit goes: the user's folder, or as root the system's."""
    if os.getuid() == 0:
        return Path("/etc/systemd/system") / UNIT
    return paths.config.parent / "systemd" / "user" / UNIT


def unit_text(env: dict[str, str] | None = None, *, root: bool | None = None) -> str:
    """The unit for this user and this installation; it keeps to the folders of the caller's environment."""
    env = dict(os.environ) if env is None else env
    root = os.getuid() == 0 if root is None else root
    kept = [name for name in _FOLDERS if env.get(name) and (root or name != "XDG_RUNTIME_DIR")]
    if env.get("PIERHEAD_HOME"):
        kept = ["PIERHEAD_HOME"]
    lines = [f"Environment={_quoted(f'{name}={env[name]}')}\n" for name in kept]
    return _TEXT.format(
        after=_after(root, "XDG_RUNTIME_DIR" in kept),
        program=_quoted(sys.executable),
        environment="".join(lines),
        system=_SYSTEM_ONLY if root else "",
        target="multi-user.target" if root else "default.target",
    )


def _after(root: bool, runtime_dir: bool) -> str:
    if not root:
        return ""
    text = "Wants=network-online.target\nAfter=network-online.target\n"
    if runtime_dir:  # /run/user/0 goes when nobody is logged in, unless something holds it
        text += "Requires=user-runtime-dir@0.service\nAfter=user-runtime-dir@0.service\n"
    return text


def _quoted(text: str) -> str:
    """A word for a unit file; ``%`` and ``$`` lose their meaning."""
    if any(ord(c) < 32 for c in text):
        raise UsageError("a folder's name has a control character", hint="Move Pierhead to a folder without one.")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if escaped != text or " " in text or "'" in text else text


def _systemctl(*args: str, check: bool = True) -> str:
    program = shutil.which("systemctl")
    if program is None or not Path("/run/systemd/system").is_dir():
        raise RuntimeUnavailable(
            "systemd does not run here",
            hint="`pier service install --print` shows the unit; run `pier serve` yourself.",
        )
    scope = [] if os.getuid() == 0 else ["--user"]
    try:
        done = subprocess.run([program, *scope, *args], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as exc:
        raise RuntimeUnavailable(f"systemctl {' '.join(args)} did not end", hint="Try it by hand.") from exc
    if check and done.returncode:
        raise RuntimeUnavailable(f"systemctl {' '.join(args)} failed: {done.stderr.strip()}", hint="Try it by hand.")
    return done.stdout.strip()


@service.command(cls=Verb)
@option("--print", "only_print", is_flag=True, help="Print the unit and change nothing.")
def install(only_print: bool) -> None:
    """Write the unit, enable and start it."""
    if only_print:
        click.echo(unit_text(), nl=False)
        return
    path = unit_path(here())
    _systemctl("--version")
    _write(path, unit_text())
    _systemctl("daemon-reload")
    _systemctl("enable", UNIT)
    _systemctl("restart", UNIT)
    say(f"Wrote {path}, enabled and started it.")
    if os.getuid() != 0:
        say("To start it with the machine, not with your login: loginctl enable-linger")


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, "utf-8")
        fresh.replace(path)
    except PermissionError as exc:
        raise AccessDenied(f"cannot write {path}", hint="Check who owns the folder.") from exc
    finally:
        fresh.unlink(missing_ok=True)


def _installed() -> Path:
    path = unit_path(here())
    if not path.exists():
        raise NotFound(f"there is no unit at {path}", hint="`pier service install` makes one.")
    return path


@service.command(cls=Verb)
def uninstall() -> None:
    """Stop, disable and remove the unit."""
    path = _installed()
    _systemctl("disable", "--now", UNIT)
    path.unlink()
    _systemctl("daemon-reload")
    say(f"Removed {path}.")


@service.command(cls=Verb)
@json_option
def status(as_json: bool) -> None:
    """Say whether the unit is there and runs."""
    path = unit_path(here())
    found = {"unit": str(path), "installed": path.exists(), "active": "unknown", "enabled": "unknown"}
    try:
        found["active"] = _systemctl("is-active", UNIT, check=False)
        found["enabled"] = _systemctl("is-enabled", UNIT, check=False)
    except PierError as exc:
        if not as_json:
            say(exc.message)
    if as_json:
        print_json(found)
        return
    pairs([("Unit", str(path) if found["installed"] else "not installed (pier service install)")])
    if found["installed"]:
        pairs([("Active", str(found["active"])), ("Enabled", str(found["enabled"]))])
