"""The verb bench: loads a model as many clients would, and shows or compares what was measured."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import platform
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import here, say
from pierhead.errors import PierError, UsageError

if TYPE_CHECKING:
    from pierhead.loadtest.client import Target
    from pierhead.loadtest.plan import Load
    from pierhead.loadtest.report import Report
    from pierhead.loadtest.session import Trial

T = TypeVar("T")
_LOAD, _REQUEST, _SERVER, _OUTPUT = "Load", "Requests", "Server", "Output"
_MOST = 4096
_EXAMPLES = (
    ("pier bench smollm2", "1, 2, 4 and 8 requests at once."),
    ("pier bench smollm2 --rate 2,4 --duration 30", "Two, then four arrivals per second, as they come in life."),
    ("pier bench smollm2 --save before.json", "Keep the figures."),
    ("pier bench smollm2 --compare before.json", "Measure again, and say what changed beyond the noise."),
    ("pier bench --compare before.json after.json", "Compare what was kept; nothing is measured."),
    ("pier bench my-model --url http://gpu-box:8000/v1 --key env:API_KEY", "Another server that speaks OpenAI's API."),
)


@click.command(cls=Verb, examples=_EXAMPLES)
@click.argument("model", required=False, shell_complete=complete_model)
@option("--concurrency", metavar="N,N…", section=_LOAD, help="So many requests always under way [default: 1,2,4,8].")
@option(
    "--rate", metavar="N,N…", section=_LOAD, help="So many arrivals per second, at random (Poisson), answered or not."
)
@option(
    "--duration",
    type=click.FloatRange(0.1, 86400),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    section=_LOAD,
    help="Of each round of each load.",
)
@option(
    "--requests",
    type=click.IntRange(1, 10_000_000),
    metavar="N",
    section=_LOAD,
    help="End a round after N requests instead.",
)
@option(
    "--rounds",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    section=_LOAD,
    help="Of every load, in turn; their noise is what --compare weighs.",
)
@option(
    "--warmup",
    type=click.IntRange(0, 100_000),
    metavar="N",
    section=_LOAD,
    help="Requests before anything counts [default: as many as at once].",
)
@option(
    "--seed",
    type=int,
    default=1,
    show_default=True,
    section=_LOAD,
    help="Of arrivals and prompts: the same seed sends the same.",
)
@option(
    "--prompt-tokens",
    type=click.IntRange(1, 1 << 20),
    default=128,
    show_default=True,
    section=_REQUEST,
    help="Length of prompts, each of which is different.",
)
@option(
    "--output-tokens",
    type=click.IntRange(1, 1 << 20),
    default=32,
    show_default=True,
    section=_REQUEST,
    help="Length of answers.",
)
@option(
    "--dataset",
    type=click.Path(path_type=Path),
    metavar="FILE",
    section=_REQUEST,
    help="Your own prompts: JSON lines with prompt or messages.",
)
@option(
    "--ignore-eos/--no-ignore-eos",
    default=None,
    section=_REQUEST,
    help="Answers go on to their full length [default: yes, without --dataset].",
)
@option(
    "--task",
    type=click.Choice(["chat", "completions", "embeddings", "rerank"]),
    section=_REQUEST,
    help="What to ask for [default: what the model can].",
)
@option(
    "--timeout",
    type=click.FloatRange(0.1, 86400),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    section=_REQUEST,
    help="For a whole answer, from its arrival.",
)
@option(
    "--url",
    metavar="URL",
    section=_SERVER,
    help="Any server that speaks OpenAI's API [default: this machine's gateway].",
)
@option(
    "--key",
    metavar="WHERE",
    section=_SERVER,
    help="Where the server's key is: env:NAME, or a file [default: env:OPENAI_API_KEY, with --url].",
)
@option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    section=_SERVER,
    help="Start the model with this engine parameter; repeatable.",
)
@option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", section=_OUTPUT, help="Keep the figures, for --compare."
)
@option(
    "--compare",
    "old",
    type=click.Path(path_type=Path),
    metavar="OLD",
    section=_OUTPUT,
    help="Say what changed since; with a second file as MODEL nothing is measured.",
)
@option("--svg", type=click.Path(path_type=Path), metavar="FILE", section=_OUTPUT, help="Draw the figures.")
@json_option
def bench(
    model: str | None, old: Path | None, svg: Path | None, save: Path | None, as_json: bool, **given: Any
) -> None:
    """Measure how fast MODEL answers under load.

    Throughput, time to first token, time between tokens and of whole answers, for each load. Requests go through the
    gateway as those of any client do. A model that is not in the store is pulled first.
    """
    from pierhead.cli import bench_output
    from pierhead.loadtest import report as reports

    _placed(save, svg)
    before = reports.load(old) if old else None
    if before and model and model.endswith(".json"):
        now = reports.load(Path(model))
    elif before and not model:
        raise UsageError("compare with what?", hint="Name a model to measure, or a second file.")
    elif not model:
        raise UsageError("which model?", hint="pier bench MODEL; `pier list` shows what is there.")
    else:
        now = _measured(model, given, as_json)
    bench_output.show(now, before, as_json)
    _write(save, reports.encode(now))
    if svg:
        from pierhead.loadtest import svg as picture

        _write(svg, picture.draw(now, before).encode())


def _placed(*files: Path | None) -> None:
    """UsageError where a file cannot be written: what took minutes to measure is not lost at the end."""
    for path in files:
        if path is None:
            continue
        place = path.expanduser()
        found = place if place.exists() else place.parent
        if not place.parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {place.parent}", hint="Make it first.")
        if place.is_dir() or not os.access(found, os.W_OK):
            why = "it is a folder" if place.is_dir() else "no permission"
            raise UsageError(f"cannot write {path}: {why}", hint="Name another file.")


def _write(path: Path | None, data: bytes) -> None:
    if path is None:
        return
    try:
        path.expanduser().write_bytes(data)
    except OSError as exc:  # when all has been measured and shown
        raise PierError(f"cannot write {path}: {exc.strerror}", hint="The figures are above.") from exc


def _measured(model: str, given: dict[str, Any], as_json: bool) -> Report:
    from pierhead.cli.bench_output import progress
    from pierhead.loadtest import session

    name, trial = _trial(model, given)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _more_files()
    with progress(as_json) as watch:
        outcome = _run(session.run(trial, watch, say))
    return _report(name, trial, outcome, started, given)


def _run(main: Coroutine[Any, Any, T]) -> T:
    """On the fast loop where there is one; a group of one failure raises that failure."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _report(name: str, trial: Trial, outcome: Any, started: str, given: dict[str, Any]) -> Report:
    from pierhead import __version__
    from pierhead.loadtest import report as reports

    plan, shape = trial.plan, trial.shape
    settings: dict[str, str | int | float | bool] = {
        "rounds": plan.rounds,
        "seed": plan.seed,
        "timeout": plan.timeout,
        "warmup": plan.warm_up,
        "prompt_tokens": shape.prompt_tokens,
        "output_tokens": shape.output_tokens,
        "ignore_eos": shape.ignore_eos,
    }
    settings |= {"requests": plan.requests} if plan.requests else {"duration": plan.seconds}
    if given["dataset"]:
        settings["dataset"] = given["dataset"].name
    settings |= {f"option.{k}": v for k, _, v in (word.partition("=") for word in given["options"])}
    return reports.Report(
        created=started,
        pier=__version__,
        model=name,
        task=outcome.task,
        url=given["url"] or "",
        host=f"{platform.node()}, {os.cpu_count()} CPUs",
        settings=settings,
        results=reports.rows(outcome.passes),
    )


