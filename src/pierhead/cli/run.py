"""The verb run: pull if need be, start, then one answer or a chat."""

from __future__ import annotations

import base64
import json
import mimetypes
import sys
import time
from pathlib import Path
from typing import Any

import click

from pierhead import events
from pierhead.cli.chatapi import Stream
from pierhead.cli.completion import complete_model
from pierhead.cli.models import fetch, open_store
from pierhead.cli.output import here, say
from pierhead.cli.progress import bars
from pierhead.daemon.client import Client
from pierhead.errors import NotFound, UsageError
from pierhead.paths import Paths
from pierhead.store.model import ModelRecord

MAX_FILE = 8 << 20


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option("--temperature", type=click.FloatRange(0), help="0 is the most likely answer; higher is more varied.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Sample from the likeliest tokens of this total.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Stop after so many tokens.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--context", type=click.IntRange(1), metavar="TOKENS", help="Context length (default: what fits).")
@click.option("--runtime", type=click.Choice(["auto", "process", "docker"]), help="Where the engine runs.")
@click.option("--keep-alive", metavar="TIME", help="How long it stays after its last request: 90s, 5m, 1h, -1.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Any engine parameter; repeatable.")
@click.option("--image", "images", multiple=True, type=click.Path(), help="Show it a picture; repeatable.")
@click.option("--file", "files", multiple=True, type=click.Path(), help="Put a text file into the prompt; repeatable.")
@click.option("--format", "shape", metavar="json|SCHEMA", help="Answer in JSON, or by a JSON schema (text or file).")
@click.option("--think/--no-think", default=None, help="Let a reasoning model think first, or not.")
@click.option("--verbose", is_flag=True, help="Print timings at the end.")
def run(model: str, prompt: str | None, **given: Any) -> None:
    """Ask MODEL once, or chat with it.

    With PROMPT (or text from a pipe) one answer is printed; without, a chat opens. The model is pulled and started if
    need be, and a background daemon keeps it ready for the next time.

    \b
    Examples:
      pier run smollm2 "Name three colours."
      pier run smollm2 < letter.txt
      pier run smollm2 --format '{"type":"object","properties":{"name":{"type":"string"}}}' "Invent a ship."
    """
    piped = "" if sys.stdin.isatty() else sys.stdin.read(MAX_FILE)
    text = "\n\n".join(part for part in (prompt, piped.strip()) if part)
    request = Request(model, given)
    content = request.content(text) if text or given["files"] or given["images"] else None
    if content is None and not sys.stdin.isatty():
        raise UsageError("there is no prompt", hint=f'Type `pier run {model} "…"`, or pipe text into it.')
    paths = here()
    record = present(paths, model)
    if given["images"] and not any(f.role == "mmproj" for f in record.files):
        raise UsageError(f"'{model}' cannot see pictures: it has no projector", hint="Use a vision model.")
    load_s = start(paths, record.name, request)
    if content is None:
        from pierhead.cli.chat import chat

        chat(paths, record, request)
        return
    timings = answer(paths, request.body(record.name, [*request.system(), {"role": "user", "content": content}]), given)
    if given["verbose"]:
        show_timings({"load_s": load_s, **timings})


