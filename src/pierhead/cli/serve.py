"""The verb serve: the daemon in the foreground."""

from __future__ import annotations

import click

from pierhead.cli.help import Verb, option


@click.command(
    cls=Verb,
    examples=(
        ("pier serve", "On 127.0.0.1:12434, for this machine only."),
        ("pier serve --listen 127.0.0.1:8080 --listen docker", "… and for containers, as host.docker.internal."),
        ("pier key create team && pier serve --listen 0.0.0.0:12434", "For others too; they need the key."),
    ),
)
@option(
    "--listen",
    multiple=True,
    metavar="HOST:PORT",
    help="Address of the gateway; may be repeated. 'docker' means the Docker bridge. Beyond loopback a key is needed.",
)
@option("--idle-exit", type=float, metavar="SECONDS", help="End after so long without work (default: never).")
def serve(listen: tuple[str, ...], idle_exit: float | None) -> int:
    """Run the daemon and its gateway in the foreground.

    Every pulled model answers at http://127.0.0.1:12434/v1; a model starts on its first request. Ctrl-C ends all.
    """
    from pierhead.daemon.main import main

    args = [word for address in listen for word in ("--listen", address)]
    if idle_exit is not None:
        args += ["--idle-exit", str(idle_exit)]
    code = main(args)
    if code:
        raise SystemExit(code)
    return 0
