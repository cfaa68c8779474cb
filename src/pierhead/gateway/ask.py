"""What the gateway reads out of a request's body: the model, whether it streams, how much it may make; no text."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from pierhead.gateway.faults import Fault, bad_request

ABSENT = msgspec.Raw()  # by its identity: an absent member, not an empty one


class StreamOptions(msgspec.Struct):
    """OpenAI's options of a stream."""

    include_usage: bool | None = None


class Ask(msgspec.Struct):
    """The members that any dialect uses, by their own names; others are skipped unread.

    A member of another type than these makes the request a bad one, as it would for the engine.
    """

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n_predict: int | None = None  # llama.cpp's word for it
    n: int | None = None
    n_cmpl: int | None = None  # and for this
    best_of: int | None = None
    user: str | None = None
    stream_options: StreamOptions | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    options: msgspec.Raw = msgspec.Raw()  # Ollama's
    web_search_options: msgspec.Raw = ABSENT
    tool_choice: msgspec.Raw = ABSENT  # whether there is one; looking for the word in the body costs more

    @property
    def limit(self) -> int | None:
        """The tokens that one answer may have, as the client says."""
        for value in (self.max_completion_tokens, self.max_tokens, self.max_output_tokens):
            if value is not None:
                return value
        return None


class TextAsk(Ask):
    """Of a request for text also what engines would silently take for something else."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    stop: str | list[str] | None = None


class ChatAsk(TextAsk):
    """Of a chat its messages, unread."""

    messages: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1)] | None = None


class VectorAsk(Ask):
    """Of a request for embeddings how long they are to be."""

    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Options(msgspec.Struct):
    """What counts of Ollama's options."""

    num_predict: int | None = None


read_options = msgspec.json.Decoder(Options).decode
_KINDS: dict[str, type[Ask]] = {"chat": ChatAsk, "completions": TextAsk, "embeddings": VectorAsk}
_decode = msgspec.json.Decoder(Ask).decode
_decoders = {operation: msgspec.json.Decoder(kind).decode for operation, kind in _KINDS.items()}
_MUST = {
    "temperature": "a number of 0 or more",
    "top_p": "a number from 0 to 1",
    "stop": "a text or a list of texts",
    "messages": "a list of at least one message",
    "dimensions": "a whole number of 1 or more",
}


def read_ask(body: bytes, operation: str = "") -> Ask:
    """The facts of a JSON body, where the last of members given twice counts, as for engines; Fault 400 if unusable."""
    try:
        ask = _decoders.get(operation, _decode)(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        param = str(exc).rpartition("`$.")[2].rstrip("`") if "`$." in str(exc) else None
        if param is not None and (must := _MUST.get(param.partition("[")[0])) is not None:
            param = param.partition("[")[0]
            raise bad_request(f"'{param}' must be {must}.", code="invalid_value", param=param) from exc
        raise bad_request(f"the request body is not usable JSON: {exc}.", code="invalid_json", param=param) from exc
    if not ask.model:
        raise Fault(400, "missing_model", "the request names no model.", param="model", hint="Send a 'model' member.")
    return ask


def form_ask(fields: dict[str, Any]) -> Ask:
    """The same for a form's fields."""
    if not fields.get("model"):
        raise Fault(400, "missing_model", "the form names no model.", param="model", hint="Send a 'model' field.")
    return Ask(model=fields["model"], stream=fields.get("stream") == "true")
