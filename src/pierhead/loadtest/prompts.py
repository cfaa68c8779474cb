"""The prompts of a load test: of a given length, each one different, or a user's own; counts no tokens itself."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from pierhead.errors import UsageError

MAX_DATASET = 256 << 20
PROBES = (16, 144)
# Short everyday words: nearly all vocabularies have each of them, with its space, as one token.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power "
    "hour game line end member law car city name team minute idea body back parent face level office door health art "
    "war history party result change morning reason research girl guy moment air teacher force education foot boy age "
    "policy music market sense nation plan college interest death experience effect use class control field role "
    "effort rate heart drug show leader light voice wife mind price report decision son view town road form value "
    "action season society tax player model paper space ground table court film tree skin term nature fire film star"
)
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Shape:
    """How long prompts and answers are, in tokens; ``own`` are a user's prompts instead."""

    prompt_tokens: int = 128
    output_tokens: int = 32
    own: tuple[Prompt, ...] = ()
    ignore_eos: bool = True
    documents: int = 8


@dataclass(frozen=True)
class Prompt:
    """One prompt: text, or the messages of a chat; ``output_tokens`` 0: as the test says."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    output_tokens: int = 0


@dataclass(frozen=True)
class Scale:
    """How many tokens a prompt of n words has: ``fixed + each * n``, as a server counted two of them."""

    fixed: float = 0.0
    each: float = 1.0
    known: bool = False

    def words(self, tokens: int) -> int:
        """Words for a prompt of so many tokens; at least one."""
        return max(1, round((tokens - self.fixed) / self.each))


def scale(counts: tuple[int, int]) -> Scale:
    """The scale from the tokens that a server counted in prompts of ``PROBES`` words (0: it does not count)."""
    short, long = counts
    if not 0 < short < long:
        return Scale()
    each = (long - short) / (PROBES[1] - PROBES[0])
    return Scale(short - each * PROBES[0], each, True)


def text(words: int, chance: random.Random) -> str:
    """A prompt of so many words that no other prompt begins like, so that no cache of prefixes helps."""
    return " ".join(chance.choices(WORDS, k=words))


def bodies(task: str, model: str, shape: Shape, words: int, seed: int) -> Iterator[bytes]:
    """Requests without end, each a JSON body."""
    chance = random.Random(seed)  # noqa: S311 - a load test, no secret
    own = list(shape.own)
    chance.shuffle(own)
    turn = 0
    while True:
        prompt = own[turn % len(own)] if own else Prompt(text(words, chance))
        turn += 1
        yield msgspec.json.encode(body(task, model, prompt, shape, chance))


def body(task: str, model: str, prompt: Prompt, shape: Shape, chance: random.Random) -> dict[str, Any]:
    """One request of a task."""
    if task == "embeddings":
        return {"model": model, "input": _plain(prompt)}
    if task == "rerank":
        documents = [
            text(max(1, len(_plain(prompt).split()) // shape.documents), chance) for _ in range(shape.documents)
        ]
        return {"model": model, "query": text(8, chance), "documents": documents}
    made: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    limit = prompt.output_tokens or shape.output_tokens
    if limit:
        made |= {"max_tokens": limit}
    if shape.ignore_eos and limit:
        made |= {"ignore_eos": True}
    if task == "completions":
        return made | {"prompt": _plain(prompt)}
    return made | {"messages": list(prompt.messages) or [{"role": "user", "content": prompt.text}]}


def _plain(prompt: Prompt) -> str:
    if prompt.messages:
        return "\n".join(str(m.get("content") or "") for m in prompt.messages)
    return prompt.text


def read_dataset(path: Path) -> tuple[Prompt, ...]:
    """A user's prompts: JSON lines with ``prompt``, ``text``, ``input``, ``messages`` or ``conversations``."""
    try:
        if path.stat().st_size > MAX_DATASET:
            raise UsageError(f"{path} is larger than {MAX_DATASET >> 20} MiB", hint="Use a part of it: head -n 1000")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise UsageError(f"cannot read {path}: {why}", hint='Each line is JSON: {"prompt": "…"}') from exc
    found = tuple(_prompt(line, path, number) for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise UsageError(f"{path} has no prompts", hint='Each line is JSON: {"prompt": "…"}')
    return found


def _prompt(line: str, path: Path, number: int) -> Prompt:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, str) and row:
        return Prompt(row)
    found = _from_row(cast("dict[str, Any]", row)) if isinstance(row, dict) else None
    if found is None:
        hint = 'Each line is JSON: {"prompt": "…"}, {"messages": […]} or a string; output_tokens is optional.'
        raise UsageError(f"{path}, line {number}: there is no prompt", hint=hint)
    return found


def _from_row(row: dict[str, Any]) -> Prompt | None:
    limit = row.get("output_tokens", row.get("max_tokens"))
    limit = limit if isinstance(limit, int) and 0 < limit < 1 << 20 else 0
    said = row.get("messages")
    if isinstance(said, list) and said and all(isinstance(m, dict) and "role" in m for m in cast("list[Any]", said)):
        return Prompt(messages=tuple(cast("list[dict[str, Any]]", said)), output_tokens=limit)
    for name in ("prompt", "text", "input", "question"):
        if isinstance(row.get(name), str) and row[name]:
            return Prompt(str(row[name]), output_tokens=limit)
    turns = row.get("conversations")
    for turn in cast("list[Any]", turns) if isinstance(turns, list) else []:
        if isinstance(turn, dict) and isinstance(value := cast("dict[str, Any]", turn).get("value"), str) and value:
            return Prompt(value, output_tokens=limit)
    return None
