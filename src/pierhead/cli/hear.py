"""``pier run`` for models that hear: sound files become text."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pierhead.cli.chatapi import failure, refusal
from pierhead.cli.output import print_json, printable
from pierhead.errors import DaemonUnavailable, EngineFailed, UsageError
from pierhead.formats.python_model import FORMAT as PYTHON
from pierhead.paths import Paths
from pierhead.sockets import connect_unix
from pierhead.store.model import ModelRecord

_ENDINGS = (
    *(".aac", ".aif", ".aiff", ".flac", ".m4a", ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpeg", ".mpga"),
    *(".oga", ".ogg", ".opus", ".wav", ".weba", ".webm"),
)
MOST = 1 << 30  # bytes of a file; the gateway's and the engine's own bounds come first
_PATH = "/v1/audio/transcriptions"


def sounds(files: tuple[str, ...]) -> bool:
    """Whether they are to be heard, not read, by their names."""
    return any(Path(name).suffix.lower() in _ENDINGS for name in files)


def hears(record: ModelRecord) -> bool:
    """Whether its weights are of a model that hears."""
    return any(f.role == "weights" and f.format == "ggml" for f in record.files)


def no_sound(record: ModelRecord) -> UsageError:
    """What a model that hears says where it is given nothing to hear."""
    return UsageError(
        f"'{record.name}' turns sound into text: it needs a file",
        hint=f"Type `pier run {record.name} --file speech.wav`.",
    )


def check_sound(record: ModelRecord, files: tuple[str, ...]) -> None:
    """UsageError where a model that hears is given no file, or one that does not hear is given sound."""
    able = hears(record)
    if able and not files:
        raise no_sound(record)
    if sounds(files) and not able and not any(f.format == PYTHON for f in record.files):
        raise UsageError(f"'{record.name}' cannot hear", hint="Use a Whisper model (ggml-….bin).")
    for name in files if able or sounds(files) else ():
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"{name} is not a file", hint="Check the path.")
        if path.stat().st_size > MOST:
            raise UsageError(f"{name} is larger than {MOST >> 30} GiB", hint="Send a part of it, or compress it.")


def hear(paths: Paths, record: ModelRecord, files: tuple[str, ...], prompt: str, as_json: bool) -> None:
    """Print what is said in each file, as it is understood; ``prompt`` helps with names and spelling."""
    results: list[dict[str, Any]] = []
    for name in files:
        path = Path(name).expanduser()
        fields = {"model": record.name, "prompt": prompt}
        if as_json:
            with _Answer(paths, path, fields | {"response_format": "verbose_json"}) as answer:
                results.append({"file": path.name, **answer.whole()})
        else:
            with _Answer(paths, path, fields | {"stream": "true"}) as answer:
                for piece in answer.pieces():
                    click.echo(printable(piece), nl=False)
            click.echo()
    if as_json:
        print_json({"model": record.name, "results": results})


class _Answer:
    """One answer on its way; leaving hangs up, which stops the engine."""

    def __init__(self, paths: Paths, path: Path, fields: dict[str, str]) -> None:
        self._log = paths.daemon_log
        self._connection = http.client.HTTPConnection("localhost")
        boundary = uuid.uuid4().hex
        try:
            self._connection.sock = connect_unix(paths.gateway_socket)
            kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
            self._connection.request("POST", _PATH, form(path.read_bytes(), path.name, fields, boundary), kind)
            self._response = self._connection.getresponse()
            if self._response.status != 200:
                raise refusal(self._response)
        except (OSError, http.client.HTTPException) as exc:
            self._connection.close()
            raise DaemonUnavailable("the gateway does not answer", hint=f"See {self._log}.") from exc
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def whole(self) -> dict[str, Any]:
        """A JSON object."""
        try:
            return json.loads(self._response.read())
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise _broken() from exc

    def pieces(self) -> Iterator[str]:
        """Text as it comes; of an engine that does not stream, all at once."""
        if (self._response.getheader("Content-Type") or "").startswith("application/json"):
            yield str(self.whole().get("text", ""))
            return
        try:
            while line := self._response.readline(4 << 20):
                event: dict[str, Any] = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if "error" in event:
                    raise failure(event["error"], 502)
                if event.get("type") == "transcript.text.delta":
                    yield str(event.get("delta", ""))
                elif event.get("type") == "transcript.text.done":
                    return
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise _broken() from exc
        raise _broken()


def _broken() -> EngineFailed:
    return EngineFailed("the answer broke off", hint="`pier logs MODEL` shows what the engine said; ask again.")


def form(sound: bytes, name: str, fields: dict[str, str], boundary: str) -> bytes:
    """As OpenAI's clients send it; fields that are empty are left out."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="'
    parts = [f'{head}{field}"\r\n\r\n{value}\r\n'.encode() for field, value in fields.items() if value]
    plain = "".join(c for c in name if c.isprintable() and c not in '"\\')
    parts.append(f'{head}file"; filename="{plain}"\r\nContent-Type: application/octet-stream\r\n\r\n'.encode())
    return b"".join((*parts, sound, f"\r\n--{boundary}--\r\n".encode()))
