"""The daemon's command line and start: quick things first, so that the slow imports overlap with the gateway's."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from pierhead.config import Loaded, load
from pierhead.daemon import gateway_process, lifecycle
from pierhead.daemon.lifecycle import AlreadyRunning, Announcer, Held
from pierhead.errors import PierError, from_dict
from pierhead.gateway.link import Snapshot
from pierhead.gateway.listeners import is_loopback, parse_address
from pierhead.paths import Paths, resolve

DOCKER_PORT = 12434


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns the exit code. With ``--background`` the caller's process leaves once it listens."""
    args = _parse(argv)
    paths = resolve()
    announcer = Announcer(args.ready_fd)
    try:
        lifecycle.make_folders(paths)
        if args.background:
            announcer = Announcer(lifecycle.go_background(paths, args.ready_fd, _report))
        return _start(paths, args, announcer)
    except AlreadyRunning as exc:
        if args.background:
            announcer.ready({"already": True})
            return 0
        return _refuse(exc)
    except PierError as exc:
        announcer.failed(exc)
        return _refuse(exc)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pierhead.daemon", description="Pierhead's daemon.")
    parser.add_argument("--listen", action="append", metavar="ADDR", help="HOST:PORT, or docker; may be repeated")
    parser.add_argument(
        "--idle-exit", type=float, metavar="S", help="end after S seconds with nothing to do (0: never)"
    )
    parser.add_argument("--background", action="store_true", help="return once it listens, and go on without terminal")
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _start(paths: Paths, args: argparse.Namespace, announcer: Announcer) -> int:
    loaded = load(paths.config / "config.toml", flags=_flags(args))
    for number in (signal.SIGTERM, signal.SIGINT):  # until the loop takes over: clean up and leave
        signal.signal(number, _leave)
    lifecycle.set_up_logging(paths, loaded.settings.daemon.log_level, background=args.background)
    held = lifecycle.become_daemon(paths)
    try:
        _run(paths, loaded, held, announcer, idle_exit=_idle_exit(args, loaded))
    finally:
        held.release()
    return 0


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    if not args.listen:
        return {}
    return {"gateway.listen": [f"docker:{DOCKER_PORT}" if a == "docker" else a for a in args.listen]}


def _idle_exit(args: argparse.Namespace, loaded: Loaded) -> float:
    """In the foreground somebody wants it up: it does not leave by itself unless told to."""
    if args.idle_exit is not None:
        return args.idle_exit
    return loaded.settings.daemon.idle_exit if args.background else 0.0


def _run(paths: Paths, loaded: Loaded, held: Held, announcer: Announcer, *, idle_exit: float) -> None:
    early = _early_gateway(paths, loaded)
    try:
        from pierhead.daemon import app

        asyncio.run(app.run(paths, loaded, held, announcer, early, idle_exit=idle_exit))
    except BaseException:
        if early is not None:
            early.process.terminate()
        raise


def _early_gateway(paths: Paths, loaded: Loaded) -> gateway_process.Spawned | None:
    """A new gateway, unless one runs, so that it starts while the rest of the daemon is imported."""
    running = gateway_process.connect(paths)
    if running is not None:
        running.close()
        return None
    gateway_process.retire_strays(paths)
    gateway = loaded.settings.gateway
    snapshot = None
    if gateway.require_key or not all(is_loopback(parse_address(a)[0]) for a in gateway.listen):
        from pierhead.daemon.keys import Keys

        keys = Keys(paths.database, paths.state / "pepper")
        accepted = keys.accepted()
        snapshot = Snapshot(version=0, keys=accepted, pepper=keys.pepper().hex() if accepted else "")
    return gateway_process.spawn(paths, gateway, snapshot)


def _refuse(error: PierError) -> int:
    print(f"Error: {error.message}", file=sys.stderr)  # noqa: T201
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)  # noqa: T201
    return error.exit_code


def _report(answer: dict[str, Any]) -> int:
    if not answer:
        print("Error: the daemon ended while it was starting", file=sys.stderr)  # noqa: T201
        return 1
    if "error" in answer:
        return _refuse(from_dict(answer["error"]))
    with contextlib.suppress(BrokenPipeError, OSError):
        os.write(1, b"a daemon runs already\n" if answer.get("already") else b"the daemon runs\n")
    return 0
