"""On a real pseudo-terminal: tables that fit, progress that comes and goes, a chat that keeps its history."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pexpect
import pytest

from pierhead.paths import Paths

Pier = Callable[..., subprocess.CompletedProcess[str]]
Stocked = tuple[Pier, Paths, dict[str, str]]

pytestmark = [pytest.mark.model, pytest.mark.timeout(180)]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


def terminal(env: dict[str, str], *args: str, columns: int = 80, **more: str) -> pexpect.spawn[str]:
    """``pier`` on a terminal of its own."""
    kept = {k: v for k, v in env.items() if k not in ("COLUMNS", "NO_COLOR")}
    return pexpect.spawn(
        sys.executable,
        ["-m", "pierhead.cli.main", *args],
        env={**kept, "TERM": "xterm", **more},
        encoding="utf-8",
        timeout=60,
        dimensions=(40, columns),
    )


def whole(made: pexpect.spawn[str]) -> str:
    """Everything it prints; it must end well."""
    text = made.read()
    made.close()
    assert made.exitstatus == 0, text
    return text


@contextmanager
def chat(env: dict[str, str], *args: str, **more: str) -> Iterator[pexpect.spawn[str]]:
    """A chat at its first prompt, left with /exit."""
    made = terminal(env, "run", "smollm2", "--max-tokens", "4", "--seed", "1", *args, **{"TERM": "dumb", **more})
    try:
        made.expect(">>>")
        yield made
        made.sendline("/exit")
        made.expect(pexpect.EOF)
        made.close()
        assert made.exitstatus == 0
    finally:
        made.close(force=True)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(stocked: Stocked, columns: int) -> None:
    pier, _, env = stocked
    pier("run", "smollm2", "Hi", "--max-tokens", "2")
    for verb in ("ps", "list", "status", "inspect smollm2", "df", "stats --no-stream", "doctor"):
        lines = ESCAPES.sub("", whole(terminal(env, *verb.split(), columns=columns))).splitlines()
        long = [line for line in lines if len(line) > columns and " " in line.split("  ")[-1].strip()]
        assert not long, verb
        if verb in ("ps", "list", "stats --no-stream"):
            assert max(map(len, lines)) <= columns, verb
            assert "smollm2" in lines[1]


def test_keys_with_many_bounds_can_be_read_in_80_columns(stocked: Stocked) -> None:
    pier, _, env = stocked
    bounds = "--model smol* --model qwen3:0.6b --dialect openai --dialect anthropic --rpm 60"
    budgets = "--budget 1000000tokens/day --budget 5usd/month --tpm 100000 --concurrent 4"
    assert pier("key", "create", "continuous-integration", *bounds.split(), *budgets.split()).returncode == 0
    lines = ESCAPES.sub("", whole(terminal(env, "key", "list", columns=80))).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for word in (
        "continuous-integration",
        "qwen3:0.6b",
        "by anthropic",
        "4 at once",
        "1000000tokens/day",
        "5usd/month",
    ):
        assert word in text, "whole, not folded"
    assert "smol*, qwen3:0.6b, by openai, by anthropic" in pier("key", "list").stdout


def test_colours_are_for_terminals_that_want_them(stocked: Stocked) -> None:
    pier, _, env = stocked
    assert "\x1b[1m" in whole(terminal(env, "list"))
    assert not re.search(r"\x1b\[[0-9;]*m", whole(terminal(env, "list", NO_COLOR="1", TERM="dumb")))
    assert "\x1b" not in pier("list", NO_COLOR="").stdout


def test_stats_are_redrawn_until_ctrl_c(stocked: Stocked) -> None:
    stocked[0]("run", "smollm2", "Hi", "--max-tokens", "2")
    made = terminal(stocked[2], "stats", "--interval", "0.2")
    for _ in range(3):
        made.expect("smollm2")
    made.sendintr()
    made.expect(pexpect.EOF)
    made.close()
    assert made.exitstatus == 130
    assert "Traceback" not in (made.before or "")


def test_starting_is_shown_and_wiped_away(stocked: Stocked) -> None:
    pier, _, env = stocked
    pier("stop", "--all")
    text = whole(terminal(env, "run", "smollm2", "Say hello.", "--max-tokens", "4"))
    assert "Loading" in text
    assert text.rindex("\x1b[K") > text.rindex("Loading")


def test_a_pull_draws_a_bar(stocked: Stocked, smollm2: Path) -> None:
    pier, _, env = stocked
    text = whole(terminal(env, "pull", str(smollm2), "--name", "bar"))
    assert "Pulled bar, 98.4 MB." in text
    pier("rm", "bar")


def test_ctrl_c_in_a_pull_says_that_it_can_go_on(stocked: Stocked, smollm2: Path) -> None:
    body, going = smollm2.read_bytes(), threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:20_000_000])
            going.wait(60)

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made = terminal(stocked[2], "pull", f"http://127.0.0.1:{server.server_port}/slow.gguf", "--name", "slow")
        made.expect("slow.gguf")
        made.sendintr()
        made.expect(pexpect.EOF)
        made.close()
        going.set()
        server.shutdown()
    assert made.exitstatus == 130
    assert "The same command goes on" in " ".join((made.before or "").split())


def test_ctrl_c_ends_a_single_answer_with_its_status(stocked: Stocked) -> None:
    # Greedy, so that the answer is a long one in every run.
    prompt = ("Write a long story about a lighthouse.", "--temperature", "0", "--max-tokens", "900")
    made = terminal(stocked[2], "run", "smollm2", *prompt)
    made.expect(r"\w+ \w+ \w+")
    made.sendintr()
    made.expect(pexpect.EOF)
    made.close()
    assert made.exitstatus == 130
    assert "Traceback" not in (made.before or "")


def test_a_chat_remembers_what_was_typed_in_an_earlier_one(stocked: Stocked) -> None:
    paths, env = stocked[1], stocked[2]
    with chat(env) as talk:
        talk.sendline("Remember the lighthouse.")
        talk.expect(">>>")
    history = paths.state / "chat-history"
    assert "+Remember the lighthouse." in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with chat(env, TERM="xterm") as talk:
        talk.send("\x1b[A\x1b[A")  # up: /exit, up: the message
        talk.expect("Remember the lighthouse")
        talk.send("\x15")


def test_alt_enter_starts_a_new_line(stocked: Stocked, tmp_path: Path) -> None:
    with chat(stocked[2], TERM="xterm") as talk:
        talk.send("one\x1b\rtwo\r")
        talk.expect(">>>")
        talk.sendline(f"/save {tmp_path / 'talk.json'}")
        talk.expect("Saved")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][0] == {"role": "user", "content": "one\ntwo"}


def spoken(words: str) -> str:
    """A pattern for words between which a line may end: where it does depends on how long the folder's name is."""
    return r"\s+".join(map(re.escape, words.split()))


