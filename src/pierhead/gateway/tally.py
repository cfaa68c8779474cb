"""Counters per key, model and operation, and the field's GenAI histograms, made of outcomes; serves no text itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from pierhead.gateway.metrics import Histogram, labels
from pierhead.gateway.outcome import Outcome

# The boundaries that the GenAI semantic conventions of OpenTelemetry ask for.
SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(float(4**n) for n in range(14))
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
EACH = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
PROVIDER = "pierhead"

_PAIRS_MAX = 1000  # (key, model, operation) with counters of their own; later keys are "other"
_ERRORS_MAX = 40  # error codes of one of them
_CHAT = ("chat", "messages", "responses", "ollama-chat")
_KNOWN = dict.fromkeys(_CHAT, "chat") | {
    "completions": "text_completion",
    "ollama-generate": "text_completion",
    "generate": "text_completion",
    "generate-stream": "text_completion",
    "ollama-embed": "embeddings",
    "ollama-embeddings": "embeddings",
}


_CODE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def error_type(outcome: Outcome) -> str:
    """What failed, in a word fit for a label; "" when nothing did. Engines name errors as they like."""
    if outcome.ok and outcome.status < 400:
        return ""
    if outcome.code and len(outcome.code) <= 64 and _CODE.issuperset(outcome.code):
        return outcome.code
    return "aborted" if outcome.status < 400 or outcome.status == 499 else str(outcome.status)


def genai_operation(name: str) -> str:
    """An operation of ours in the words of the GenAI conventions; they allow others than their own."""
    return _KNOWN.get(name, name)


class Kind:
    """Histograms of one operation of one model."""

    __slots__ = ("completion", "duration", "each", "first", "prompt")

    def __init__(self) -> None:
        self.duration = Histogram(SECONDS)
        self.first = Histogram(FIRST)
        self.each = Histogram(EACH)
        self.prompt = Histogram(TOKENS)
        self.completion = Histogram(TOKENS)


class Pair:
    """Counters of one key's use of one operation of one model; ``cost`` in millionths."""

    __slots__ = (
        "cached",
        "completion",
        "cost",
        "errors",
        "first",
        "hits",
        "kind",
        "prompt",
        "seconds",
        "status",
        "warm",
    )

    def __init__(self, kind: Kind, first: Histogram) -> None:
        self.kind = kind
        self.first = first  # the key's, over all models
        self.status: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        self.prompt = 0
        self.cached = 0
        self.completion = 0
        self.cost = 0
        self.hits = 0  # answers out of the response cache
        self.warm = 0  # requests part of whose prompt the engine had in its cache
        self.seconds = 0.0

    def failed(self, outcome: Outcome) -> None:
        """Count an error by its code."""
        code = error_type(outcome)
        if code not in self.errors and len(self.errors) >= _ERRORS_MAX:
            code = "other"
        self.errors[code] = self.errors.get(code, 0) + 1

    def streamed(self, outcome: Outcome) -> None:
        """Observe when the first token came, and the time for each one after it."""
        self.first.observe(outcome.ttft)
        self.kind.first.observe(outcome.ttft)
        rest = outcome.usage.completion - 1
        if rest > 0:
            self.kind.each.observe((outcome.seconds - outcome.ttft) / rest)


