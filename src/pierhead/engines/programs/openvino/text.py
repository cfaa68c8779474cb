"""Tokens as text while they come: whole characters only, and never beyond a stop string."""

from __future__ import annotations

from collections.abc import Callable


class Words:
    """Turns one answer's tokens into text. ``decode`` makes text of a list of tokens."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...]) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._from = self._to = 0  # the window of tokens whose text is known, so that what joins them is seen
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, tokens: list[int]) -> str:
        """The text that is certain with these tokens; ``stopped`` once a stop string came."""
        self._tokens += tokens
        known = self._decode(self._tokens[self._from : self._to])
        text = self._decode(self._tokens[self._from :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        self._from, self._to = self._to, len(self._tokens)
        return self._pass(text[len(known) :])

    def end(self) -> str:
        """What was held back, when nothing comes any more."""
        rest = self._decode(self._tokens[self._from :])[len(self._decode(self._tokens[self._from : self._to])) :]
        text = self._pass(rest) if rest else ""
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _pass(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text may become the stop string."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