class Request:
    """What the user asked of each answer, and of the engine."""

    def __init__(self, model: str, given: dict[str, Any]) -> None:
        self.model = model
        self.given = given
        self.format = _format(given["shape"])

    def system(self) -> list[dict[str, Any]]:
        text = self.given["system"]
        return [{"role": "system", "content": text}] if text else []

    def content(self, text: str) -> Any:
        """The user's message: text with files, and pictures as data URLs."""
        parts = [f"{name}:\n```\n{body}\n```" for name, body in map(read_text, self.given["files"])]
        whole = "\n\n".join([*parts, text] if text else parts)
        if not self.given["images"]:
            return whole
        pictures = [{"type": "image_url", "image_url": {"url": picture(p)}} for p in self.given["images"]]
        return [*pictures, {"type": "text", "text": whole}]

    def body(self, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The request for the gateway."""
        given = self.given
        body: dict[str, Any] = {"model": model, "messages": messages, "stream_options": {"include_usage": True}}
        body |= {k: given[k] for k in ("temperature", "top_p", "max_tokens", "seed") if given[k] is not None}
        if self.format:
            body["response_format"] = self.format
        if given["think"] is not None:
            body["chat_template_kwargs"] = {"enable_thinking": given["think"]}
        return body

    def engine(self) -> dict[str, Any]:
        """Engine settings by name."""
        found: dict[str, Any] = {}
        for option in self.given["options"]:
            name, equals, value = option.partition("=")
            if not equals or not name:
                raise UsageError(f"'{option}' is not NAME=VALUE", hint="For example: --option threads=4")
            found[name] = value
        if self.given["context"]:
            found["context"] = self.given["context"]
        return found


def present(paths: Paths, model: str) -> ModelRecord:
    """The model's record; pulled first if it is not in the store."""
    store = open_store(paths)
    try:
        return store.get(model)
    except NotFound:
        with bars() as listener:
            return fetch(paths, model, None, listener)


def start(paths: Paths, name: str, request: Request) -> float:
    """Make sure that a replica answers; seconds that it took."""
    began = time.monotonic()
    client = Client(paths)
    client.ensure_daemon()
    body: dict[str, Any] = {"model": name}
    if request.engine():
        body["settings"] = request.engine()
    if request.given["runtime"]:
        body["runtime"] = request.given["runtime"]
    if request.given["keep_alive"]:
        body["keep_alive"] = seconds(request.given["keep_alive"])
    with bars() as listener:
        for event in client.events("POST", "/replicas", body):
            listener(event)
            if isinstance(event, events.Phase) and request.given["verbose"]:
                say(f"  {event.elapsed_s:6.3f} s  {event.state} {event.detail}".rstrip())
    return time.monotonic() - began


def answer(paths: Paths, body: dict[str, Any], given: dict[str, Any]) -> dict[str, float]:
    """Stream one answer to stdout; its timings."""
    stream = Stream(paths, body)
    try:
        timings, _ = relay(stream, show_thinking=given["think"] is not False and sys.stderr.isatty())
    except KeyboardInterrupt:
        stream.close()
        sys.stdout.write("\n")
        raise
    return timings


def relay(stream: Stream, *, show_thinking: bool, said: list[str] | None = None) -> tuple[dict[str, float], str]:
    """Print pieces as they come: thinking dimmed on stderr, the answer on stdout; the timings and the text.

    ``said`` collects the pieces, so that a caller that is interrupted has them.
    """
    began = time.monotonic()
    first = 0.0
    pieces = [] if said is None else said
    timings: dict[str, float] = {}
    for event in stream:
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            thought = delta.get("reasoning_content")
            if thought and show_thinking:
                click.echo(click.style(thought, dim=True), err=True, nl=False)
            text = delta.get("content")
            if text:
                first = first or time.monotonic() - began
                pieces.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
        usage: dict[str, Any] = event.get("usage") or {}
        timings |= {k: usage[k] for k in ("prompt_tokens", "completion_tokens") if k in usage}
        engine: dict[str, Any] = event.get("timings") or {}
        timings |= {k: engine[k] for k in ("prompt_per_second", "predicted_per_second") if k in engine}
    if pieces and not pieces[-1].endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    stream.close()
    return {"first_token_s": first, "total_s": time.monotonic() - began, **timings}, "".join(pieces)


def show_timings(timings: dict[str, float]) -> None:
    """The timings of one answer, on stderr."""
    names = {
        "load_s": ("load", "s"),
        "first_token_s": ("first token", "s"),
        "total_s": ("total", "s"),
        "prompt_tokens": ("prompt", "tokens"),
        "prompt_per_second": ("prompt speed", "tokens/s"),
        "completion_tokens": ("answer", "tokens"),
        "predicted_per_second": ("answer speed", "tokens/s"),
    }
    for key, (label, unit) in names.items():
        if key in timings:
            value = timings[key]
            say(f"  {label:<13} {value:,.0f} {unit}" if unit == "tokens" else f"  {label:<13} {value:,.3f} {unit}")


def seconds(text: str) -> float:
    """``90s``, ``5m``, ``1h``, ``300`` or ``-1`` (for ever) in seconds."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:], 0.0)
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError as exc:
        raise UsageError(f"'{text}' is not a time", hint="Write 90s, 5m, 1h or -1 (for ever).") from exc


def read_text(path: str) -> tuple[str, str]:
    """A file's name and text; UsageError when it is not text or too large."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE:
            raise UsageError(f"{path} is larger than {MAX_FILE >> 20} MiB", hint="Use a smaller part of it.")
        return file.name, file.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not text", hint="Pictures go with --image.") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="Check the path.") from exc


def picture(path: str) -> str:
    """A picture as a data URL."""
    kind = mimetypes.guess_type(path)[0] or ""
    if not kind.startswith("image/"):
        raise UsageError(f"{path} is not a picture", hint="Use a .png, .jpg, .webp or .gif file.")
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="Check the path.") from exc
    if len(data) > MAX_FILE:
        raise UsageError(f"{path} is larger than {MAX_FILE >> 20} MiB", hint="Make it smaller first.")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _format(shape: str | None) -> dict[str, Any] | None:
    if not shape:
        return None
    if shape == "json":
        return {"type": "json_object"}
    text = shape if shape.lstrip().startswith("{") else read_text(shape)[1]
    try:
        schema = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"--format is not a JSON schema: {exc}", hint="Give 'json', a schema, or its file.") from exc
    if not isinstance(schema, dict):
        raise UsageError(
            "--format is not a JSON schema: it must be an object", hint="Give 'json', a schema, or its file."
        )
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
