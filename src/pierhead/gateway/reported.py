"""The shapes in which engines report the tokens they used; apart, since msgspec cannot read a compiled class."""

from __future__ import annotations

import msgspec


class Details(msgspec.Struct):
    """Part of a prompt."""

    cached_tokens: int | None = None


class Counts(msgspec.Struct):
    """An engine's or a provider's ``usage``."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None
    # Anthropic's and the Responses API's words
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    input_tokens_details: Details | None = None


class Timings(msgspec.Struct):
    """What llama.cpp tells where there is no usage."""

    prompt_n: int = 0
    cache_n: int = 0
    predicted_n: int = 0


counts = msgspec.json.Decoder(Counts).decode
timings = msgspec.json.Decoder(Timings).decode
