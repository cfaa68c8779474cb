"""The part of a request's body that decides what an engine reads, as bytes to compare prompts by; renders nothing."""

from __future__ import annotations

import msgspec

from pierhead.routing.balance import Job
from pierhead.routing.prefix import BLOCK, chain_of, seed

READ_MAX = 1 << 20  # a longer body is not taken apart: that would hold up others
_BYTES = 4  # of text for a token, roughly
BLOCK_TOKENS = BLOCK // _BYTES


class _Prompt(msgspec.Struct):
    """The members that become the prompt, in the order in which templates put them."""

    tools: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    lora: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(_Prompt).decode


def job_of(model: str, body: list[bytes]) -> Job:
    """The request as a balancing policy sees it; what cannot be read is compared from its first byte on."""
    text = body[0] if len(body) == 1 else b"".join(body)
    lora = ""
    if len(text) <= READ_MAX:
        try:
            found = _decode(text)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            pass
        else:
            lora = bytes(found.lora).decode("utf-8", "replace")
            text = b"".join((found.tools, found.system, found.instructions, found.messages, found.prompt, found.input))
    return Job(len(text) // _BYTES, chain_of(text, seed(model, lora)), BLOCK_TOKENS)
