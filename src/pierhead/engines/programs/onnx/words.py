"""Texts to tokens by the ``tokenizers`` library; long texts are refused or cut, never silently."""

from __future__ import annotations

import asyncio
import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .faults import Refused, Unusable, bad
from .folder import Folder

AT_ONCE = 4096  # characters of a request that are tokenized without a thread
PER_TOKEN = 200  # characters: what has more of them for each token that fits is not even tokenized
Text = str | tuple[str, str] | list[int]


class Coded(NamedTuple):
    """A text as tokens; ``types`` tell a pair's halves apart, ``offsets`` are characters."""

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    special: list[int]
    cut: bool = False


class Words:
    """A model's tokenizer; ``context`` is how many tokens fit."""

    def __init__(self, folder: Folder, context: int, *, offsets: bool) -> None:
        path = folder.find("tokenizer.json")
        if path is None:
            raise Unusable("there is no tokenizer.json beside the model; texts need one (or set task=tensors)")
        library: Any = importlib.import_module("tokenizers")
        try:
            self._whole, self._cutting = (library.Tokenizer.from_file(str(path)) for _ in range(2))
        except Exception as exc:  # the library raises plain exceptions with the reason
            raise Unusable(f"tokenizer.json cannot be used: {str(exc)[:300]}") from exc
        self._offsets = offsets
        self.padding = _padding(self._whole, folder.config)
        own = folder.context(self.padding)
        self.context = min(context or own or 512, own or 1 << 24)
        self.extra = int(self._whole.num_special_tokens_to_add(False))
        self.size = int(self._whole.get_vocab_size())
        self._whole.no_padding()
        self._whole.no_truncation()
        self._cutting.no_padding()
        self._cutting.enable_truncation(self.context)
        self._pool = ThreadPoolExecutor(1, "words")

    async def code(self, texts: list[Text], truncate: bool) -> list[Coded]:
        """The texts as tokens; Refused 400 for one that does not fit, unless it may be cut."""
        if sum(map(_length, texts)) <= AT_ONCE:
            return self._code(texts, truncate)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._code, texts, truncate)

    def _code(self, texts: list[Text], truncate: bool) -> list[Coded]:
        most = self.context * PER_TOKEN
        plain = [self._short(text, most, place, truncate) for place, text in enumerate(texts)]
        words = [text for text in plain if not isinstance(text, list)]
        made = iter(self._encode(self._whole, words) if words else ())
        coded = [self._given(text) if isinstance(text, list) else next(made) for text in plain]
        return [
            self._cut(plain[place], one, place, truncate)
            if len(one.ids) > self.context
            else one._replace(cut=plain[place] is not texts[place])
            for place, one in enumerate(coded)
        ]

    def _short(self, text: Text, most: int, place: int, truncate: bool) -> Text:
        """A text that is far too long is not worth its tokens."""
        if isinstance(text, list) or _length(text) <= most:
            return text
        if not truncate:
            raise self._long(place, f"has {_length(text)} characters")
        return text[:most] if isinstance(text, str) else (text[0][:most], text[1][:most])

    def _cut(self, text: Text, whole: Coded, place: int, truncate: bool) -> Coded:
        if not truncate:
            raise self._long(place, f"has {len(whole.ids)} tokens")
        if isinstance(text, list):
            return Coded(whole.ids[: self.context], whole.types[: self.context], [], [], True)
        return self._encode(self._cutting, [text])[0]._replace(cut=True)

    def _long(self, place: int, has: str) -> Refused:
        return bad(
            f'text {place} {has}, the model reads {self.context}; shorten it, or send "truncate": true to have it cut',
            "context_length_exceeded",
        )

    def _given(self, ids: list[int]) -> Coded:
        """Tokens that the client made itself."""
        if any(not 0 <= one < self.size for one in ids):
            raise bad(f"a token is not of this model's vocabulary (0 to {self.size - 1})")
        return Coded(ids, [0] * len(ids), [], [])

    def _encode(self, tokenizer: Any, texts: list[Any]) -> list[Coded]:
        try:
            if self._offsets:
                found = tokenizer.encode_batch(texts)
                return [Coded(e.ids, e.type_ids, e.offsets, e.special_tokens_mask) for e in found]
            if len(texts) == 1:
                one = texts[0]
                encoded = tokenizer.encode(*one) if isinstance(one, tuple) else tokenizer.encode(one)
                return [Coded(encoded.ids, encoded.type_ids, [], [])]
            return [Coded(e.ids, e.type_ids, [], []) for e in tokenizer.encode_batch_fast(texts)]
        except UnicodeEncodeError as exc:  # a lone surrogate, which no text has
            raise bad("a text is not valid Unicode") from exc


def _length(text: Text) -> int:
    return len(text) if not isinstance(text, tuple) else len(text[0]) + len(text[1])


def _padding(tokenizer: Any, config: dict[str, Any]) -> int:
    """The id of what fills a batch up; the mask hides it, but some models count positions by it."""
    given = tokenizer.padding
    if given and isinstance(given.get("pad_id"), int):
        return int(given["pad_id"])
    if isinstance(config.get("pad_token_id"), int):
        return int(config["pad_token_id"])
    found = (tokenizer.token_to_id(word) for word in ("[PAD]", "<pad>"))
    return next((int(one) for one in found if one is not None), 0)
