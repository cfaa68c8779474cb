"""Cuts a server-sent event stream at event boundaries, so that a stream which breaks off can still end well."""

from __future__ import annotations

_HOLD = 262144


class EventSplitter:
    """Holds back an unfinished event (up to 256 KiB; a longer one passes as it comes and ``ragged`` is set)."""

    __slots__ = ("_held", "done", "ragged")

    def __init__(self) -> None:
        self._held = b""
        self.done = False
        self.ragged = False

    def feed(self, data: bytes) -> bytes:
        """Whole events of what came so far."""
        if self._held:
            data = self._held + data
            self._held = b""
        if not data.endswith(b"\n\n"):
            data = self._cut(data)
        else:
            self.ragged = False
        if b"data: [DONE]" in data[-64:] or b"data:[DONE]" in data[-64:]:
            self.done = True
        return data

    def _cut(self, data: bytes) -> bytes:
        cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4, data.rfind(b"\r\r") + 2)
        if cut < 4:  # rfind found nothing (1 and 3 are -1 plus a length)
            cut = 0
        if len(data) - cut > _HOLD:
            self.ragged = True
            return data
        self._held = data[cut:]
        if cut:
            self.ragged = False
        return data[:cut]

    def flush(self) -> bytes:
        """What was held back, for a stream that ended well."""
        held, self._held = self._held, b""
        return held
