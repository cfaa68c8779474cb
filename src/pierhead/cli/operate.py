"""Verbs about what runs: ps, logs, stats, stop, status, version."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from pierhead import __version__
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import (
    age,
    drawn_table,
    duration,
    here,
    pairs,
    print_json,
    print_json_line,
    say,
    size,
    table,
    warn,
)
from pierhead.daemon.client import Client
from pierhead.errors import DaemonUnavailable, NotFound, UsageError


def running(client: Client) -> list[dict[str, Any]]:
    """All replicas; none without a daemon."""
    try:
        found: list[dict[str, Any]] = client.request("GET", "/replicas")
    except DaemonUnavailable:
        if client.version() is not None:
            raise
        return []
    return found


def _needs_daemon(client: Client, name: str) -> None:
    """NotFound when no daemon runs: then nothing does, and starting one would not change it."""
    if client.version() is None:
        raise NotFound(f"nothing runs as '{name}': no daemon is running", hint=f"`pier run {name}` starts a model.")


@click.command(cls=Verb)
@json_option
def ps(as_json: bool) -> None:
    """Show what runs."""
    found = running(Client(here()))
    if as_json:
        print_json(found)
        return
    on_gpu = any(r.get("devices") for r in found)
    rows = [
        (
            r["id"],
            r["model"],
            r["state"],
            r["runtime"],
            str(r["context"]),
            size(r["memory_estimate"]),
            size(r["memory_peak"]) if r.get("memory_peak") else "-",
            *((size(sum(r["devices"].values())) if r.get("devices") else "-",) if on_gpu else ()),
            str(r["requests_open"]),
            age(r["started"]).removesuffix(" ago"),
            "pinned" if r["pinned"] else age(r["expires_at"]) if r["expires_at"] else "-",
        )
        for r in found
    ]
    head = ("ID", "MODEL", "STATE", "RUNTIME", "CONTEXT", "MEMORY", "PEAK", *(("GPU",) if on_gpu else ()), "OPEN")
    last = len(head)
    spare = (6, last - 1, 3, 4, last, last + 1)
    table((*head, "UP", "UNLOADS"), rows, right=tuple(range(4, last)), fold=(1,), spare=spare)
    if not found:
        say("Nothing runs. `pier run MODEL` starts a model; so does the first request for it.")
    for r in found:
        if r["error"]:
            warn(f"{_numbered(r, found)}: {r['error']['message']}")


def _numbered(replica: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """A replica's model, and of one that keeps several how many answer."""
    if replica.get("wanted", 1) < 2:
        return str(replica["model"])
    ready = sum(r["digest"] == replica["digest"] and r["state"] == "ready" for r in found)
    return f"{replica['model']}: {ready} of {replica['wanted']} replicas answer"


@click.command(cls=Verb)
@click.argument("model", shell_complete=complete_model)
@option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines.")
@json_option
def logs(model: str, follow: bool, tail: int | None, as_json: bool) -> None:
    """Print the log of MODEL's engine (a model's name or a replica's id), or of `gateway` or `daemon`.

    An engine of a model of such a name is meant by its replica's id.
    """
    for line in _own_log(model, follow, tail) or _engine_log(model, follow, tail):
        if as_json:
            print_json_line({"line": line.decode("utf-8", "replace")})
            continue
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


def _engine_log(model: str, follow: bool, tail: int | None) -> Iterator[bytes]:
    client = Client(here())
    _needs_daemon(client, model)
    yield from client.lines("GET", f"/replicas/{model}/logs", query={"follow": follow or None, "tail": tail})


def _own_log(name: str, follow: bool, tail: int | None) -> Iterator[bytes] | None:
    """Of Pierhead's own processes; None for other names."""
    from pierhead.cli.logfiles import OWN, lines, own_log

    return lines(own_log(here(), name), tail, follow) if name in OWN else None


@click.command(cls=Verb)
@click.argument("models", nargs=-1, shell_complete=complete_model)
@option("-a", "--all", "everything", is_flag=True, help="Stop every model.")
@option("--daemon", is_flag=True, help="With --all: end the daemon and its gateway too.")
@option("--timeout", type=float, metavar="SECONDS", help="How long requests may still take.")
@json_option
def stop(models: tuple[str, ...], everything: bool, daemon: bool, timeout: float | None, as_json: bool) -> None:
    """Stop models, gracefully: requests that run are finished first.

    A model's name stops all of its replicas. A replica's id stops that one and does not replace it: its model keeps one
    less.
    """
    if not models and not everything:
        raise UsageError("name what to stop", hint="`pier ps` shows what runs; `pier stop --all` stops all of it.")
    if daemon and not everything:
        raise UsageError("--daemon goes with --all", hint="Type `pier stop --all --daemon`.")
    client = Client(here(), timeout=600)
    for model in models:
        _needs_daemon(client, model)
    targets = list(dict.fromkeys(r["model"] for r in running(client)) if everything else models)
    stopped: list[str] = []
    kept: dict[str, int] = {}
    for target in targets:
        query = {"timeout": timeout} if timeout is not None else None
        answer = client.request("DELETE", f"/replicas/{target}", query=query)
        stopped += answer["stopped"]
        kept |= answer.get("kept", {})
    if daemon:
        client.shutdown("stop")
    if as_json:
        print_json({"stopped": stopped, "kept": kept})
        return
    for model, left in kept.items():
        if left:
            say(f"{model} keeps {_replicas(left)} now; `pier run {model} --replicas N` changes that.")
    say(f"Stopped {_replicas(len(stopped))}." + (" The daemon ended." if daemon else ""))


