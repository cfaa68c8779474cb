"""The verbs quantize and convert: one form of a model becomes another, with bars; the work is elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Generator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pierhead import events
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import here, print_json, printable, say, settings, size, warn
from pierhead.errors import UsageError

if TYPE_CHECKING:
    from pierhead.convert import convert as conversion
    from pierhead.convert.job import Workshop
    from pierhead.convert.quantize import Made
    from pierhead.paths import Paths

T = TypeVar("T")
_PATH = click.Path(path_type=Path)
_TEXT, _HOW = "Measuring", "Quantizing"
_MAX_TEXT = 8 << 20


@click.command(
    cls=Verb,
    examples=(
        ("pier quantize my-model:f16 my-model:q4 --type Q4_K_M", "The usual choice: about 4.9 bits for each weight."),
        ("pier quantize my-model:f16 my-model:q3 --type IQ3_XXS --imatrix imatrix.dat", "Smaller, with importances."),
        ("pier quantize my-model:f16 my-model:q8 --type Q8_0 --text handbook.txt", "Measured on your own text."),
    ),
)
@click.argument("source", shell_complete=complete_model)
@click.argument("target", metavar="NAME")
@option(
    "--type", "kind", default="Q4_K_M", show_default=True, metavar="TYPE", section=_HOW, help="The type of the weights."
)
@option("--imatrix", type=_PATH, metavar="FILE", section=_HOW, help="Importances, from llama.cpp's llama-imatrix.")
@option("--allow-requantize", is_flag=True, section=_HOW, help="Also a model that is quantized already.")
@option("--pure", is_flag=True, section=_HOW, help="One type for all weights, no mixture.")
@option("--keep-output", is_flag=True, section=_HOW, help="Leave the output layer as it is.")
@option("--threads", type=click.IntRange(1, 1024), metavar="N", section=_HOW, help="[default: one for each CPU]")
@option(
    "--text",
    type=_PATH,
    metavar="FILE",
    section=_TEXT,
    help="Measure perplexity on this text  [default: a short one of ours]",
)
@option("--no-perplexity", is_flag=True, section=_TEXT, help="Do not measure what it costs.")
@json_option
def quantize(source: str, target: str, as_json: bool, **given: Any) -> None:
    """Make a smaller model out of SOURCE, a GGUF model, and call it NAME.

    llama.cpp's own quantizer does it, in an environment of its own that the first use installs. Its size before and
    after, bits per weight and the change of perplexity are printed; the model can be run at once.
    """
    from pierhead.cli.package import created, model_of
    from pierhead.convert import quantize as work
    from pierhead.convert.types import known

    paths = here()
    wish = work.Wish(
        name=target,
        type=known(given["kind"], matrix=given["imatrix"] is not None),
        created=created(os.environ),
        text=None if given["no_perplexity"] else _text(given["text"]),
        imatrix=_file(given["imatrix"]),
        allow_requantize=given["allow_requantize"],
        pure=given["pure"],
        keep_output=given["keep_output"],
        threads=given["threads"] or os.cpu_count() or 1,
    )
    with watching(as_json) as (listener, tell):
        base = model_of(paths, source, listener)
        made = _run(work.quantize(open_store(paths), workshop(paths), base, wish, listener, tell))
    if as_json:
        print_json(made)
    else:
        _show(made)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The work to its end; SIGTERM ends it as Ctrl-C does, and leaves nothing behind either."""

    def interrupt(number: int, frame: object) -> None:
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    return asyncio.run(work)


def workshop(paths: Paths) -> Workshop:
    """Where jobs run, by the settings of this installation."""
    from pierhead.convert.job import Workshop
    from pierhead.errors import RuntimeUnavailable
    from pierhead.runtimes import sandbox
    from pierhead.runtimes.environment import Environments

    wanted = settings(paths).settings
    folder = Path(wanted.runtime.environments or paths.state / "environments")
    confined = wanted.runtime.sandbox != "plain" and sandbox.bwrap_works()
    if wanted.runtime.sandbox == "bwrap" and not confined:
        raise RuntimeUnavailable("the bubblewrap sandbox was asked for but does not work here", hint=sandbox.INSTALL)
    return Workshop(Environments(folder, wanted.sources.pypi_installer), confined=confined)


@contextlib.contextmanager
def watching(as_json: bool) -> Generator[tuple[events.Listener, Callable[[str, str, float], None]]]:
    """A listener for pulls and installs, and a bar for the work itself."""
    from pierhead.cli.progress import bars

    if as_json or not sys.stderr.isatty():
        with bars() as listener:
            yield (events.ignore if as_json else listener), _Steps(as_json).tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(bar_width=None), TaskProgressColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
    tasks: dict[str, Any] = {}

    def tell(step: str, what: str, share: float) -> None:
        if step not in tasks:
            tasks[step] = shown.add_task(step, total=1.0)
            shown.start()
        shown.update(tasks[step], completed=share, description=f"{step} {printable(what)[:40]}".rstrip())

    try:
        with bars() as listener:
            yield listener, tell
    finally:
        shown.stop()


