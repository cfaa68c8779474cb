"""Verbs about engines: which there are, what each needs and takes on the disk, and whether a template is sound."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verbs, json_option, option
from pierhead.cli.output import here, pairs, print_json, say, settings, several, size, table
from pierhead.errors import UsageError
from pierhead.gateway.operations import known
from pierhead.paths import Paths

if TYPE_CHECKING:
    from pierhead.engines.base import Engine, Environment
    from pierhead.runtimes.environment import Environments


@click.group(
    cls=Verbs,
    examples=(
        ("pier engine list", "All engines, and what their packages take on the disk."),
        ("pier engine show vllm", "What one is and can do."),
        ("pier engine install onnx", "Fetch its packages now, and not with the first model."),
        ("pier engine check ./config.toml", "Whether the engines that a file describes can work."),
        ("pier engine prune", "Remove the packages of engines; they come back when they are needed."),
    ),
)
def engine() -> None:
    """Show engines, install their packages, and check templates of your own."""


def _engines(paths: Paths) -> tuple[Engine, ...]:
    from pierhead.engines.registry import engines

    return engines(settings(paths).settings)


def _environments(paths: Paths) -> Environments:
    from pierhead.runtimes.environment import Environments

    wanted = settings(paths).settings
    return Environments(
        Path(wanted.runtime.environments or paths.state / "environments"), wanted.sources.pypi_installer
    )


def _told(paths: Paths, one: Engine) -> dict[str, Any]:
    """An engine as data: its facts, and its environments on the disk."""
    found = _environments(paths).of(one.name)
    return {
        **msgspec.to_builtins(one.facts),
        "installed": bool(found) or _wheels(one) is None,
        "environments": [place.name for place in found],
        "bytes": sum(_weight(place) for place in found),
        "template": one.name in settings(paths).settings.engines,
        "tried": "never" if one.facts.never_run else "in part" if one.facts.untested else "yes",
    }


def _wheels(one: Engine) -> Environment | None:
    """The packages that it needs whatever the model; None where it needs none."""
    found: Any = getattr(one, "environment", None)
    made: Any = found() if callable(found) else found
    return made


def _weight(folder: Path) -> int:
    """Bytes below a folder, as files are long."""
    found = 0
    for here_, _, names in os.walk(folder):
        found += sum(os.lstat(os.path.join(here_, name)).st_size for name in names)
    return found


@engine.command("list")
@json_option
def list_engines(as_json: bool) -> None:
    """List engines in the order in which they are asked whether they serve a model."""
    paths = here()
    found = [_told(paths, one) for one in _engines(paths)]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["name"],
            one["title"],
            ", ".join(one["formats"]),
            ", ".join(word for word in known(one["serves"]) if "-" not in word),
            ", ".join(one["accelerators"]),
            one["tried"] if not one["template"] else "-",
            size(one["bytes"]) if one["bytes"] else "built in" if one["installed"] else "not installed",
        )
        for one in found
    ]
    table(("NAME", "TITLE", "FORMATS", "SERVES", "RUNS ON", "TRIED", "PACKAGES"), rows, fold=(3,), spare=(4, 1))
    if any(one["untested"] for one in found):
        say("Tried: by this project, in its tests. `pier engine show NAME` says what was not.")


@engine.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what the engine NAME is, can do, and has on the disk."""
    paths = here()
    told = _told(paths, _named(paths, name))
    if as_json:
        print_json(told)
        return
    rows = [
        ("Name", told["name"]),
        ("Title", told["title"]),
        ("Formats", ", ".join(told["formats"])),
        ("Serves", ", ".join(known(told["serves"]))),
        ("Runs on", f"{', '.join(told['accelerators'])}; {', '.join(told['platforms'])}"),
        ("LoRA", {"start": "at its start", "runtime": "while it runs"}.get(told["lora"], "no")),
        ("Packages", f"{size(told['bytes'])} in {several(len(told['environments']), 'environment')}"),
    ]
    pairs([*rows, *([("Not tried", told["untested"])] if told["untested"] else [])])


