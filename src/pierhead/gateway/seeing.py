"""Joins what sees requests to the services, as the settings say: journal, counters, logs, traces, recordings."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pierhead
from pierhead.config import GatewaySettings
from pierhead.errors import ConfigError
from pierhead.gateway.journal import Journal
from pierhead.gateway.observer import Observer
from pierhead.gateway.recorder import Recorder
from pierhead.gateway.services import Services
from pierhead.gateway.tally import Tally
from pierhead.gateway.telemetry.messages import Setup
from pierhead.gateway.trace import Tracer


class Seeing:
    """Made with the services, ``open`` when the loop runs, ``close`` at the end; ConfigError for unusable settings."""

    def __init__(self, services: Services, state: str) -> None:
        settings, metrics = services.settings, services.metrics
        self._journal: Journal | None = None
        if state:
            self._journal = journal = Journal(Path(state) / "usage")
            services.sinks.append(journal.put)
            metrics.lost = lambda: journal.lost
        metrics.tally = tally = Tally()
        services.sinks.append(tally.put)
        self._observer = observer = _observer(settings, state)
        if observer is None:
            return
        services.observer = observer
        services.sinks.append(observer.put)
        metrics.dropped = lambda: observer.dropped
        if observer.setup.endpoint:
            services.tracer = Tracer(settings.otel_sample)
            services.doorkeeper.tracing = True
        if observer.setup.records:
            services.recorder = Recorder(settings, observer.put_exchange)

    async def open(self) -> None:
        """Start what runs beside the gateway."""
        if self._observer is not None:
            await self._observer.open()

    def reopen(self) -> None:
        """Somebody has moved log files away."""
        if self._observer is not None:
            self._observer.reopen()

    async def close(self) -> None:
        """Write what is left."""
        if self._journal is not None:
            self._journal.close()
        if self._observer is not None:
            await self._observer.close()


def _observer(settings: GatewaySettings, state: str) -> Observer | None:
    """What logs, traces and records; None when nothing of it is wanted."""
    endpoint = _endpoint(settings)
    for pattern in settings.record_redact:
        try:
            re.compile(pattern)
        except re.error as exc:
            raise ConfigError(f"gateway.record_redact: '{pattern}' is no regular expression: {exc}") from exc
    records = str(Path(state) / "records") if settings.record != "off" and state else ""
    if not (settings.access_log or endpoint or records):
        return None
    return Observer(Setup(settings=settings, version=pierhead.__version__, endpoint=endpoint, records=records))


def _endpoint(settings: GatewaySettings) -> str:
    """Where traces go: as the settings say, else the environment variable of the field, where the libraries are."""
    installed = importlib.util.find_spec("opentelemetry") and importlib.util.find_spec("opentelemetry.exporter")
    if settings.otel_endpoint and not installed:
        raise ConfigError(
            "gateway.otel_endpoint is set, but OpenTelemetry is not installed",
            hint="Install it with: pip install 'pierhead[otel]'",
        )
    found = settings.otel_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    return found if installed else ""
