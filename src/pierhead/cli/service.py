"""Verbs about the systemd service: a user unit, or as root a system unit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from pierhead.cli.output import here, say
from pierhead.errors import AccessDenied, NotFound, RuntimeUnavailable
from pierhead.paths import Paths

UNIT = "pierhead.service"

TEXT = """\
[Unit]
Description=Pierhead: generative models behind one gateway
Documentation=file:///usr/share/doc/pierhead
After=network-online.target

[Service]
Type=exec
ExecStart={python} -m pierhead.cli.main serve
Restart=on-failure
RestartSec=2
# Engines outlive the daemon and are adopted by the next one; stopping the service ends all of them.
KillMode=mixed
TimeoutStopSec=90
{environment}NoNewPrivileges=yes
ProtectClock=yes
ProtectKernelModules=yes
RestrictRealtime=yes
LockPersonality=yes
UMask=0077

[Install]
WantedBy={target}
"""


@click.group()
def service() -> None:
    """Start Pierhead with the machine (systemd)."""


def unit_path(paths: Paths) -> Path:
    """Where the unit goes: the user's folder, or as root the system's."""
    if os.getuid() == 0:
        return Path("/etc/systemd/system") / UNIT
    return paths.config.parent / "systemd" / "user" / UNIT


def unit_text() -> str:
    """The unit for this user and this installation."""
    home = os.environ.get("PIERHEAD_HOME")
    environment = f'Environment="PIERHEAD_HOME={home}"\n' if home else ""
    target = "multi-user.target" if os.getuid() == 0 else "default.target"
    return TEXT.format(python=sys.executable, environment=environment, target=target)


def _systemctl(*args: str) -> None:
    program = shutil.which("systemctl")
    if program is None or not Path("/run/systemd/system").is_dir():
        raise RuntimeUnavailable(
            "systemd does not run here",
            hint="`pier service install --print` shows the unit; run `pier serve` yourself.",
        )
    scope = [] if os.getuid() == 0 else ["--user"]
    done = subprocess.run([program, *scope, *args], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeUnavailable(f"systemctl {' '.join(args)} failed: {done.stderr.strip()}", hint="Try it by hand.")


@service.command()
@click.option("--print", "only_print", is_flag=True, help="Print the unit and change nothing.")
def install(only_print: bool) -> None:
    """Write the unit, enable and start it."""
    if only_print:
        click.echo(unit_text(), nl=False)
        return
    path = unit_path(here())
    _systemctl("--version")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(unit_text(), "utf-8")
    except PermissionError as exc:
        raise AccessDenied(f"cannot write {path}", hint="Check who owns the folder.") from exc
    _systemctl("daemon-reload")
    _systemctl("enable", "--now", UNIT)
    say(f"Wrote {path}, enabled and started it.")
    if os.getuid() != 0:
        say("To start it without a login: loginctl enable-linger")


@service.command()
def uninstall() -> None:
    """Stop, disable and remove the unit."""
    path = unit_path(here())
    if not path.exists():
        raise NotFound(f"there is no unit at {path}", hint="`pier service install` makes one.")
    _systemctl("disable", "--now", UNIT)
    path.unlink()
    _systemctl("daemon-reload")
    say(f"Removed {path}.")


@service.command()
def status() -> None:
    """Say whether the unit is there and runs."""
    path = unit_path(here())
    if not path.exists():
        raise NotFound(f"there is no unit at {path}", hint="`pier service install` makes one.")
    scope = [] if os.getuid() == 0 else ["--user"]
    program = shutil.which("systemctl") or "systemctl"
    done = subprocess.run([program, *scope, "is-active", UNIT], capture_output=True, text=True, timeout=30, check=False)
    click.echo(f"{path}: {done.stdout.strip() or done.stderr.strip()}")