def _trial(model: str, given: dict[str, Any]) -> tuple[str, Trial]:
    """What the flags ask for; the model runs when this returns."""
    from pierhead.loadtest.plan import Plan
    from pierhead.loadtest.prompts import Shape, read_dataset
    from pierhead.loadtest.session import Trial

    own = read_dataset(given["dataset"].expanduser()) if given["dataset"] else ()
    ignore_eos = given["ignore_eos"] if given["ignore_eos"] is not None else not own
    shape = Shape(given["prompt_tokens"], given["output_tokens"], own, ignore_eos)
    plan = Plan(
        loads(given["concurrency"], given["rate"]),
        rounds=given["rounds"],
        requests=given["requests"] or 0,
        seconds=given["duration"],
        warmup=-1 if given["warmup"] is None else given["warmup"],
        timeout=given["timeout"],
        seed=given["seed"],
    )
    name, target = _remote(model, given) if given["url"] else _local(model, given)
    return name, Trial(target, name, plan, shape, given["task"] or "")


def loads(concurrency: str | None, rate: str | None) -> tuple[Load, ...]:
    """The loads that ``--concurrency`` and ``--rate`` name, each once."""
    from pierhead.loadtest.plan import Load

    if not concurrency and not rate:
        concurrency = "1,2,4,8"
    closed = [Load(concurrency=int(n)) for n in _numbers("--concurrency", concurrency, 1, _MOST, whole=True)]
    opened = [Load(rate=n) for n in _numbers("--rate", rate, 0.001, 100_000)]
    return tuple(dict.fromkeys((*closed, *opened)))


