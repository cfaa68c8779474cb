"""whisper.cpp behind its binding: loads a model, turns one stretch of sound into segments; knows no HTTP."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from .faults import Failed, Unusable
from .languages import UNSPACED
from .settings import Settings

cpp: Any = importlib.import_module("_pywhispercpp")
ERROR = 4  # of ggml's log
_ENDS = '.,!?;:"“”‘’«»()[]{}…—–-、。！？，：；'  # marks that belong to no word


@dataclass(frozen=True)
class Wish:
    """How sound is to be heard; ``language`` is a code, "" to find out."""

    language: str = ""
    translate: bool = False
    prompt: str = ""
    temperature: float = 0.0
    words: bool = False


class Token(msgspec.Struct, frozen=True):
    """``start`` and ``end`` in seconds, where they were asked for."""

    id: int
    text: bytes
    logprob: float
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """What was said from ``start`` to ``end`` (seconds)."""

    start: float
    end: float
    text: str
    tokens: tuple[Token, ...]

    def later(self, seconds: float) -> Segment:
        """The same, in a recording that began so much earlier."""
        moved = tuple(msgspec.structs.replace(t, start=t.start + seconds, end=t.end + seconds) for t in self.tokens)
        return replace(self, start=self.start + seconds, end=self.end + seconds, tokens=moved)


class Log:
    """What whisper.cpp complains about; all else is dropped."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        cpp.whisper_log_set(self._take)

    def _take(self, level: int, text: str) -> None:
        if level == ERROR and text.strip():
            self._lines.append(text.strip())
            del self._lines[:-20]

    def reason(self) -> str:
        """The first complaint since the last time, which is the cause of those that follow."""
        found = self._lines[0] if self._lines else ""
        self._lines.clear()
        return found.partition(": ")[2] or found

    def close(self) -> None:
        """Python must not be called any more when it ends."""
        cpp.whisper_log_set(None)


class Model:
    """A model with caches of its own: works on one stretch at a time, in any thread."""

    def __init__(self, path: str, settings: Settings, multilingual: bool, vad: str, log: Log) -> None:
        self._settings = settings
        self._multilingual = multilingual
        self._vad = vad
        self._log = log
        parameters = cpp.whisper_context_default_params()
        parameters.use_gpu = False
        parameters.flash_attn = settings.flash_attention
        self._context = cpp.whisper_init_from_file_with_params(path, parameters)
        if reason := log.reason():  # the binding has an empty context then, and using that ends the process
            raise Unusable(f"whisper.cpp cannot load the model: {reason}")
        self._special = int(cpp.whisper_token_eot(self._context))

    def hear(
        self, samples: Any, wish: Wish, gone: Callable[[], bool], tell: Callable[[Segment], None] | None = None
    ) -> tuple[list[Segment], str]:
        """Segments and the language; ``tell`` hears of each as it is found. InterruptedError once ``gone`` says so."""
        wanted = self._parameters(wish)
        wanted.set_abort_callback(gone)
        if tell is not None:
            wanted.set_new_segment_callback(self._teller(tell))
        try:
            status = cpp.whisper_full(self._context, wanted, samples, samples.size)
        except (RuntimeError, IndexError, ValueError, MemoryError, OverflowError) as exc:  # what C++ throws
            raise Failed(f"whisper.cpp gave up: {exc}") from exc
        if gone():
            raise InterruptedError
        if status != 0:
            raise Failed(self._log.reason() or f"whisper.cpp ended with status {status}")
        found = [self._segment(n) for n in range(cpp.whisper_full_n_segments(self._context))]
        return found, str(cpp.whisper_lang_str(cpp.whisper_full_lang_id(self._context)) or wish.language)

    def _parameters(self, wish: Wish) -> Any:
        settings, kinds = self._settings, cpp.whisper_sampling_strategy
        beams = settings.beam_size > 1
        wanted = cpp.whisper_full_default_params(
            kinds.WHISPER_SAMPLING_BEAM_SEARCH if beams else kinds.WHISPER_SAMPLING_GREEDY
        )
        wanted.print_progress = wanted.print_timestamps = wanted.print_realtime = False
        wanted.n_threads = settings.threads
        wanted.language = wish.language if self._multilingual else "en"
        wanted.translate = wish.translate
        wanted.temperature = wish.temperature
        wanted.temperature_inc = 0.2 if settings.fallback else 0.0
        wanted.greedy = {"best_of": settings.best_of}
        if beams:
            wanted.beam_search = {"beam_size": settings.beam_size, "patience": -1.0}
        wanted.token_timestamps = wish.words
        wanted.suppress_nst = settings.suppress_non_speech
        if wish.prompt:
            wanted.initial_prompt = wish.prompt
        if self._vad:
            wanted.vad = True
            wanted.vad_model_path = self._vad
        return wanted

    def _teller(self, tell: Callable[[Segment], None]) -> Callable[[Any, int], None]:
        """What whisper.cpp calls when there are ``count`` more segments."""

        def told(_: Any, count: int) -> None:
            total = cpp.whisper_full_n_segments(self._context)
            for number in range(total - count, total):
                tell(self._segment(number))

        return told

    def _segment(self, number: int) -> Segment:
        context = self._context
        tokens: list[Token] = []
        for place in range(cpp.whisper_full_n_tokens(context, number)):
            data = cpp.whisper_full_get_token_data(context, number, place)
            if data.id < self._special:
                text = cpp.whisper_token_to_bytes(context, data.id)
                tokens.append(Token(data.id, text, data.plog, data.t0 / 100, data.t1 / 100))
        return Segment(
            cpp.whisper_full_get_segment_t0(context, number) / 100,
            cpp.whisper_full_get_segment_t1(context, number) / 100,
            cpp.whisper_full_get_segment_text(context, number).decode("utf-8", "replace"),
            tuple(tokens),
        )

    def close(self) -> None:
        """Give the memory back."""
        cpp.whisper_free(self._context)


class Models:
    """As many models as requests are worked on at a time; each thread takes one."""

    def __init__(self, made: list[Model]) -> None:
        self._free = made
        self._lock = threading.Lock()

    def take(self) -> Model:
        with self._lock:
            return self._free.pop()

    def give(self, model: Model) -> None:
        with self._lock:
            self._free.append(model)


def words(segment: Segment, language: str) -> list[tuple[str, float, float]]:
    """Each word with its start and end; marks belong to none. Where no spaces are written, each character is one."""
    found: list[tuple[bytes, float, float]] = []
    for token in segment.tokens:
        begins = token.text.startswith(b" ") or not found
        if language in UNSPACED:
            begins = _whole(found[-1][0]) if found else True
        if begins:
            found.append((token.text, token.start, token.end))
        else:
            text, start, end = found[-1]
            marks = not token.text.decode("utf-8", "replace").strip().strip(_ENDS)
            found[-1] = (text + token.text, start, end if marks else max(end, token.end))
    plain = [(text.decode("utf-8", "replace").strip().strip(_ENDS), start, end) for text, start, end in found]
    return [word for word in plain if word[0]]


def _whole(text: bytes) -> bool:
    """Whether no character is cut at the end."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
