"""An engine's chat answer in the words of the Responses API, whole and as a stream of events; pure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pierhead.gateway.dialects import chat
from pierhead.gateway.dialects.base import Facts
from pierhead.gateway.dialects.responses_request import Wish
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import Usage

_CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
Item = dict[str, Any]


def response(facts: Facts, wish: Wish, output: list[Item], finish: str | None, usage: Usage | None) -> dict[str, Any]:
    """The response as a resource; ``usage`` None: it is still being made."""
    cut = _CUT.get(finish or "") if usage is not None else None
    status = "in_progress" if usage is None else "incomplete" if cut else "completed"
    return wish.echo | {
        "id": f"resp_{facts.nonce}",
        "object": "response",
        "created_at": facts.created,
        "completed_at": max(facts.created, int(time.time())) if status == "completed" else None,
        "status": status,
        "incomplete_details": {"reason": cut} if cut else None,
        "error": None,
        "output": output,
        "usage": _usage(usage) if usage is not None else None,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


class Output:
    """The items of an answer, told as events while they grow; ``emit`` gets each event's name and members.

    A whole answer is made by the same steps, with nobody to hear the events.
    """

    def __init__(self, nonce: str, summary: bool, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._nonce = nonce
        self._summary = summary
        self._emit = emit
        self._call = -1  # the engine's index of the call under way
        self._open: Item | None = None
        self._member = ""  # where the text of the part under way is
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self.items: list[Item] = []

    def add(self, delta: chat.Message, logprobs: list[dict[str, Any]] | None = None) -> None:
        """The next piece of the answer, or all of it."""
        if delta.thought:
            self._reason(delta.thought)
        if delta.content:
            self._say("output_text", delta.content, logprobs)
        if delta.refusal:
            self._say("refusal", delta.refusal, None)
        for call in delta.tool_calls or ():
            self._called(call)

    def end(self, cut: bool) -> None:
        """Close what is open; an answer of nothing is a message of nothing."""
        if not self.items and self._open is None:
            self._begin_message("output_text")
        self._close("incomplete" if cut else "completed")

    # --- items ----------------------------------------------------------------------------------------------------

    def _begin(self, kind: str, item: Item) -> None:
        self._close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        self._open = {"id": f"{prefix}_{self._nonce}_{len(self.items)}", "type": kind} | item
        self._text, self._logprobs = [], []
        self._tell("response.output_item.added", item=self._open)

    def _tell(self, event: str, /, **members: Any) -> None:
        """An event about the item under way: by its id, or with the item itself."""
        assert self._open is not None
        place: dict[str, Any] = {} if "item" in members else {"item_id": self._open["id"]}
        self._emit(event, place | {"output_index": len(self.items)} | members)

    def _begin_message(self, kind: str) -> None:
        self._begin("message", {"role": "assistant", "status": "in_progress", "content": []})
        self._member = "text" if kind == "output_text" else "refusal"
        self._tell("response.content_part.added", content_index=0, part=self._part(kind, ""))

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        if kind == "output_text":
            return {"type": kind, "text": text, "annotations": [], "logprobs": self._logprobs}
        return {"type": kind, "refusal" if kind == "refusal" else "text": text}

    def _say(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None) -> None:
        member = "text" if kind == "output_text" else "refusal"
        if self._open is None or self._open["type"] != "message" or self._member != member:
            self._begin_message(kind)
        self._text.append(text)
        told = {} if member == "refusal" else {"logprobs": logprobs or []}
        if logprobs:
            self._logprobs += logprobs
        self._tell(f"response.{kind}.delta", content_index=0, delta=text, **told)

    def _reason(self, text: str) -> None:
        if self._open is None or self._open["type"] != "reasoning":
            self._begin("reasoning", {"summary": [], "content": [], "status": "in_progress"})
            part = self._part("reasoning_text", "")
            self._tell("response.content_part.added", content_index=0, part=part)
        self._text.append(text)
        self._tell("response.reasoning_text.delta", content_index=0, delta=text)

    def _called(self, call: chat.ToolCall) -> None:
        function = call.function or chat.Function()
        if self._open is None or self._open["type"] != "function_call" or self._call != call.index:
            self._call = call.index
            id = call.id or f"call_{self._nonce}_{call.index}"
            begun = {"call_id": id, "name": function.name or "", "arguments": "", "status": "in_progress"}
            self._begin("function_call", begun)
        if function.arguments:
            self._text.append(function.arguments)
            self._tell("response.function_call_arguments.delta", delta=function.arguments)

    def _close(self, status: str) -> None:
        item = self._open
        if item is None:
            return
        text = "".join(self._text)
        if item["type"] == "function_call":
            item = item | {"arguments": text}
            self._tell("response.function_call_arguments.done", name=item["name"], arguments=text)
        elif item["type"] == "reasoning":
            item = self._close_reasoning(item, text)
        else:
            kind = "output_text" if self._member == "text" else "refusal"
            item = item | {"content": [self._close_part(kind, text)]}
        item["status"] = status
        self._tell("response.output_item.done", item=item)
        self.items.append(item)
        self._open = None

    def _close_part(self, kind: str, text: str) -> dict[str, Any]:
        part = self._part(kind, text)
        told: dict[str, Any] = {"refusal": text} if kind == "refusal" else {"text": text}
        if kind == "output_text":
            told["logprobs"] = self._logprobs
        self._tell(f"response.{kind}.done", content_index=0, **told)
        self._tell("response.content_part.done", content_index=0, part=part)
        return part

    def _close_reasoning(self, item: Item, text: str) -> Item:
        item = item | {"content": [self._close_part("reasoning_text", text)]}
        if not self._summary:
            return item
        part = {"type": "summary_text", "text": text}
        name = "response.reasoning_summary"
        self._tell(f"{name}_part.added", summary_index=0, part=part | {"text": ""})
        self._tell(f"{name}_text.delta", summary_index=0, delta=text)
        self._tell(f"{name}_text.done", summary_index=0, text=text)
        self._tell(f"{name}_part.done", summary_index=0, part=part)
        return item | {"summary": [part]}


class Events:
    """The stream of a response, numbered."""

    def __init__(self, facts: Facts, wish: Wish) -> None:
        self._facts = facts
        self._wish = wish
        self._number = 0
        self._out: list[bytes] = []
        self._output = Output(facts.nonce, wish.summary, self._emit)
        self._begun = False
        self._finish: str | None = None
        self._last: dict[str, Any] | None = None

    @property
    def last(self) -> dict[str, Any] | None:
        """The response as it ended."""
        return self._last

    def feed(self, chunk: chat.Chunk) -> bytes:
        """What one chunk of the engine becomes."""
        self._begin()
        choice = chunk.first
        if choice is not None:
            self._finish = choice.finish_reason or self._finish
            if choice.delta is not None:
                self._output.add(choice.delta, told(choice))
        return self._take()

    def end(self, usage: Usage) -> bytes:
        """The last events."""
        self._begin()
        self._output.end(self._finish in _CUT)
        self._last = response(self._facts, self._wish, self._output.items, self._finish, usage)
        self._emit(f"response.{self._last['status']}", {"response": self._last})
        return self._take() + b"data: [DONE]\n\n"

    def failed(self, fault: Fault) -> bytes:
        """The last events of a response that failed on the way."""
        self._begin()
        error = {"code": "server_error", "message": fault.message}
        now = response(self._facts, self._wish, self._output.items, None, None)
        self._emit("response.failed", {"response": now | {"status": "failed", "error": error}})
        full = {"type": fault.type, "code": fault.code, "message": fault.message, "param": fault.param}
        self._emit("error", full | {"error": full})
        return self._take()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            now = response(self._facts, self._wish, [], None, None)
            self._emit("response.created", {"response": now})
            self._emit("response.in_progress", {"response": now})

    def _emit(self, name: str, members: dict[str, Any]) -> None:
        self._out.append(chat.event(name, members | {"type": name, "sequence_number": self._number}))
        self._number += 1

    def _take(self) -> bytes:
        out, self._out = self._out, []
        return b"".join(out)


def told(choice: chat.Choice) -> list[dict[str, Any]] | None:
    """The log probabilities of a piece."""
    return choice.logprobs.content if choice.logprobs is not None else None


def whole(facts: Facts, wish: Wish, body: bytes, usage: Usage, prefill: str = "") -> dict[str, Any]:
    """The response that a whole chat answer makes; ``prefill`` is what the engine says again of its prompt."""
    _, choice, said = chat.whole(body)
    said.content = (said.content or "").removeprefix(prefill)
    for index, call in enumerate(said.tool_calls or ()):
        call.index = index
    output = Output(facts.nonce, wish.summary, lambda _name, _members: None)
    output.add(said, told(choice))
    output.end(choice.finish_reason in _CUT)
    return response(facts, wish, output.items, choice.finish_reason, usage)
