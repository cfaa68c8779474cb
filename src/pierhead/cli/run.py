"""The verb run: pull if need be, start, then one answer or a chat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
from msgspec import structs

from pierhead import events
from pierhead.cli.answer import Answer, receive, show_timings
from pierhead.cli.chatapi import Stream
from pierhead.cli.completion import complete_model
from pierhead.cli.hear import check_sound, hear, hears, no_sound, sounds
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import fetch_missing, open_store
from pierhead.cli.output import here, print_json, say, warn
from pierhead.cli.paint import paint, paints
from pierhead.cli.predict import members, packaged, predict, predicts
from pierhead.cli.progress import bars
from pierhead.cli.request import Request, piped, quote
from pierhead.cli.work import abilities, chats, work
from pierhead.daemon.client import Client
from pierhead.errors import NotFound, UsageError
from pierhead.paths import Paths
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord

_SAMPLING, _INPUT, _ENGINE, _OUTPUT = "Sampling", "Prompt", "Engine", "Output"
_EXAMPLES = (
    ('pier run smollm2 "Name three colours."', "One answer; the model is pulled and started if need be."),
    ('pier run smollm2+pirate "Hi"', "With one of its LoRA adapters; `pier lora` gives it some."),
    ("pier run smollm2", "A chat, with history and /help."),
    ('pier run smollm2 "Sum this up:" < letter.txt', "The prompt, then what comes through the pipe."),
    ('pier run smollm2 "Invent a ship." --format ship.schema.json', "An answer that keeps to a JSON schema."),
    ("pier run ./my_model.py '{\"x\": 1}'", "A Python class of your own, packaged anew where it changed."),
    ('pier run smollm2 "Hi" --replicas 2', "Two engines, over which the gateway spreads requests; 1 drains one."),
    ("pier run whisper --file speech.mp3", "A model that hears prints what is said."),
    ('pier run sentiment "What a film!"', "A classifier answers with its label and how sure it is."),
    ('pier run flux "A lighthouse at dusk" -o dusk.png', "A model that makes pictures writes a file."),
    ('pier run smollm2 "Hi" --context 2048 --option threads=2', "Any engine parameter, by name."),
)


@click.command(cls=Verb, examples=_EXAMPLES)
@click.argument("model", shell_complete=complete_model)
@click.argument("prompt", required=False)
@option("--system", metavar="TEXT", section=_INPUT, help="What the model should be and do, before the conversation.")
@option(
    "--file", "files", multiple=True, metavar="FILE", section=_INPUT, help="Put a text or sound file in; repeatable."
)
@option("--image", "images", multiple=True, metavar="FILE", section=_INPUT, help="Show it a picture; repeatable.")
@option("--temperature", type=click.FloatRange(0), section=_SAMPLING, help="0: the likeliest answer; higher: varied.")
@option("--top-p", type=click.FloatRange(0, 1), section=_SAMPLING, help="Choose among the likeliest of this total.")
@option("--max-tokens", type=click.IntRange(1), metavar="N", section=_SAMPLING, help="Stop after N tokens.")
@option("--seed", type=int, metavar="N", section=_SAMPLING, help="The same seed gives the same answer.")
@option("--think/--no-think", default=None, section=_SAMPLING, help="Let a reasoning model think first, or not.")
@option(
    "--context", type=click.IntRange(0), metavar="TOKENS", section=_ENGINE, help="Context length [default: what fits]"
)
@option("--engine", metavar="NAME", section=_ENGINE, help="Which engine serves it [default: the first that can]")
@option("--draft", metavar="MODEL", section=_ENGINE, help="A smaller model that drafts tokens, to be faster.")
@option("--runtime", type=click.Choice(["auto", "process", "docker"]), section=_ENGINE, help="Where the engine runs.")
@option(
    "--keep-alive", metavar="TIME", section=_ENGINE, help="How long it stays when idle: 90s, 5m, 1h, -1 (for ever)."
)
@option(
    "--replicas",
    type=click.IntRange(1, 64),
    metavar="N",
    section=_ENGINE,
    help="Keep N engines of it, as memory allows.",
)
@option("--option", "options", multiple=True, metavar="NAME=VALUE", section=_ENGINE, help="Any parameter; repeatable.")
@option("--format", "shape", metavar="json|SCHEMA", section=_OUTPUT, help="JSON, or a JSON schema (text or a file).")
@option("-o", "--output", metavar="FILE", section=_OUTPUT, help="Where a picture goes: .png, .jpg, .webp; - is stdout.")
@option("--verbose", is_flag=True, section=_OUTPUT, help="Say how long loading and answering took.")
@json_option
def run(model: str, prompt: str | None, as_json: bool, **given: Any) -> None:
    """Ask MODEL once, or chat with it.

    With PROMPT (or text from a pipe) one answer is printed; without, a chat opens. A model that is not in the store is
    pulled first. A background daemon keeps it loaded for the next time. Of a model that does not chat, the answer is
    what it makes of PROMPT: a label, a vector, an order of the lines that come through the pipe, a picture in a file.
    One that hears prints what is said in a --file; PROMPT helps it with names.
    """
    request = Request(model, given)
    through = piped()
    text = "\n\n".join(part for part in (prompt, through) if part)
    asked = bool(text or given["files"] or given["images"])
    content = "" if sounds(given["files"]) else request.first(text)
    if not asked and (as_json or not sys.stdin.isatty()):
        raise _no_prompt(model)
    paths = here()
    record = present(paths, model)
    check_flags(record, request)
    if paints(record):
        start(paths, record.name, request, quiet=as_json)
        paint(paths, record, text, given, as_json=as_json)
        return
    if given["images"]:
        check_sight(record)
    check_sound(record, given["files"])
    asked_for = members(text, record.name) if predicts(record) else None
    load_s = start(paths, record.name, request, quiet=as_json)
    if asked_for is not None:
        predict(paths, record, asked_for, as_json=as_json)
        return
    able = abilities(paths, record)
    if sounds(given["files"]) or "transcriptions" in able:
        request.only(record.name, "turns sound into text", "files")
        hear(paths, record, given["files"], prompt or "", as_json)
        return
    if not chats(able):
        request.only(record.name, "does not chat", "files")
        work(paths, record, able, prompt or "", through, request.content("", list(map(quote, given["files"]))), as_json)
        return
    if not asked:
        from pierhead.cli.chat import chat

        chat(paths, record, request)
        return
    answer = Answer(timings={"load_s": load_s})
    body = request.body(record.name, [*request.system(), {"role": "user", "content": content}])
    receive(Stream(paths, body), answer, quiet=as_json, show_thinking=given["think"] is not False)
    _finish(record, answer, given, as_json)


def _no_prompt(model: str) -> UsageError:
    """What is missing: of a model that hears, a file."""
    record = _stored(open_store(here()), model)
    if record is not None and hears(record):
        return no_sound(record)
    return UsageError("there is no prompt", hint=f'Type `pier run {model} "…"`, or pipe text into it.')


def _finish(record: ModelRecord, answer: Answer, given: dict[str, Any], as_json: bool) -> None:
    if as_json:
        said = {"model": record.name, "content": answer.text, "thinking": answer.thinking}
        print_json({**said, "finish_reason": answer.finish, "timings": answer.timings})
        return
    if answer.finish == "length" and given["max_tokens"] and given["shape"]:
        warn("the answer was cut at --max-tokens: it is not whole JSON.")
    elif answer.finish == "length" and given["max_tokens"] is None:
        warn("the answer was cut: the context is full. Give --context a larger number.")
    if given["verbose"]:
        show_timings(answer.timings)


def present(paths: Paths, model: str) -> ModelRecord:
    """The model's record; pulled first if it is not in the store, and made first where it is Python on this machine."""
    if model.startswith(("./", "../", "/", "~")) or model in (".", "..") or model.endswith(".py"):
        from pierhead.package.python_model import is_program

        path = Path(model).expanduser()
        if path.exists() and is_program(path):
            return packaged(paths, path)
    store = open_store(paths)
    base, plus, adapter = model.rpartition("+")
    if plus and (found := _stored(store, base)):
        return structs.replace(found, name=f"{found.name}+{adapter}")
    try:
        return _whole(store.get(model))
    except NotFound as missing:
        with bars() as listener:
            return fetch_missing(paths, model, missing, listener)


