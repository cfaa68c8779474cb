"""The interactive chat: history, multi-line input, commands; Ctrl-C stops the answer and not the program."""

from __future__ import annotations

import os
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from pierhead.cli.answer import Answer, receive, show_timings
from pierhead.cli.chatapi import Stream
from pierhead.cli.conversation import COMMANDS, Conversation
from pierhead.cli.output import say
from pierhead.cli.request import Request
from pierhead.cli.run import start
from pierhead.errors import PierError
from pierhead.paths import Paths
from pierhead.store.model import ModelRecord

QUOTES = '"""'


def chat(paths: Paths, record: ModelRecord, request: Request) -> None:
    """Talk until /exit or Ctrl-D."""
    session = _session(paths)
    talk = Conversation(record, request)
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
            ask(paths, talk, text)


def ask(paths: Paths, talk: Conversation, text: str) -> None:
    """Send one message and print the answer; what was stopped stays in the conversation as far as it came."""
    request, answer = talk.request, Answer()
    messages = talk.with_message(text)
    try:
        start(paths, talk.model, request)  # it may have been unloaded meanwhile, and the daemon may have left
        stream = Stream(paths, request.body(talk.model, messages))
        receive(stream, answer, show_thinking=request.given["think"] is not False)
        if request.given["verbose"]:
            show_timings(answer.timings)
    except KeyboardInterrupt:
        click.echo("[stopped]", err=True)
    except PierError as exc:
        say(f"{exc.message}. {exc.hint or ''}".strip())
        if not answer.text:
            return
    talk.said(messages, answer.text)


def read(session: PromptSession[str]) -> str:
    """One message: a line, or all lines between two triple quotes."""
    text = session.prompt(">>> ")
    if not text.lstrip().startswith(QUOTES):
        return text.strip()
    text = text.lstrip().removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + session.prompt("... ")
    return text.rstrip().removesuffix(QUOTES).strip()


def _session(paths: Paths) -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:  # pyright: ignore[reportUnusedFunction]
        event.current_buffer.insert_text("\n")

    names = [f"/{name}" for name in COMMANDS]
    return PromptSession(
        history=FileHistory(str(_history(paths))),
        key_bindings=keys,
        completer=WordCompleter(names, sentence=True),
        complete_while_typing=False,
        prompt_continuation="... ",
    )


def _history(paths: Paths) -> Path:
    """The file of what was typed, for its owner only."""
    paths.state.mkdir(parents=True, exist_ok=True)
    file = paths.state / "chat-history"
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return file
