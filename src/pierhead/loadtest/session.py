"""One load test from the first question on: finds the task, measures prompts, warms up, runs; prints nothing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import msgspec

from pierhead.errors import DaemonUnavailable, EngineFailed, NotFound, PierError, UsageError
from pierhead.loadtest import prompts
from pierhead.loadtest.answer import Answer
from pierhead.loadtest.client import Pool, Target
from pierhead.loadtest.drive import PATHS, Driver, Pass, Seen
from pierhead.loadtest.figures import errors, reasons
from pierhead.loadtest.plan import STREAMED, TASKS, Plan
from pierhead.loadtest.prompts import PROBES, Prompt, Scale, Shape


@dataclass(frozen=True)
class Trial:
    """What is tested, and how; ``task`` "": what ``/v1/models`` says of the model, else chat."""

    target: Target
    model: str
    plan: Plan
    shape: Shape
    task: str = ""


@dataclass(frozen=True)
class Outcome:
    """What was measured."""

    task: str
    passes: list[Pass]
    scale: Scale


async def run(trial: Trial, watch: Callable[[Seen], None], say: Callable[[str], None]) -> Outcome:
    """The whole test; raises where nothing can be measured at all, and counts every later failure instead."""
    pool = Pool(trial.target)
    try:
        task = trial.task or await _task(pool, trial)
        scale = Scale() if trial.shape.own else await _scale(pool, task, trial)
        words = scale.words(trial.shape.prompt_tokens)
        bodies = prompts.bodies(task, trial.model, trial.shape, words, trial.plan.seed)
        driver = Driver(pool, trial.plan, task, bodies, watch)
        if trial.plan.warm_up:
            say(f"Warming up with {trial.plan.warm_up} requests")
            _check(await driver.warm_up(), trial)
        return Outcome(task, await driver.run(), scale)
    finally:
        pool.close()


async def _task(pool: Pool, trial: Trial) -> str:
    """What the model can do first of what can be tested; servers that do not say are asked to chat."""
    answer = Answer(False, perf_counter())
    await pool.ask(trial.target.request("GET", "/models"), answer, trial.plan.timeout)
    if answer.error in ("connect", "timeout"):
        _check([answer], trial)
    if answer.error:
        return "chat"  # some servers have no list
    cards = [c for c in _cards(answer.body) if c.get("id") == trial.model]
    able: Any = cards[0].get("capabilities") if cards else None
    if isinstance(able, list):
        for task in TASKS:
            if task in able:
                return task
        raise UsageError(
            f"no load test for '{trial.model}': it can {', '.join(map(str, cast('list[Any]', able))) or 'do nothing'}",
            hint=f"Tests are for {', '.join(TASKS)}; --task chooses one.",
        )
    return "chat"


def _cards(body: bytes) -> list[dict[str, Any]]:
    try:
        found = msgspec.json.decode(body, type=dict[str, Any]).get("data")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    cards = cast("list[Any]", found) if isinstance(found, list) else []
    return [cast("dict[str, Any]", card) for card in cards if isinstance(card, dict)]


async def _scale(pool: Pool, task: str, trial: Trial) -> Scale:
    """How many tokens a word has, as the server counts them in two short prompts."""
    counts: list[int] = []
    chance = random.Random(trial.plan.seed)  # noqa: S311 - a load test, no secret
    shape = dataclasses.replace(trial.shape, output_tokens=1)
    for words in PROBES:
        body = prompts.body(task, trial.model, Prompt(prompts.text(words, chance)), shape, chance)
        answer = Answer(task in STREAMED, perf_counter())
        request = trial.target.request("POST", PATHS[task], msgspec.json.encode(body))
        await pool.ask(request, answer, trial.plan.timeout)
        _check([answer], trial)
        counts.append(answer.prompt_tokens)
    return prompts.scale((counts[0], counts[1]))


def _check(answers: list[Answer], trial: Trial) -> None:
    """Raise where every request failed: there is nothing to measure."""
    if not answers or not all(a.error for a in answers):
        return
    kind = next(iter(errors(answers)))
    reason = reasons(answers).get(kind, "")
    where = trial.target.socket or f"{trial.target.host}:{trial.target.port}"
    raise _failure(kind, reason, where, trial)


def _failure(kind: str, reason: str, where: str, trial: Trial) -> PierError:
    said = f": {reason}" if reason else ""
    if kind in ("connect", "timeout"):
        return DaemonUnavailable(f"{where} does not answer{said}", hint="Check --url, and that the server runs.")
    if kind in ("http_401", "http_403"):
        return UsageError(f"{where} wants a key{said}", hint="Name where it is: --key env:NAME or --key FILE")
    if kind == "http_404":
        return NotFound(f"{where} has no '{trial.model}', or cannot do this with it{said}", hint="Try another --task.")
    if kind in ("http_400", "http_422"):
        hint = "A server that knows no ignore_eos needs --no-ignore-eos; a short context needs smaller --prompt-tokens."
        return UsageError(f"{where} refuses the requests of the test{said}", hint=hint)
    return EngineFailed(f"every request of the warm-up failed ({kind}){said}", hint="`pier logs MODEL` may tell why.")