def _stored(store: Store, name: str) -> ModelRecord | None:
    try:
        return store.get(name)
    except (NotFound, UsageError):
        return None


def _whole(record: ModelRecord) -> ModelRecord:
    """UsageError for what only adds to a model."""
    if record.adapter:
        raise UsageError(
            f"'{record.name}' is a LoRA adapter, which adds to a model",
            hint=f"Type `pier lora add MODEL {record.name}`, then `pier run MODEL+{record.name}`.",
        )
    return record


def check_flags(record: ModelRecord, request: Request) -> None:
    """UsageError for a flag that means nothing to the model, as far as its files tell before it is loaded."""
    if paints(record):
        request.only(record.name, "makes pictures", "images", "seed", "output")
    elif predicts(record):
        request.only(record.name, "takes a JSON object")
    elif hears(record):
        request.only(record.name, "turns sound into text", "files")
    elif request.given["output"]:
        raise UsageError(f"'{record.name}' makes no pictures: --output would stay empty", hint="Leave it out.")


def check_sight(record: ModelRecord) -> None:
    """UsageError unless the model has what it needs to see pictures."""
    if not any(f.role == "mmproj" for f in record.files):
        raise UsageError(
            f"'{record.name}' cannot see pictures: it has no projector (mmproj) file",
            hint="Use a vision model, or pull one together with its mmproj file.",
        )


def start(paths: Paths, name: str, request: Request, *, quiet: bool = False) -> float:
    """Make sure that a replica answers; seconds that it took."""
    began = time.monotonic()
    client = Client(paths)
    client.ensure_daemon()
    body: dict[str, Any] = {"model": name}
    if request.engine:
        body["settings"] = request.engine
    if request.given["runtime"]:
        body["runtime"] = request.given["runtime"]
    if request.keep_alive is not None:
        body["keep_alive"] = request.keep_alive
    if request.given["replicas"] is not None:
        body["replicas"] = request.given["replicas"]
    with bars() as listener:
        for event in client.events("POST", "/replicas", body):
            if isinstance(event, events.Phase) and request.given["verbose"]:
                say(f"  {event.elapsed_s:6.3f} s  {event.state} {event.detail}".rstrip())
            elif not quiet:
                listener(event)
    return time.monotonic() - began