def _replicas(count: int) -> str:
    return f"{count} replica{'s' if count != 1 else ''}"


def _gateway(found: dict[str, Any]) -> str:
    """The gateway's process, and what a person should see to."""
    return "\n".join([f"pid {found['pid']}, {found['connections']} connections", *found.get("problems", ())])


def addresses(found: dict[str, Any]) -> str:
    """Where clients find the gateway, with the scheme that each address speaks."""
    from pierhead.gateway.listeners import is_loopback, parse_address

    settings = found["settings"]["gateway"]

    def url(address: str) -> str:
        plain = is_loopback(parse_address(address)[0]) and not settings["tls_loopback"]
        return f"http{'s' if settings['tls_cert'] and not plain else ''}://{address}/v1"

    return "\n".join(map(url, found["listeners"]))


@click.command(cls=Verb)
@json_option
def status(as_json: bool) -> None:
    """Show the state of daemon, gateway and settings."""
    client = Client(here())
    try:
        found = client.request("GET", "/status")
    except DaemonUnavailable:
        if client.version() is not None:
            raise
        if as_json:
            print_json({"running": False, "version": __version__})
        else:
            click.echo("No daemon is running; `pier run` and `pier serve` start one.")
        return
    if as_json:
        print_json({"running": True, **found})
        return
    rows = [
        ("Daemon", f"version {found['version']}, pid {found['pid']}, up {duration(found['uptime_s'])}"),
        ("Gateway", _gateway(found["gateway"])),
        ("Address", addresses(found) or "unix socket only"),
        ("Models", f"{found['models']} in the store, {found['replicas']} running"),
    ]
    for runtime in found["runtimes"]:
        text = ", ".join(runtime["isolation"]) if runtime["available"] else f"not available: {runtime['reason']}"
        rows.append((f"Runtime {runtime['name']}", text))
    if found.get("route_problems"):
        rows.append(("Routes", "\n".join(found["route_problems"])))
    rows += [(f"Setting {name}", f"from {origin}") for name, origin in sorted(found["origins"].items())]
    pairs(rows)


@click.command(cls=Verb)
@json_option
def version(as_json: bool) -> None:
    """Print the versions of command and daemon."""
    found = Client(here()).version()
    daemon = found["version"] if found else None
    if as_json:
        print_json({"client": __version__, "daemon": daemon})
        return
    pairs([("pier", __version__), ("daemon", daemon or "not running")])


@click.command(cls=Verb)
@option("--no-stream", is_flag=True, help="One reading only.")
@option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between readings.")
@json_option
def stats(no_stream: bool, interval: float, as_json: bool) -> None:
    """Watch memory, CPU and processes of what runs."""
    query = {"interval": interval, "once": no_stream or None}
    client = Client(here())
    nothing: list[dict[str, Any]] = [{"replicas": []}]
    readings = client.stream("GET", "/replicas/stats", query=query) if client.version() else iter(nothing)
    if as_json:
        for reading in readings:
            print_json_line(reading)
        return
    if no_stream or not sys.stdout.isatty():
        for reading in readings:
            table(_STATS, _stat_rows(reading), right=_RIGHT, fold=(1,), spare=_SPARE)
            if not reading["replicas"]:
                say("Nothing runs.")
        return
    from rich.live import Live

    with Live(screen=False, auto_refresh=False) as live:
        for reading in readings:
            room = live.console.width
            made = drawn_table(_STATS, _stat_rows(reading), right=_RIGHT, fold=(1,), spare=_SPARE, room=room)
            live.update(made, refresh=True)


_RIGHT = (2, 3, 4, 5, 6)
_SPARE = (6, 4, 5)
_STATS = ("ID", "MODEL", "CPU %", "MEMORY", "LIMIT", "PIDS", "CPU TIME")


def _stat_rows(reading: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            r["id"],
            r["model"],
            f"{r['cpu_percent']:.0f}",
            size(r["memory"]),
            size(r["memory_limit"]) if r["memory_limit"] else "-",
            str(r["pids"]),
            f"{r['cpu_seconds']:.1f} s",
        )
        for r in reading["replicas"]
    ]
