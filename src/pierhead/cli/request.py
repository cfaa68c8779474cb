"""What the user asks of a model: flags, files, pictures and pipes become one chat request; nothing is sent here."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import stat
import sys
from pathlib import Path
from typing import Any

from pierhead.errors import UsageError

MAX_FILE = 8 << 20
_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")
_FLAGS = {
    **{"system": "--system", "files": "--file", "images": "--image", "temperature": "--temperature"},
    **{"top_p": "--top-p", "max_tokens": "--max-tokens", "seed": "--seed", "think": "--think", "shape": "--format"},
    "output": "--output",
}


class Request:
    """What the user asked of each answer, and of the engine; ``given`` are the flags of ``pier run``."""

    def __init__(self, model: str, given: dict[str, Any]) -> None:
        self.model = model
        self.given = given
        self.format = response_format(given["shape"])
        self.engine = engine_settings(given["options"], given["context"])
        if given.get("engine"):
            self.engine["engine"] = given["engine"]
        if given.get("draft"):
            self.engine["draft"] = given["draft"]
        self.keep_alive = seconds(given["keep_alive"]) if given["keep_alive"] else None

    def only(self, model: str, does: str, *kept: str) -> None:
        """UsageError where a flag was given that means nothing to a model that does this."""
        vain = [flag for name, flag in _FLAGS.items() if name not in kept and self.given[name] not in (None, ())]
        if vain:
            them = "it" if len(vain) == 1 else "them"
            raise UsageError(f"'{model}' {does}: {', '.join(vain)} would change nothing", hint=f"Leave {them} out.")

    def system(self) -> list[dict[str, Any]]:
        """The first messages of a conversation."""
        text = self.given["system"]
        return [{"role": "system", "content": text}] if text else []

    def content(self, text: str, files: list[str] | None = None, images: list[str] | None = None) -> Any:
        """The user's message: text with files (``read_text`` wrapped by ``quote``), and pictures (data URLs)."""
        whole = "\n\n".join(part for part in (*(files or ()), text) if part)
        if not images:
            return whole
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        return [*pictures, {"type": "text", "text": whole}]

    def first(self, text: str) -> Any:
        """The message that the flags make: PROMPT with --file and --image."""
        return self.content(text, [quote(p) for p in self.given["files"]], [picture(p) for p in self.given["images"]])

    def body(self, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The request for the gateway."""
        given = self.given
        body: dict[str, Any] = {"model": model, "messages": messages, "stream_options": {"include_usage": True}}
        body |= {k: given[k] for k in _SAMPLING if given[k] is not None}
        if self.format:
            body["response_format"] = self.format
        if given["think"] is not None:
            body["chat_template_kwargs"] = {"enable_thinking": given["think"]}
        return body


def engine_settings(options: tuple[str, ...], context: int | None) -> dict[str, Any]:
    """Engine settings by name, from ``NAME=VALUE`` words."""
    found: dict[str, Any] = {}
    for word in options:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f"'{word}' is not NAME=VALUE", hint="For example: --option threads=4")
        found[name] = value
    if context is not None:
        found["context"] = context
    return found


def piped() -> str:
    """The text that comes through a pipe or a redirected file; empty on a terminal."""
    try:
        fd = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or not a real stream
        return ""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return ""
    data = sys.stdin.buffer.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise UsageError(f"what comes through the pipe is larger than {MAX_FILE >> 20} MiB", hint="Send a part of it.")
    return _decoded(data, "what comes through the pipe").strip()


def seconds(text: str) -> float:
    """``90s``, ``5m``, ``1h``, ``300`` or ``-1`` (for ever) in seconds."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:], 0.0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e9:
        raise UsageError(f"'{text}' is not a time", hint="Write 90s, 5m, 1h or -1 (for ever).")
    return value


def quote(path: str) -> str:
    """A text file as a part of a prompt; the fence is longer than any inside."""
    name, body = read_text(path)
    fence = "```"
    while fence in body:
        fence += "`"
    return f"{name}:\n{fence}\n{body}\n{fence}"


def read_text(path: str) -> tuple[str, str]:
    """A file's name and text; UsageError when it is not text or too large."""
    file = Path(path).expanduser()
    return file.name, _decoded(_read(file, "Use a smaller part of it."), path)


def picture(path: str) -> str:
    """A picture as a data URL."""
    kind = mimetypes.guess_type(path)[0] or ""
    if not kind.startswith("image/"):
        raise UsageError(f"{path} is not a picture", hint="Use a .png, .jpg, .webp or .gif file.")
    data = _read(Path(path).expanduser(), "Make it smaller first.")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read(file: Path, smaller: str) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE + 1)
    except OSError as exc:
        raise UsageError(f"cannot read {file}: {exc.strerror}", hint="Check the path.") from exc
    if len(data) > MAX_FILE:
        raise UsageError(f"{file} is larger than {MAX_FILE >> 20} MiB", hint=smaller)
    return data


def _decoded(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{what} is not text", hint="Pictures go with --image.") from exc
    if "\0" in text:
        raise UsageError(f"{what} is not text", hint="Pictures go with --image.")
    return text


def response_format(shape: str | None) -> dict[str, Any] | None:
    """What ``--format`` means: ``json``, a JSON schema, or the file that holds one."""
    if not shape:
        return None
    if shape == "json":
        return {"type": "json_object"}
    text = shape if shape.lstrip().startswith("{") else read_text(shape)[1]
    hint = "Give 'json', a schema, or its file."
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"--format is not a JSON schema: {exc}", hint=hint) from exc
    if not isinstance(schema, dict):
        raise UsageError("--format is not a JSON schema: it must be an object", hint=hint)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
