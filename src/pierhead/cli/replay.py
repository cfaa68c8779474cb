"""The verb that sends recorded requests again, to another model, and compares; reads answers, judges none."""

from __future__ import annotations

import difflib
import http.client
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import here, number, print_json, say, several, table, warn
from pierhead.cli.requests import records, wanted
from pierhead.daemon.client import Client
from pierhead.errors import CorruptData, DaemonUnavailable, UsageError
from pierhead.paths import Paths
from pierhead.sockets import connect_unix

if TYPE_CHECKING:
    from pierhead.gateway.telemetry.records import Record

_TEXT_MAX = 20_000  # characters that are compared


@click.command(
    cls=Verb,
    examples=(
        ("pier replay --last 20 --to smollm2:new", "The last twenty, to another model."),
        ("pier replay req_5f2c81d07a3e1b --to qwen3 --diff", "One, and how its answer differs."),
        ("pier replay sample.ndjson --to smollm2 --json", "An export of `pier requests`, for a program."),
    ),
)
@click.argument("names", metavar="[ID|FILE]...", nargs=-1)
@option("--to", "model", required=True, metavar="MODEL", help="Who answers now.", shell_complete=complete_model)
@option("--last", type=click.IntRange(1, 10_000), metavar="N", help="The newest N that can be sent again.")
@option("--from", "source", default="", metavar="MODEL", help="With --last: those of this model only.")
@option("--concurrency", type=click.IntRange(1, 256), default=1, show_default=True, help="So many at a time.")
@option("--timeout", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds for each.")
@option("--diff", "with_diff", is_flag=True, help="Print how each answer differs.")
@json_option
def replay(
    names: tuple[str, ...],
    model: str,
    last: int | None,
    source: str,
    concurrency: int,
    timeout: float,
    with_diff: bool,
    as_json: bool,
) -> None:
    """Send recorded requests again, to another model, and compare the answers."""
    chosen, left = _chosen(names, last, source)
    if not chosen:
        raise UsageError("there is nothing to send again", hint="`pier requests list` shows what is recorded.")
    paths = here()
    Client(paths).ensure_daemon()
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(concurrency) as pool:
        for result in pool.map(partial(_again, paths, model, timeout), chosen):
            results.append(result)
            if not as_json and len(results) < len(chosen):
                say(f"{len(results)} of {len(chosen)} answered, {result['id']} in {result['after']['seconds']:.2f} s.")
    if as_json:
        print_json({"model": model, "results": results, "summary": summary(results), "left_out": left})
        return
    _print(results, with_diff)
    if left:
        warn(f"{several(left, 'request')} left out: replays themselves, or not kept whole (too long, or with images).")


def _chosen(names: tuple[str, ...], last: int | None, source: str) -> tuple[list[Record], int]:
    """What to send, and how much is not: what cannot be, and replays, unless they are named."""
    if bool(names) == bool(last):
        raise UsageError("say what to send again", hint="Name requests or a file, or type `--last 10`.")
    if last:
        nothing = {"key": "", "model": source, "operation": "", "status": 0, "failed": False, "since": "", "before": ""}
        found: list[Record] = []
        left = 0
        for r in records().each(wanted(nothing)):
            if _whole(r) and not r.replay_of:
                found.append(r)
            else:
                left += 1
            if len(found) == last:
                break
        return found, left
    count = 0
    chosen: list[Record] = []
    for name in names:
        file = Path(name).is_file()
        every = _read(Path(name)) if file else [records().get(name)]
        count += len(every)
        chosen += [r for r in every if _whole(r) and not (file and r.replay_of)]
    return chosen, count - len(chosen)


def _whole(r: Record) -> bool:
    return not r.cut and not r.media and isinstance(r.request, dict)


def _read(path: Path) -> list[Record]:
    import msgspec

    from pierhead.gateway.telemetry.records import Record

    try:
        return msgspec.json.Decoder(Record).decode_lines(path.read_bytes())
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        hint = "Make one with: pier requests export -o FILE"
        raise CorruptData(f"{path} has no recorded requests: {exc}", hint=hint) from exc


def _again(paths: Paths, model: str, timeout: float, r: Record) -> dict[str, Any]:
    """One request sent again: how it was, how it is, and how alike the answers are."""
    from pierhead.gateway.telemetry import answers
    from pierhead.gateway.telemetry.recording import body
    from pierhead.gateway.usage import tokens

    begin = time.monotonic()
    connection = http.client.HTTPConnection("localhost", timeout=timeout)
    raw, status, kind, first, error = b"", 0, "", 0.0, ""
    try:
        connection.sock = connect_unix(paths.gateway_socket)
        connection.sock.settimeout(timeout)
        headers = {"Content-Type": "application/json", "X-Pierhead-Replay": r.id}
        connection.request("POST", r.path, body(r, model), headers)
        response = connection.getresponse()
        status, kind = response.status, response.headers.get_content_type()
        raw = response.read(1)
        first = time.monotonic() - begin
        raw += response.read()
    except FileNotFoundError as exc:
        raise DaemonUnavailable("the gateway does not answer", hint=f"See {paths.daemon_log}.") from exc
    except (OSError, http.client.HTTPException) as exc:
        error = str(exc) or type(exc).__name__
    finally:
        connection.close()
    answer = answers.Answer(status, kind, raw, not error)
    usage, text = tokens(raw[-4096:]), answers.text(answer) if status < 400 else ""
    return {
        "id": r.id,
        "operation": r.operation,
        "before": {
            "model": r.model,
            "status": r.status,
            "prompt_tokens": r.prompt_tokens,
            "completion_tokens": r.completion_tokens,
            "seconds": round(r.seconds, 3),
            "ttft": round(r.ttft, 3),
            "text": r.text,
        },
        "after": {
            "model": model,
            "status": status,
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "seconds": round(time.monotonic() - begin, 3),
            "ttft": round(first, 3) if answers.streamed(answer) else 0.0,
            "text": text,
            "error": error or (raw[:2000].decode("utf-8", "replace") if status >= 400 else ""),
        },
        "alike": likeness(r.text, text),
    }


def likeness(left: str, right: str) -> float:
    """How alike two texts are, word by word: 1.0 is the same."""
    if left == right:
        return 1.0
    words = difflib.SequenceMatcher(None, left[:_TEXT_MAX].split(), right[:_TEXT_MAX].split(), autojunk=False)
    return round(min(words.ratio(), 0.999), 3)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all results: how many, failed, the same; means of what both sides have."""

    def mean(side: str, name: str) -> float:
        values = [r[side][name] for r in results if r[side]["status"] < 400]
        return round(sum(values) / len(values), 3) if values else 0.0

    return {
        "requests": len(results),
        "failed": sum(not 0 < r["after"]["status"] < 400 for r in results),
        "same": sum(r["alike"] == 1.0 for r in results),
        "alike": round(sum(r["alike"] for r in results) / len(results), 3),
        "seconds": {side: mean(side, "seconds") for side in ("before", "after")},
        "ttft": {side: mean(side, "ttft") for side in ("before", "after")},
        "completion_tokens": {side: mean(side, "completion_tokens") for side in ("before", "after")},
    }


def _print(results: list[dict[str, Any]], with_diff: bool) -> None:
    rows = [
        (
            r["id"],
            f"{r['before']['status']} → {r['after']['status'] or r['after']['error']}",
            f"{number(r['before']['completion_tokens'])} → {number(r['after']['completion_tokens'])}",
            f"{r['before']['seconds']:.2f} → {r['after']['seconds']:.2f} s",
            f"{r['before']['ttft']:.2f} → {r['after']['ttft']:.2f} s" if r["after"]["ttft"] else "-",
            "same" if r["alike"] == 1.0 else f"{r['alike']:.0%}",
        )
        for r in results
    ]
    table(("ID", "STATUS", "TOKENS", "TIME", "FIRST TOKEN", "TEXT ALIKE"), rows, right=(5,), fold=(1,), spare=(4, 2))
    if with_diff:
        for r in results:
            _print_diff(r)
    total = summary(results)
    say(
        f"{several(total['requests'], 'request')}, {total['failed']} failed, {total['same']} with the same answer, "
        f"{total['alike']:.0%} alike; {total['seconds']['before']:.2f} s before, {total['seconds']['after']:.2f} s now."
    )
    for why in list(dict.fromkeys(map(_why, results)))[:3]:
        if why:
            warn(why)


def _why(result: dict[str, Any]) -> str:
    """Why a request failed this time, in the answer's own words, whatever its dialect; "" when it did not."""
    import msgspec

    text = str(result["after"]["error"])
    try:
        said: Any = msgspec.json.decode(text)["error"]
        return str(said if isinstance(said, str) else said["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return text[:200]


def _print_diff(result: dict[str, Any]) -> None:
    before, after = result["before"]["text"].splitlines(), result["after"]["text"].splitlines()
    lines = difflib.unified_diff(before, after, f"{result['id']} before", f"{result['id']} now", lineterm="")
    from pierhead.cli.output import printable

    for line in lines:
        click.echo(printable(line))