class Tally:
    """A sink of outcomes; everything it holds is bounded."""

    def __init__(self, most: int = _PAIRS_MAX) -> None:
        self._most = most
        self._pairs: dict[tuple[str, str, str], Pair] = {}
        self._kinds: dict[tuple[str, str], Kind] = {}
        self._keys: dict[str, Histogram] = {}

    def put(self, outcome: Outcome) -> None:
        """Count one request."""
        pair = self._pairs.get((outcome.key, outcome.model, outcome.operation))
        if pair is None:
            pair = self._pair(outcome.key, outcome.model, outcome.operation)
        status, usage = outcome.status, outcome.usage
        pair.status[status] = pair.status.get(status, 0) + 1
        pair.seconds += outcome.seconds
        kind, seconds = pair.kind, outcome.seconds
        histogram = kind.duration  # as ``observe`` does, without the calls: each request comes by here
        histogram.counts[bisect_left(SECONDS, seconds)] += 1
        histogram.total += seconds
        if usage.known:
            prompt, completion = usage.prompt, usage.completion
            pair.prompt += prompt
            pair.completion += completion
            kind.prompt.counts[bisect_left(TOKENS, prompt)] += 1
            kind.prompt.total += prompt
            kind.completion.counts[bisect_left(TOKENS, completion)] += 1
            kind.completion.total += completion
            if usage.cached:
                pair.cached += usage.cached
                pair.warm += 1
        if outcome.cost:
            pair.cost += outcome.cost
        if outcome.hit:
            pair.hits += 1
        if outcome.ttft:
            pair.streamed(outcome)
        if not outcome.ok or status >= 400:
            pair.failed(outcome)

    def _pair(self, key: str, model: str, operation: str) -> Pair:
        if len(self._pairs) >= self._most:
            key = "other"
            if (key, model, operation) not in self._pairs and len(self._pairs) >= 2 * self._most:
                model = "other"
        pair = self._pairs.get((key, model, operation))
        if pair is None:
            kind = self._kinds.setdefault((model, operation), Kind())
            first = self._keys.setdefault(key, Histogram(FIRST))
            pair = self._pairs[key, model, operation] = Pair(kind, first)
        return pair

    # --- text -----------------------------------------------------------------------------------------------------

    def render(self) -> Iterator[str]:
        """The exposition text, family by family, so that others get a turn in between."""
        pairs = [(labels(key=k or "none", model=m, operation=o), p) for (k, m, o), p in sorted(self._pairs.items())]
        yield from self._by_key(pairs)
        yield from self._by_model()
        yield from self._genai()

    def _by_key(self, pairs: list[tuple[str, Pair]]) -> Iterator[str]:
        name = "pierhead_key_requests_total"
        codes = (f"{name}{_more(at, 'code', c)} {n}" for at, p in pairs for c, n in sorted(p.status.items()))
        yield _family(name, "counter", "Requests of a key, by status.", codes)
        name = "pierhead_key_errors_total"
        errors = (f"{name}{_more(at, 'error', c)} {n}" for at, p in pairs for c, n in sorted(p.errors.items()))
        yield _family(name, "counter", "Requests of a key that failed, by the error's code.", errors)
        for name, text, field in (
            ("pierhead_key_prompt_tokens_total", "Prompt tokens of a key.", "prompt"),
            ("pierhead_key_cached_tokens_total", "Prompt tokens of a key that engines had in their caches.", "cached"),
            ("pierhead_key_completion_tokens_total", "Completion tokens of a key.", "completion"),
            ("pierhead_key_request_seconds_total", "Time that a key's requests took.", "seconds"),
        ):
            yield _family(name, "counter", text, (f"{name}{at} {_number(getattr(p, field))}" for at, p in pairs))
        name = "pierhead_key_cost_total"
        costs = (f"{name}{at} {p.cost / 1e6:.6f}" for at, p in pairs)
        yield _family(name, "counter", "What a key's requests cost, in the currency of the prices.", costs)
        name = "pierhead_key_time_to_first_token_seconds"
        first = (line for k, h in sorted(self._keys.items()) for line in h.sampled(name, labels(key=k or "none")))
        yield _family(name, "histogram", "From a key's whole request to the first streamed event.", first)

    def _by_model(self) -> Iterator[str]:
        sums: dict[str, list[int]] = {}
        errors: dict[tuple[str, str], int] = {}
        for (_, model, _), pair in self._pairs.items():
            row = sums.setdefault(model, [0, 0, 0])
            row[0] += pair.cached
            row[1] += pair.warm
            row[2] += pair.hits
            for code, count in pair.errors.items():
                errors[model, code] = errors.get((model, code), 0) + count
        for i, (name, text) in enumerate(
            (
                ("pierhead_cached_tokens_total", "Prompt tokens that engines had in their caches."),
                ("pierhead_prefix_cache_hits_total", "Requests part of whose prompt an engine had in its cache."),
                ("pierhead_response_cache_hits_total", "Answers that came out of the response cache."),
            )
        ):
            yield _family(name, "counter", text, (f"{name}{labels(model=m)} {r[i]}" for m, r in sorted(sums.items())))
        name = "pierhead_errors_total"
        lines = (f"{name}{labels(model=m, error=c)} {n}" for (m, c), n in sorted(errors.items()))
        yield _family(name, "counter", "Requests that failed, by the error's code.", lines)

    def _genai(self) -> Iterator[str]:
        kinds = [
            (
                labels(
                    gen_ai_operation_name=genai_operation(o), gen_ai_provider_name=PROVIDER, gen_ai_request_model=m,
                    pierhead_operation=o,
                ),
                kind,
            )
            for (m, o), kind in sorted(self._kinds.items())
        ]  # fmt: skip
        for name, text, field in (
            ("gen_ai_server_request_duration_seconds", "From the whole request to the whole answer.", "duration"),
            ("gen_ai_server_time_to_first_token_seconds", "From the whole request to the first token.", "first"),
            ("gen_ai_server_time_per_output_token_seconds", "For each token after the first one.", "each"),
        ):
            lines = (line for at, k in kinds for line in _histogram(getattr(k, field)).sampled(name, at))
            yield _family(name, "histogram", text, lines)
        name = "gen_ai_client_token_usage"
        both = (
            line
            for at, k in kinds
            for kind, h in (("input", k.prompt), ("output", k.completion))
            for line in h.sampled(name, _more(at, "gen_ai_token_type", kind))
        )
        yield _family(name, "histogram", "Tokens of one request.", both)


def _histogram(value: Histogram) -> Histogram:
    return value


def _more(at: str, name: str, value: object) -> str:
    """Labels with one more; ``value`` has no character that needs escaping."""
    return f'{at[:-1]},{name}="{value}"}}'


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}"


def _family(name: str, kind: str, text: str, lines: Iterable[str]) -> str:
    return "\n".join((f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines)) + "\n"