class _Steps:
    """A line for each step, where there is no terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._step = ""

    def tell(self, step: str, what: str, share: float) -> None:
        if not self._quiet and step != self._step:
            say(f"{step} …")
        self._step = step


def _text(path: Path | None) -> str:
    """The text to measure on: the user's, or the package's own."""
    if path is None:
        return (files("pierhead.convert") / "passage.txt").read_text(encoding="utf-8")
    try:
        with path.expanduser().open("rb") as file:
            return file.read(_MAX_TEXT).decode("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not text in UTF-8"
        raise UsageError(f"cannot read {path}: {why}", hint="Name a text file with --text.") from exc


def _file(path: Path | None) -> Path | None:
    if path is not None and not path.expanduser().is_file():
        raise UsageError(f"there is no file {path}", hint="Check the path.")
    return path.expanduser() if path else None


def _show(made: Made) -> None:
    from pierhead.cli.output import pairs

    share = made.size_after / made.size_before - 1 if made.size_before else 0.0
    rows = [
        ("Size", f"{size(made.size_before)} → {size(made.size_after)} ({share:+.0%})"),
        ("Bits per weight", f"{made.bits_before:.2f} → {made.bits_after:.2f}"),
    ]
    before, after = made.perplexity_before, made.perplexity_after
    if before is not None and after is not None and before:
        noise = 2 * (made.perplexity_error or 0.0)
        rows.append(("Perplexity", f"{before:.3f} → {after:.3f} ({after / before - 1:+.1%} ±{noise:.1%})"))
        rows.append(("Same likeliest token", f"{made.same_top or 0:.1%} of {made.perplexity_tokens:,}"))
    pairs(rows)
    if made.fallbacks:
        warn(f"{made.fallbacks} of {made.tensors} tensors do not fit {made.type} and took a larger type.")
    say(f"Quantized to {made.name}. Try it: pier run {made.name}")
    click.echo(made.digest)


_TASKS = "feature-extraction, text-classification, token-classification …"


@click.command(
    cls=Verb,
    examples=(
        ("pier convert my-model my-model:f16 --to gguf", "For llama.cpp; `pier quantize` makes it smaller."),
        ("pier convert ./my-classifier sentiment --to onnx", "A folder as transformers writes it, for ONNX Runtime."),
        ("pier convert minilm minilm:onnx --to onnx --task feature-extraction", "Vectors of tokens, to be pooled."),
    ),
)
@click.argument("source", shell_complete=complete_model)
@click.argument("target", metavar="NAME")
@option("--to", "kind", type=click.Choice(["gguf", "onnx"]), required=True, help="The form to make.")
@option(
    "--type",
    "weights",
    default="auto",
    metavar="TYPE",
    section="GGUF",
    help="F32, F16, BF16 or Q8_0 [default: as it is]",
)
@option("--task", default="", metavar="TASK", section="ONNX", help=f"{_TASKS} [default: what it was trained for]")
@option(
    "--opset",
    type=click.IntRange(11, 30),
    metavar="N",
    section="ONNX",
    help="Of the operators [default: the exporter's]",
)
@json_option
def convert(source: str, target: str, kind: str, weights: str, task: str, opset: int | None, as_json: bool) -> None:
    """Make GGUF or ONNX out of SOURCE, a model in safetensors, and call it NAME.

    SOURCE is a model of the store or a folder as transformers writes it. llama.cpp's own converter and Hugging Face's
    Optimum do it, in an environment of their own (about 1.5 GB) that the first use installs. No code of the model is
    run.
    """
    from pierhead.cli.package import created, model_of
    from pierhead.convert import convert as work

    paths = here()
    name = next((known for known in work.GGUF_TYPES if known.upper() == weights.upper()), weights)
    wish = work.Wish(target, kind, created(os.environ), name, task, opset or 0)
    with watching(as_json) as (listener, tell):
        path = Path(source).expanduser()
        local = path.is_dir() or source.startswith(("./", "../", "/", "~"))
        found = path if local else model_of(paths, source, listener)
        made = _run(work.convert(open_store(paths), workshop(paths), found, wish, listener, tell))
    if as_json:
        print_json(made)
    else:
        _show_converted(made)


def _show_converted(made: conversion.Made) -> None:
    from pierhead.cli.output import pairs

    rows = [
        ("Size", f"{size(made.size_before)} → {size(made.size_after)}"),
        ("Form", f"{made.format} {made.type}".strip()),
    ]
    if made.task:
        rows.append(("Task", made.task))
    if made.difference is not None:
        rows.append(("Largest difference", f"{made.difference:.1e}, of any number in the answers to two sentences"))
    pairs(rows)
    say(f"Converted to {made.name}.")
    click.echo(made.digest)
