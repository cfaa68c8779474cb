"""A conversation and its ``/commands``; neither terminal nor network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click

from pierhead.cli.output import say, wrapped
from pierhead.cli.request import Request, picture, quote, read_text
from pierhead.cli.run import check_sight
from pierhead.errors import PierError
from pierhead.store.model import ModelRecord

COMMANDS = {
    "help": ("", "this page"),
    "clear": ("", "forget the conversation"),
    "system": ("TEXT", "set the system prompt (without text: remove it)"),
    "set": ("NAME VALUE", "set temperature, top_p, max_tokens, seed, think or verbose"),
    "show": ("", "the model, the settings, the length of the conversation"),
    "file": ("PATH", "put a text file into the next message"),
    "image": ("PATH", "show a picture with the next message"),
    "save": ("PATH", "write the conversation to a JSON file"),
    "load": ("PATH", "go on with a saved conversation"),
    "exit": ("", "leave (also /quit, /bye and Ctrl-D)"),
}
_KEYS = """\
Enter sends. Alt-Enter starts a new line; so does a message that begins with three quotes (\"\"\"), until three more.
Up and Down fetch earlier messages, also of earlier chats. Ctrl-C stops an answer."""
_ROLES = ("system", "user", "assistant")


def _number(least: float, most: float = float("inf"), kind: type = float) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise ValueError(text)
        return value

    return convert


def _switch(text: str) -> bool:
    return {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}[text.lower()]


_SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (_number(0), "a number from 0 up"),
    "top_p": (_number(0, 1), "a number from 0 to 1"),
    "max_tokens": (_number(1, kind=int), "a whole number from 1 up"),
    "seed": (_number(-(2**63), kind=int), "a whole number"),
    "think": (_switch, "on or off"),
    "verbose": (_switch, "on or off"),
}


class Conversation:
    """The messages so far and what the next one carries."""

    def __init__(self, record: ModelRecord, request: Request) -> None:
        self.record = record
        self.model = record.name
        self.request = request
        self.messages = request.system()
        self.files: list[str] = []
        self.images: list[str] = []
        self.over = False

    def with_message(self, text: str) -> list[dict[str, Any]]:
        """The messages with the user's next one."""
        return [*self.messages, {"role": "user", "content": self.request.content(text, self.files, self.images)}]

    def said(self, messages: list[dict[str, Any]], answer: str) -> None:
        """Keep what was asked and what was answered."""
        self.files.clear()
        self.images.clear()
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> None:
        """Do one ``/command``; what is wrong with it is said."""
        name, _, rest = line[1:].strip().partition(" ")
        name = {"quit": "exit", "bye": "exit", "?": "help"}.get(name, name)
        if name not in COMMANDS:
            say(f"There is no /{name}. /help lists commands.")
            return
        wanted = COMMANDS[name][0]
        if wanted == "PATH" and not rest.strip():
            say(f"Name a file: /{name} {wanted}")
            return
        try:
            getattr(self, f"_{name}")(rest.strip())
        except PierError as exc:
            say(f"{exc.message}. {exc.hint or ''}".strip())

    def _help(self, _: str) -> None:
        for name, (argument, meaning) in COMMANDS.items():
            click.echo(wrapped(f"/{name} {argument}".ljust(18) + meaning, sys.stdout, 18))
        click.echo(wrapped(f"\n{_KEYS}", sys.stdout))

    def _exit(self, _: str) -> None:
        self.over = True

    def _clear(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self.files.clear()
        self.images.clear()
        say("Forgotten.")

    def _system(self, text: str) -> None:
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        say("Set." if text else "Removed.")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name not in _SETTINGS:
            say(f"What can be set: {', '.join(_SETTINGS)}.")
            return
        convert, wanted = _SETTINGS[name]
        try:
            self.request.given[name] = convert(value.strip())
        except (ValueError, KeyError):
            say(f"{name} must be {wanted}.")
            return
        say(f"{name} is {_shown(self.request.given[name])}.")

    def _show(self, _: str) -> None:
        say(f"model {self.model}, {len(self.messages)} messages")
        for name in _SETTINGS:
            if self.request.given.get(name) is not None:
                say(f"{name} {_shown(self.request.given[name])}")

    def _file(self, path: str) -> None:
        self.files.append(quote(path))
        say(f"{Path(path).name} goes with your next message.")

    def _image(self, path: str) -> None:
        check_sight(self.record)
        self.images.append(picture(path))
        say(f"{Path(path).name} goes with your next message.")

    def _save(self, path: str) -> None:
        text = json.dumps({"model": self.model, "messages": self.messages}, indent=2, ensure_ascii=False)
        try:
            Path(path).expanduser().write_text(text + "\n", "utf-8")
        except OSError as exc:
            say(f"Cannot write {path}: {exc.strerror}.")
            return
        say(f"Saved to {path}.")

    def _load(self, path: str) -> None:
        messages = _saved(read_text(path)[1])
        if messages is None:
            say(f"{path} is not a saved conversation.")
            return
        self.messages = messages
        say(f"{len(self.messages)} messages.")


def _shown(value: Any) -> str:
    """A setting as it is typed."""
    return str(value) if not isinstance(value, bool) else "on" if value else "off"


def _saved(text: str) -> list[dict[str, Any]] | None:
    try:
        found: Any = json.loads(text)
        entries = [cast("dict[str, Any]", m) for m in found["messages"]]
        made = [{"role": str(m["role"]), "content": m["content"]} for m in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    fit = all(m["role"] in _ROLES and isinstance(m["content"], (str, list)) for m in made)
    return made if fit else None