def _numbers(flag: str, text: str | None, least: float, most: float, *, whole: bool = False) -> list[float]:
    found: list[float] = []
    for word in (text or "").split(",") if text else ():
        try:
            value = float(int(word) if whole else float(word))
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            hint = f"Numbers from {least:g} to {most:g}, with commas between them: {flag} 1,2,4"
            raise UsageError(f"{flag}: '{word[:40]}' is not a number that can be used", hint=hint)
        found.append(value)
    return found


def _local(model: str, given: dict[str, Any]) -> tuple[str, Target]:
    """This machine's gateway, with the model pulled and started."""
    from pierhead.cli.request import engine_settings
    from pierhead.cli.run import present
    from pierhead.loadtest.client import Target

    if given["key"]:
        raise UsageError("--key is for --url", hint="This machine's own gateway needs none.")
    paths = here()
    name = present(paths, model).name
    ready(name, engine_settings(given["options"], None))
    return name, Target(socket=str(paths.gateway_socket))


def ready(name: str, settings: dict[str, Any]) -> None:
    """Start the model where it does not run, with these settings."""
    from pierhead.cli.progress import bars
    from pierhead.daemon.client import Client

    client = Client(here())
    client.ensure_daemon()
    body: dict[str, Any] = {"model": name} | ({"settings": settings} if settings else {})
    with bars() as listener:
        for event in client.events("POST", "/replicas", body):
            listener(event)


def _remote(model: str, given: dict[str, Any]) -> tuple[str, Target]:
    """Another server; its key is never in the arguments."""
    from pierhead.daemon.baseurl import address
    from pierhead.loadtest.client import Target

    if given["options"]:
        raise UsageError("--option is for models of this machine", hint="Leave it out, or leave out --url.")
    at = address(given["url"], allow_http=True, at="--url")
    key = _key(given["key"] or "env:OPENAI_API_KEY", required=bool(given["key"]))
    return model, Target(at.host, at.port, at.tls, at.path or "/v1", key=key)


def _key(where: str, *, required: bool) -> str:
    if where.startswith("env:"):
        found = os.environ.get(where[4:], "")
    else:
        try:
            found = Path(where).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(
                "--key names a file that cannot be read", hint="Write env:NAME, or the path of a file."
            ) from exc
    found = found.strip()
    if required and not found:
        raise UsageError("--key names nothing", hint="Write env:NAME, or the path of a file; never the key itself.")
    if not found.isascii() or not found.isprintable():
        raise UsageError("the key has signs that no key has", hint="Is it the right file?")
    return found


def _more_files() -> None:
    """As many connections as this process may have."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
