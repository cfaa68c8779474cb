"""Traces and metrics by OpenTelemetry's GenAI conventions, made of outcomes and exported over OTLP/HTTP; on a thread.

Each request is two spans: the server's (HTTP) and, below it, the call of the engine (GenAI), whose id the engine got.
"""

from __future__ import annotations

import contextlib
import queue
import random
import sys
import threading
from collections.abc import Sequence
from typing import Any

from pierhead.gateway.outcome import Outcome
from pierhead.gateway.tally import EACH, FIRST, PROVIDER, SECONDS, TOKENS, error_type, genai_operation
from pierhead.gateway.telemetry.messages import Setup
from pierhead.gateway.trace import parse

_BACKLOG = 20_000  # outcomes that wait
_MOST = 512  # requests of one export
_PAUSE = 1.0
_SCOPE = "pierhead.gateway"


class Exporter:
    """``put`` outcomes, ``close`` it; without the libraries it says so once and drops all."""

    def __init__(self, setup: Setup) -> None:
        self._queue: queue.Queue[Outcome | None] = queue.Queue(_BACKLOG)
        self._thread = threading.Thread(target=self._run, args=(setup,), name="otlp", daemon=True)
        self._thread.start()

    def put(self, outcomes: list[Outcome]) -> int:
        """Queue them; how many found no room."""
        for done, outcome in enumerate(outcomes):
            try:
                self._queue.put_nowait(outcome)
            except queue.Full:
                return len(outcomes) - done
        return 0

    def close(self) -> None:
        """Export what is queued, for some seconds at most."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1)
            self._thread.join(4)

    def _run(self, setup: Setup) -> None:
        try:
            sink = _Sink(setup)
        except ImportError as exc:
            print(  # noqa: T201
                f"pierhead: no traces, OpenTelemetry is not installed ({exc}): pip install 'pierhead[otel]'",
                file=sys.stderr,
                flush=True,
            )
            while self._queue.get() is not None:
                pass
            return
        going = True
        while going:
            batch, going = self._next()
            sink.take(batch)
        sink.close()

    def _next(self) -> tuple[list[Outcome], bool]:
        """What came within a second, and whether more may come."""
        first = self._queue.get()
        batch: list[Outcome] = []
        item = first
        while item is not None:
            batch.append(item)
            if len(batch) >= _MOST:
                return batch, True
            try:
                item = self._queue.get(timeout=_PAUSE)
            except queue.Empty:
                return batch, True
        return batch, False


class _Sink:
    """The SDK's part; imported here, since it takes half a second."""

    def __init__(self, setup: Setup) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        base = setup.endpoint.rstrip("/")
        self._resource = Resource.create({"service.name": "pierhead", "service.version": setup.version})
        self._scope = InstrumentationScope(_SCOPE, setup.version)
        self._spans = OTLPSpanExporter(endpoint=f"{base}/v1/traces")
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=f"{base}/v1/metrics"))
        self._provider = MeterProvider(metric_readers=[reader], resource=self._resource, shutdown_on_exit=False)
        meter = self._provider.get_meter(_SCOPE, setup.version)

        def histogram(name: str, unit: str, text: str, bounds: Sequence[float]) -> Any:
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=list(bounds))

        self._duration = histogram("gen_ai.server.request.duration", "s", "From request to answer.", SECONDS)
        self._client = histogram("gen_ai.client.operation.duration", "s", "Of the call of the engine.", SECONDS)
        self._first = histogram("gen_ai.server.time_to_first_token", "s", "To the first token.", FIRST)
        self._each = histogram("gen_ai.server.time_per_output_token", "s", "For each later token.", EACH)
        self._tokens = histogram("gen_ai.client.token.usage", "{token}", "Tokens of one request.", TOKENS)

    def take(self, batch: list[Outcome]) -> None:
        spans = [span for outcome in batch for span in self._traced(outcome)]
        if spans:
            self._spans.export(spans)
        for outcome in batch:
            self._measure(outcome)

    def close(self) -> None:
        self._provider.shutdown(3000)
        self._spans.shutdown()

    # --- spans ----------------------------------------------------------------------------------------------------

    def _traced(self, outcome: Outcome) -> list[Any]:
        context = parse(outcome.trace)
        if context is None or not context.sampled or not outcome.span:
            return []
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        flags = TraceFlags(TraceFlags.SAMPLED)
        trace = int(context.trace, 16)
        parent = SpanContext(trace, int(context.span, 16), True, flags) if context.remote else None
        outer = SpanContext(trace, random.getrandbits(64) or 1, False, flags)  # an id, no secret
        inner = SpanContext(trace, int(outcome.span, 16), False, flags)
        end = int(outcome.time * 1e9)
        start = end - int(outcome.seconds * 1e9)
        failed = Status(StatusCode.ERROR, outcome.code) if not outcome.ok or outcome.status >= 500 else Status()
        server = ReadableSpan(
            name=f"{outcome.method} {outcome.path}", context=outer, parent=parent, resource=self._resource,
            attributes=http_attributes(outcome), kind=SpanKind.SERVER, instrumentation_scope=self._scope,
            status=failed, start_time=start, end_time=end,
        )  # fmt: skip
        call = ReadableSpan(
            name=f"{genai_operation(outcome.operation)} {outcome.asked}", context=inner, parent=outer,
            resource=self._resource, attributes=attributes(outcome), kind=SpanKind.CLIENT, end_time=end,
            instrumentation_scope=self._scope, status=failed, start_time=start + int(outcome.queued * 1e9),
        )  # fmt: skip
        return [server, call]

    # --- metrics --------------------------------------------------------------------------------------------------

    def _measure(self, outcome: Outcome) -> None:
        at: dict[str, Any] = {
            "gen_ai.operation.name": genai_operation(outcome.operation),
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": outcome.model,
            "gen_ai.response.model": outcome.model,
        }
        usage, failed = outcome.usage, error_type(outcome)
        if usage.known:
            self._tokens.record(usage.prompt, at | {"gen_ai.token.type": "input"})
            self._tokens.record(usage.completion, at | {"gen_ai.token.type": "output"})
        if outcome.ttft and not failed:
            self._first.record(outcome.ttft, at)
            if usage.completion > 1:
                self._each.record((outcome.seconds - outcome.ttft) / (usage.completion - 1), at)
        if failed:
            at["error.type"] = failed
        self._duration.record(outcome.seconds, at)
        self._client.record(max(outcome.seconds - outcome.queued, 0.0), at)