def test_a_saved_chat_is_gone_on_with(stocked: Stocked, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
    )
    (tmp_path / "bad.json").write_text('{"messages": [{"role": "root", "content": 1}]}')
    with chat(stocked[2], "--system", "Be brief.") as talk:
        for line, answer in (
            (f"/load {tmp_path / 'bad.json'}", "not a saved conversation"),
            (f"/load {file}", "2 messages"),
            ("/set temperature -1", "must be a number from 0 up"),
            ("/set colour red", "What can be set"),
            ("/image x.png", "cannot see pictures"),
            ("/file", "Name a file"),
            ("/file /does/not/exist", "cannot read"),
            ("/system Be kind.", "Set."),
            ("/show", "3 messages"),
            ("/clear", "Forgotten"),
            ("/show", "1 messages"),
        ):
            talk.sendline(line)
            talk.expect(spoken(answer))
            talk.expect(">>>")


def test_a_chat_goes_on_after_its_model_was_stopped(stocked: Stocked) -> None:
    with chat(stocked[2], "--context", "768") as talk:
        stocked[0]("stop", "smollm2")
        talk.sendline("Say hello.")
        talk.expect(r"\w+")
        talk.expect(">>>")
        (replica,) = json.loads(stocked[0]("ps", "--json").stdout)
        assert replica["context"] == 768


def test_a_chat_says_that_a_message_is_too_long_and_goes_on(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("harbour " * 4000)
    with chat(stocked[2], "--context", "512") as talk:
        talk.sendline(f"/file {tmp_path / 'long.txt'}")
        talk.expect(spoken("next message"))
        talk.sendline("What is it?")
        talk.expect(spoken("Shorten the prompt"))
        talk.expect(">>>")
