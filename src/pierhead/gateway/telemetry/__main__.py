"""``python -m pierhead.gateway.telemetry``: reads what the gateway sends on its standard input, until that ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import sys

from pierhead.gateway.stderr import LogOfStderr
from pierhead.gateway.telemetry.logfile import LogFile, line, local_line
from pierhead.gateway.telemetry.messages import Batch, Exchange, Frames, Setup
from pierhead.gateway.telemetry.recording import record
from pierhead.gateway.telemetry.records import Record, Records
from pierhead.gateway.telemetry.redact import Redactor
from pierhead.gateway.telemetry.spans import Exporter

_COUNT = struct.Struct("<I")


class Telemetry:
    """What one gateway asked for."""

    def __init__(self, setup: Setup) -> None:
        settings = setup.settings
        self._log = LogFile(settings.access_log, settings.access_log_bytes) if settings.access_log else None
        self._exporter = Exporter(setup) if setup.endpoint else None
        self._records: Records | None = None
        if setup.records:
            from pathlib import Path

            self._records = Records(Path(setup.records), settings.record_keep_bytes)
        self._redactor = Redactor(settings.record_redact)
        self._stderr = LogOfStderr()
        self._stale = False

    def reopen(self, *_: object) -> None:
        """SIGHUP: log files are opened anew before the next line."""
        self._stale = True

    def take(self, batch: Batch) -> int:
        """Write, export and keep; how many things were lost."""
        lost = 0
        if self._stale:
            self._stale = False
            self._stderr.reopen()
            if self._log is not None:
                self._log.close()
        if self._log is not None:
            lines = [local_line(facts) for facts in batch.local] + [line(outcome) for outcome in batch.outcomes]
            if lines:
                lost += self._log.write(lines)
        if self._exporter is not None:
            lost += self._exporter.put(batch.outcomes)
        if self._records is not None and batch.exchanges:
            lost += self._keep(self._records, batch.exchanges)
        return lost

    def _keep(self, records: Records, exchanges: list[Exchange]) -> int:
        from pierhead.errors import PierError

        made: list[Record] = [record(exchange, self._redactor) for exchange in exchanges]
        try:
            records.add(made)
        except (OSError, PierError) as exc:
            print(f"pierhead: requests are not recorded: {exc}", file=sys.stderr)  # noqa: T201
            return len(made)
        return 0

    def close(self) -> None:
        """Export what is left."""
        if self._exporter is not None:
            self._exporter.close()


def main() -> int:
    """Run until the gateway is gone; signals are for the gateway, which passes SIGHUP on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    frames, telemetry = Frames(), None
    with socket.socket(fileno=0) as gateway:
        while data := _read(gateway):
            for message in frames.feed(data):
                if isinstance(message, Setup):
                    telemetry = Telemetry(message)
                    signal.signal(signal.SIGHUP, telemetry.reopen)
                elif telemetry is not None and (lost := telemetry.take(message)):
                    with contextlib.suppress(OSError):
                        gateway.sendall(_COUNT.pack(lost))
    if telemetry is not None:
        telemetry.close()
    return 0


def _read(gateway: socket.socket) -> bytes:
    try:
        return gateway.recv(1 << 20)
    except ConnectionResetError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