@engine.command()
@click.argument("name")
@json_option
def install(name: str, as_json: bool) -> None:
    """Install the packages of the engine NAME, so that its first model starts sooner."""
    from pierhead.cli.progress import bars
    from pierhead.events import ignore

    paths = here()
    one = _named(paths, name)
    wheels = _wheels(one)
    if wheels is None:
        say(f"{name} needs no packages of its own.")
        return
    if as_json:
        python = asyncio.run(_environments(paths).ensure(one.name, wheels, ignore))
        print_json({"engine": name, "python": str(python)})
        return
    with bars() as listener:
        python = asyncio.run(_environments(paths).ensure(one.name, wheels, listener))
    say(f"Installed, {size(_weight(python.parent.parent))}.")


@engine.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@option("--all", "everything", is_flag=True, help="Those of all engines.")
@json_option
def prune(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Remove the packages of the engines NAME that nothing running uses; --all means every engine."""
    paths = here()
    if bool(names) == everything:
        raise UsageError("say whose packages to remove", hint="`pier engine prune NAME`, or --all.")
    for name in names:
        _named(paths, name)
    found = _environments(paths)
    chosen = [p for p in found.all() if everything or any(p.name.rpartition("-")[0] == name for name in names)]
    used = _running()
    gone = [place for place in chosen if not any(program.startswith(f"{place}{os.sep}") for program in used)]
    freed = sum(_weight(place) for place in gone)
    keep = frozenset(place.name for place in found.all()) - {place.name for place in gone}
    removed = found.prune(keep)
    if as_json:
        print_json({"removed": removed, "bytes": freed})
        return
    say(f"Removed {several(len(removed), 'environment')}, {size(freed)}.")
    if len(gone) < len(chosen):
        say(f"{several(len(chosen) - len(gone), 'environment')} stayed: something that runs uses them.")


def _running() -> list[str]:
    """The programs of all processes of this machine that can be seen, by their command lines' words."""
    import contextlib

    import psutil

    found: list[str] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += process.cmdline()
    return found


@engine.command()
@click.argument("file", type=click.Path(path_type=Path))
@option("--for", "model", metavar="MODEL", shell_complete=complete_model, help="Also show its command for a model.")
@json_option
def check(file: Path, model: str | None, as_json: bool) -> None:
    """Check the engines that FILE describes; with --for, show the command that would run."""
    from pierhead.config import load
    from pierhead.engines.command import Command
    from pierhead.errors import NotFound

    if not file.is_file():
        raise NotFound(f"no such file: {file}", hint="Name a settings file with [engines.NAME] tables.")
    found = load(file, {}).settings
    if not found.engines:
        raise UsageError(f"{file} describes no engine", hint="Write [engines.NAME]; docs/how-to/unknown-engine.md.")
    made = [Command(name, template, found.runtime.base_image) for name, template in found.engines.items()]
    plans = {one.name: _command(one, model) for one in made} if model else {}
    missing = [one for one in made if one.missing]
    if as_json:
        print_json([{"engine": o.name, "missing": o.missing, "command": plans.get(o.name)} for o in made])
        return
    for one in made:
        click.echo(f"{one.name}: serves {', '.join(one.facts.serves)} with {', '.join(one.facts.formats)}")
        if one.name in plans:
            click.echo(f"  {' '.join(plans[one.name])}")
    for one in missing:
        say(f"{one.name}: the program {one.missing} is not on this machine.")


def _command(one: Any, model: str) -> Sequence[str]:
    from pierhead.cli.models import open_store
    from pierhead.engines.base import PlanRequest

    record = open_store(here()).get(model)
    if not one.accepts(record.laid_out):
        raise UsageError(f"{one.name} does not serve '{model}': it reads {', '.join(one.facts.formats)}")
    return one.plan(PlanRequest("check", record.name, Path("/model"), record.laid_out, record.metadata)).spec.argv


def _named(paths: Paths, name: str) -> Engine:
    from pierhead.engines.registry import find

    return find(_engines(paths), name)