def http_attributes(outcome: Outcome) -> dict[str, Any]:
    """Of the server's span."""
    found: dict[str, Any] = {
        "http.request.method": outcome.method,
        "http.route": outcome.path,
        "url.path": outcome.path,
        "url.scheme": "http",
        "http.response.status_code": outcome.status,
        "client.address": outcome.peer,
        "pierhead.request.id": outcome.id,
        "pierhead.queue.duration": outcome.queued,
    }
    if outcome.key:
        found["pierhead.key.id"] = outcome.key
    if failed := error_type(outcome):
        found["error.type"] = failed
    return found


def attributes(outcome: Outcome) -> dict[str, Any]:
    """Of the GenAI span; no text of prompts or answers is among them."""
    usage = outcome.usage
    found: dict[str, Any] = {
        "gen_ai.operation.name": genai_operation(outcome.operation),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": outcome.asked,
        "gen_ai.response.model": outcome.fallback or outcome.model,
        "server.address": outcome.replica,
        "pierhead.operation": outcome.operation,
    }
    if outcome.n != 1:
        found["gen_ai.request.choice.count"] = outcome.n
    if outcome.finish:
        found["gen_ai.response.finish_reasons"] = (outcome.finish,)
    if usage.known:
        found["gen_ai.usage.input_tokens"] = usage.prompt
        found["gen_ai.usage.output_tokens"] = usage.completion
        if usage.cached:
            found["gen_ai.usage.cache_read.input_tokens"] = usage.cached
    if outcome.ttft:
        found["gen_ai.response.time_to_first_chunk"] = outcome.ttft
    for name in ("revision", "retries", "cost"):
        if value := getattr(outcome, name):
            found[f"pierhead.{name}"] = value
    if failed := error_type(outcome):
        found["error.type"] = failed
    return found
