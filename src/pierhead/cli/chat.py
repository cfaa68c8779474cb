"""The interactive chat: history, multi-line input, commands; Ctrl-C stops the answer and not the program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from pierhead.cli.chatapi import Stream
from pierhead.cli.output import say
from pierhead.cli.run import Request, read_text, relay, show_timings
from pierhead.errors import PierError
from pierhead.paths import Paths
from pierhead.store.model import ModelRecord

HELP = """\
/help            this page
/clear           forget the conversation
/system TEXT     set the system prompt (empty: remove it)
/set NAME VALUE  temperature, top_p, max_tokens or seed
/show            the model, the settings, the length of the conversation
/file PATH       put a text file into the next message
/save PATH       write the conversation to a JSON file
/load PATH       go on with a saved conversation
/exit            leave (also Ctrl-D)

Enter sends; Alt-Enter, or a line that begins with three quotes (\"\"\"), makes a message of several lines.
Ctrl-C stops an answer."""

NUMBERS: dict[str, Callable[[str], float]] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


class Conversation:
    """The messages so far and what the next one carries."""

    def __init__(self, model: str, request: Request) -> None:
        self.model = model
        self.request = request
        self.messages = request.system()
        self.pending: list[str] = []
        self.over = False

    def command(self, line: str) -> None:
        """Do one ``/command``."""
        name, _, rest = line[1:].strip().partition(" ")
        action = getattr(self, f"do_{name}", None) if name.isalpha() else None
        if action is None:
            say(f"There is no /{name}. Type /help.")
            return
        try:
            action(rest.strip())
        except PierError as exc:
            say(f"{exc.message}. {exc.hint or ''}".strip())

    def do_help(self, _: str) -> None:
        click.echo(HELP)

    def do_exit(self, _: str) -> None:
        self.over = True

    do_quit = do_bye = do_exit

    def do_clear(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]
        say("Forgotten.")

    def do_system(self, text: str) -> None:
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        say("Set." if text else "Removed.")

    def do_set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name not in NUMBERS:
            say(f"What can be set: {', '.join(NUMBERS)}.")
            return
        try:
            self.request.given[name] = NUMBERS[name](value)
        except ValueError:
            say(f"'{value}' is not a number.")

    def do_show(self, _: str) -> None:
        say(f"model {self.model}, {len(self.messages)} messages")
        for name in NUMBERS:
            if self.request.given.get(name) is not None:
                say(f"{name} {self.request.given[name]}")

    def do_file(self, path: str) -> None:
        name, body = read_text(path)
        self.pending.append(f"{name}:\n```\n{body}\n```")
        say(f"{name} goes with your next message.")

    def do_save(self, path: str) -> None:
        try:
            Path(path).write_text(json.dumps({"model": self.model, "messages": self.messages}, indent=2), "utf-8")
            say(f"Saved to {path}.")
        except OSError as exc:
            say(f"Cannot write {path or 'nothing'}: {exc.strerror}.")

    def do_load(self, path: str) -> None:
        try:
            found: Any = json.loads(read_text(path)[1])["messages"]
            self.messages = [{"role": str(m["role"]), "content": m["content"]} for m in found]
            say(f"{len(self.messages)} messages.")
        except (ValueError, KeyError, TypeError):
            say(f"{path} is not a saved conversation.")

    def ask(self, paths: Paths, text: str) -> None:
        """Send one message and print the answer; an answer that was stopped stays in the history as far as it came."""
        content = self.request.content("\n\n".join([*self.pending, text]))
        messages = [*self.messages, {"role": "user", "content": content}]
        stream: Stream | None = None
        said: list[str] = []
        try:
            stream = Stream(paths, self.request.body(self.model, messages))
            timings, _ = relay(stream, show_thinking=self.request.given["think"] is not False, said=said)
            if self.request.given["verbose"]:
                show_timings(timings)
        except KeyboardInterrupt:
            click.echo("\n[stopped]")
        except PierError as exc:
            say(f"{exc.message}. {exc.hint or ''}".strip())
            return
        finally:
            if stream is not None:
                stream.close()
        self.pending.clear()
        self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]


def chat(paths: Paths, record: ModelRecord, request: Request) -> None:
    """Talk until /exit or Ctrl-D."""
    paths.state.mkdir(parents=True, exist_ok=True)
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:  # pyright: ignore[reportUnusedFunction]
        event.current_buffer.insert_text("\n")

    names = sorted("/" + n.removeprefix("do_") for n in dir(Conversation) if n.startswith("do_"))
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(paths.state / "chat-history")),
        key_bindings=keys,
        completer=WordCompleter(names, sentence=True),
        complete_while_typing=False,
    )
    talk = Conversation(record.name, request)
    say(f"Chat with {record.name}. /help lists commands, Ctrl-D leaves.")
    while not talk.over:
        try:
            text = read(session)
        except KeyboardInterrupt:
            continue
        except EOFError:
            break
        if text.startswith("/"):
            talk.command(text)
        elif text.strip():
            talk.ask(paths, text)


def read(session: PromptSession[str]) -> str:
    """One message: a line, or all lines between two triple quotes."""
    text = session.prompt(">>> ")
    if not text.lstrip().startswith('"""'):
        return text.strip()
    text = text.lstrip()[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + session.prompt("... ")
    return text.rstrip()[:-3].strip()
