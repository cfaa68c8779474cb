"""The most that a request can take, before it is sent: tokens of its prompt and of its answers; pure.

A prompt has no more tokens than its request has bytes, plus what the model's template adds: each token of the client's
text stands for at least one byte of it, and JSON around a message is longer than the marks that a template makes of it.
What its bytes do not bound (see ``unseen``) comes on top. Nothing has more than the model's context, if that is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from pierhead.gateway.ask import ABSENT, Ask, read_options
from pierhead.gateway.link import Price
from pierhead.gateway.operations import Operation
from pierhead.gateway.prices import affordable, bound
from pierhead.gateway.unseen import unseen
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.budgets import Budgets
    from pierhead.gateway.routes import Entry

MARGIN: Final = 256  # tokens that a template may add on its own, until more are seen
_LEAST: Final = 16  # an answer is not clamped to less than this
_AUDIO: Final = 32  # bytes of a form's file that make a token at most
_ENDLESS: Final = 1 << 60  # more than any budget can be
_ONE = frozenset(("chat", "responses", "messages", "ollama-chat", "ollama-generate", "generate", "generate-stream"))
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Plan:
    """``answer`` is the bound on all ``answers`` together, ``least`` what they are clamped to at most.

    ``tokens`` is all that counts, ``cap`` the most tokens of one answer (0 where none is made).
    """

    __slots__ = ("answer", "answers", "cap", "least", "margin", "model", "price", "prompt", "tokens")

    def __init__(
        self, model: str, prompt: int, answers: int, answer: int, least: int, margin: int, price: Price | None
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.answers = answers
        self.answer = answer
        self.least = least
        self.margin = margin
        self.price = price
        self.tokens = prompt + answer
        self.cap = answer // answers if answers else 0

    @property
    def usage(self) -> Usage:
        """What counts when the engine does not say."""
        return Usage(self.prompt, self.answer, 0, True)

    def clamped(self, answer: int) -> Plan:
        """The same with answers of at most so many tokens, each of them equally long."""
        if answer >= self.answer or not self.answers:
            return self
        answer = answer // self.answers * self.answers
        return Plan(self.model, self.prompt, self.answers, answer, self.least, self.margin, self.price)


def plan(
    room: Budgets, ask: Ask, entry: Entry, size: int, operation: Operation, price: Price | None, text: bytes = b""
) -> Plan:
    """What a request of ``size`` bytes can take; ``text`` is its body or the skeleton of that."""
    targets = entry.targets
    context = targets[0].context if len(targets) == 1 else max((target.context for target in targets), default=0)
    margin = room.margins.get(entry.name, MARGIN)
    name = operation.name
    if name != "chat" or ask.web_search_options is not ABSENT or not plain(text):
        most = size // _AUDIO if operation.where == "form" else size + unseen(name, text, size)
    else:
        most = size
    prompt = most + margin
    prompts = _prompts(ask) if name == "completions" else 1
    if context and prompt > context * prompts and (name in _ONE or name == "completions"):
        prompt = context * prompts
    if not operation.generates:
        return Plan(entry.name, prompt, 0, 0, 0, margin, price)
    answers = prompts
    if ask.n is not None or ask.n_cmpl is not None or ask.best_of is not None:
        answers *= max(ask.n or 1, ask.n_cmpl or 1, ask.best_of or 1, 1)
    limit = bound_of(ask) if operation.dialect != "ollama" else _predicted(ask)
    each = room.answer if limit is None else limit
    if context and each > context:
        each = context
    each, answers = min(max(each, 1), _ENDLESS), min(answers, _ENDLESS)
    return Plan(entry.name, prompt, answers, each * answers, min(each, _LEAST) * answers, margin, price)


def plain(text: bytes) -> bool:
    """Whether a chat's members but ``web_search_options`` can name nothing of the kind: its one list is of messages.

    It is told by single bytes, which are found many times faster than words.
    """
    first = text.find(b"[")
    return (first < 0 or text.find(b"[", first + 1) < 0) and (b"\\" not in text or b"\\u00" not in text)


def bound_of(ask: Ask) -> int | None:
    """The most that any of a request's members lets one answer have; None for no bound."""
    if ask.max_completion_tokens is None and ask.max_output_tokens is None and ask.n_predict is None:
        only = ask.max_tokens
        return only if only is None or only >= 0 else None
    given = (ask.max_completion_tokens, ask.max_tokens, ask.max_output_tokens, ask.n_predict)
    values = [value for value in given if value is not None]
    return max(values) if values and min(values) >= 0 else None


def _predicted(ask: Ask) -> int | None:
    """The limit in Ollama's options; None for none, or where they are not right."""
    try:
        limit = read_options(ask.options or b"{}").num_predict
    except msgspec.MsgspecError:
        return None
    return limit if limit is not None and limit >= 0 else None


def _prompts(ask: Ask) -> int:
    """How many texts are to be completed, each with answers of its own."""
    if not bytes(ask.prompt).startswith(b"["):
        return 1
    items = _list(ask.prompt)
    return max(1, len(items)) if items and bytes(items[0])[:1] in (b'"', b"[", b"{") else 1


def amount(unit: str, planned: Plan, answer: int) -> int:
    """What a request can take of a budget when its answers have ``answer`` tokens."""
    if unit == "tokens":
        return planned.prompt + answer
    if unit == "requests":
        return 1
    return bound(planned.price, planned.prompt, answer) if planned.price is not None else 0


def answer_within(unit: str, planned: Plan, available: int) -> int:
    """How many tokens of answers ``available`` allows; negative when not even the prompt."""
    if unit == "requests":
        return planned.answer if available >= 1 else -1
    if unit == "tokens":
        return available - planned.prompt
    return affordable(planned.price, planned.prompt, available) if planned.price is not None else planned.answer
