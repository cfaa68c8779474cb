"""Every verb does its work on the real model; data goes to stdout, talk to stderr, --json to programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from pierhead.cli.main import VERBS
from pierhead.paths import Paths

Pier = Callable[..., subprocess.CompletedProcess[str]]
Stocked = tuple[Pier, Paths, dict[str, str]]

pytestmark = [pytest.mark.model, pytest.mark.timeout(180)]


def test_one_answer_goes_to_stdout_and_the_talk_does_not(stocked: Stocked) -> None:
    pier = stocked[0]
    done = pier("run", "smollm2", "Say hello.", "--max-tokens", "12", "--seed", "1", "--verbose")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "tokens/s" in done.stderr
    assert "tokens/s" not in done.stdout
    again = pier("run", "smollm2", "Say hello.", "--max-tokens", "12", "--seed", "1")
    assert again.stdout == done.stdout
    assert again.stderr == ""


def test_a_prompt_comes_from_a_pipe(stocked: Stocked) -> None:
    done = stocked[0]("run", "smollm2", "--max-tokens", "8", stdin="Say hello.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_answer_keeps_to_a_json_schema(stocked: Stocked) -> None:
    schema = '{"type":"object","properties":{"ship":{"type":"string","maxLength":12}},"required":["ship"]}'
    done = stocked[0]("run", "smollm2", "Invent a ship.", "--format", schema, "--max-tokens", "60")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"ship"}


def test_a_file_becomes_part_of_the_prompt(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("The harbour opens at nine.")
    done = stocked[0]("run", "smollm2", "When?", "--file", str(tmp_path / "note.txt"), "--max-tokens", "8")
    assert done.returncode == 0, done.stderr


def test_ps_logs_stats_and_stop_tell_of_what_runs(stocked: Stocked) -> None:
    pier = stocked[0]
    pier("run", "smollm2", "Hi", "--max-tokens", "2")
    (replica,) = json.loads(pier("ps", "--json").stdout)
    assert (replica["model"], replica["state"], replica["context"]) == ("smollm2", "ready", 1024)
    assert "smollm2" in pier("ps").stdout
    assert len(pier("logs", "smollm2", "--tail", "3").stdout.splitlines()) == 3
    (reading,) = [json.loads(x) for x in pier("stats", "--no-stream", "--json").stdout.splitlines()]
    assert reading["replicas"][0]["memory"] > 50 << 20
    assert json.loads(pier("stop", "smollm2", "--json").stdout) == {
        "stopped": [replica["id"]],
        "kept": {"smollm2": 0},
    }
    assert json.loads(pier("ps", "--json").stdout) == []


def test_an_unknown_engine_option_shows_the_closest_one(stocked: Stocked) -> None:
    done = stocked[0]("run", "smollm2", "Hi", "--option", "contxt=9")
    assert done.returncode == 2
    assert "Did you mean 'context'?" in done.stderr


def test_contexts_that_cannot_fit_are_refused_with_the_numbers(stocked: Stocked) -> None:
    done = stocked[0]("run", "smollm2", "Hi", "--context", "8192", "--option", "parallel=2000")
    assert done.returncode == 9, done.stderr
    assert "MiB" in done.stderr
    assert "--context" in done.stderr


def test_a_picture_for_a_model_without_eyes_is_refused(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    done = stocked[0]("run", "smollm2", "What is it?", "--image", str(tmp_path / "a.png"))
    assert done.returncode == 2
    assert "cannot see pictures" in done.stderr


def test_list_inspect_tag_df_and_rm_keep_the_books(stocked: Stocked) -> None:
    pier = stocked[0]
    assert pier("tag", "smollm2", "mine").returncode == 0
    names = {n for m in json.loads(pier("list", "--json").stdout) for n in m["names"]}
    assert names == {"smollm2", "mine"}
    found = json.loads(pier("inspect", "mine", "--context", "2048", "--json").stdout)
    assert found["metadata"]["architecture"] == "llama"
    assert found["estimate"]["context"] == 2048
    assert found["estimate"]["total"] > found["estimate"]["weights"] > 90_000_000
    shown = pier("inspect", "mine").stdout
    assert "134.5M" in shown
    parts = [float(n) for n in re.findall(r"(?:weights|KV cache|compute|program) ([\d.]+) MB", shown)]
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(float(re.search(r"Memory +([\d.]+) MB", shown)[1]), abs=0.3)  # type: ignore[index]
    assert pier("list", "--quiet").stdout.split() == ["mine", "smollm2"]
    assert "98.4 MB" in pier("list").stdout
    (removed,) = json.loads(pier("rm", "mine", "--json").stdout)
    assert removed["kept"] == 98362432
    usage = json.loads(pier("df", "--json").stdout)
    assert 98_000_000 < usage["total"] < 99_000_000


def test_of_several_models_none_is_removed_when_one_is_not_there(stocked: Stocked) -> None:
    pier = stocked[0]
    pier("tag", "smollm2", "mine")
    done = pier("rm", "mine", "ghost")
    assert done.returncode == 3
    assert pier("rm", "mine").returncode == 0


def test_what_runs_is_empty_without_a_daemon(bare: Pier) -> None:
    for verb in ("ps", "stats"):
        done = bare(verb, "--json") if verb == "ps" else bare(verb, "--no-stream", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) in ([], {"replicas": []})
        assert "Nothing runs" in bare(verb).stderr


def test_json_that_was_cut_is_said(stocked: Stocked) -> None:
    done = stocked[0]("run", "smollm2", "Describe a ship.", "--format", "json", "--max-tokens", "3")
    assert done.returncode == 0
    assert "not whole JSON" in done.stderr


def test_a_model_that_runs_is_not_removed(stocked: Stocked) -> None:
    pier = stocked[0]
    pier("run", "smollm2", "Hi", "--max-tokens", "2")
    done = pier("rm", "smollm2")
    assert done.returncode == 4
    assert "pier stop" in done.stderr


def test_keys_are_shown_once_listed_and_revoked(stocked: Stocked) -> None:
    pier, paths, _ = stocked
    made = json.loads(pier("key", "create", "laptop", "--json").stdout)
    assert made["key"].startswith("pier_")
    listed = pier("key", "list", "--json").stdout
    assert made["id"] in listed
    assert made["key"] not in listed
    assert made["key"].encode() not in b"".join(p.read_bytes() for p in paths.state.glob("pierhead.db*"))
    bounds = ("--model", "smol*", "--budget", "5usd/month", "--rpm", "60", "--expires", "30d", "--admin")
    changed = json.loads(pier("key", "edit", "laptop", *bounds, "--json").stdout)
    assert (changed["models"], changed["budgets"], changed["rpm"]) == (["smol*"], ["5usd/month"], 60)
    shown = pier("key", "show", "laptop").stdout
    assert re.search(r"smol\*\n\s+admin\n", shown)
    assert re.search(r"Budgets +5usd/month: \$0 spent, \$5 left, renews in \d+ (d|h|min)\n", shown)
    assert json.loads(pier("key", "show", "laptop", "--json").stdout)["spent"][0]["left"] == 5
    assert "in 30 d" in shown
    turned = json.loads(pier("key", "rotate", "laptop", "--grace", "1d", "--json").stdout)
    assert (turned["id"], turned["key"] != made["key"]) == (made["id"], True)
    assert pier("key", "edit", "laptop", "--budget", "lots").returncode == 2
    assert pier("key", "revoke", made["id"]).returncode == 0
    assert "pier key create" in pier("key", "list").stderr
    assert json.loads(pier("key", "list", "--json").stdout) == []


def test_status_and_version_name_the_daemon(stocked: Stocked) -> None:
    pier = stocked[0]
    pier("run", "smollm2", "Hi", "--max-tokens", "2")
    status = json.loads(pier("status", "--json").stdout)
    assert status["running"]
    assert status["origins"]["engine.context"] == "environment PIERHEAD_ENGINE__CONTEXT"
    assert json.loads(pier("version", "--json").stdout)["daemon"] == status["version"]


def chat(env: dict[str, str]) -> pexpect.spawn[str]:
    made = pexpect.spawn(
        sys.executable,
        ["-m", "pierhead.cli.main", "run", "smollm2", "--max-tokens", "900", "--temperature", "0"],
        env={**env, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8",
        timeout=30,
        dimensions=(40, 100),
    )
    made.expect(">>>")
    return made


def test_a_chat_stops_an_answer_on_ctrl_c_and_goes_on(stocked: Stocked) -> None:
    talk = chat(stocked[2])
    talk.sendline("Tell me a long story about a ship and her crew.")
    talk.expect(r"2004l[^\x1b]*[A-Za-z]{3}")
    talk.sendintr()
    talk.expect("stopped")
    talk.expect(">>>")
    talk.sendline("/set max_tokens 5")
    talk.expect(">>>")
    talk.sendline("Say hello.")
    talk.expect(">>>")
    talk.sendline("/show")
    talk.expect("4 messages")
    talk.expect(">>>")
    talk.sendcontrol("d")
    talk.expect(pexpect.EOF)
    talk.close()
    assert talk.exitstatus == 0


def test_a_chat_takes_several_lines_and_lists_its_commands(stocked: Stocked, tmp_path: Path) -> None:
    talk = chat(stocked[2])
    talk.sendline("/help")
    talk.expect("/clear")
    talk.sendline("/set max_tokens 3")
    talk.expect("max_tokens is 3")
    talk.sendline('"""first line')
    talk.expect(r"\.\.\.")
    talk.sendline('second line"""')
    talk.expect(">>>")
    talk.sendline(f"/save {tmp_path / 'talk.json'}")
    talk.expect("Saved")
    talk.sendline("/nonsense")
    talk.expect("no /nonsense")
    talk.sendline("/exit")
    talk.expect(pexpect.EOF)
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][0]["content"] == "first line\nsecond line"


@pytest.mark.parametrize("verb", [v for section in VERBS.values() for v in section])
def test_every_verb_has_a_help_page(bare: Pier, verb: str) -> None:
    done = bare(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: pier {verb}")


def test_a_groups_page_cuts_no_sentence_on_a_narrow_terminal(bare: Pier) -> None:
    page = bare("lora", "--help", COLUMNS="80").stdout
    assert "PEFT saves one, or one that is in the store" in " ".join(page.split())


def test_help_and_show_mean_what_they_mean_elsewhere(bare: Pier) -> None:
    assert bare("help").stdout.startswith("Usage: pier [OPTIONS]")
    assert bare("help", "key", "create").stdout.startswith("Usage: pier key create")
    assert bare("show", "--help").stdout.startswith("Usage: pier show")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion_script(bare: Pier, shell: str) -> None:
    assert "_PIER_COMPLETE" in bare("completion", shell).stdout


def test_doctor_says_what_works_and_what_to_install(bare: Pier) -> None:
    found = json.loads(bare("doctor", "--json").stdout)
    assert {"CPU", "Memory", "Disk", "GPU", "Runtime process", "Engine"} <= {c["name"] for c in found["checks"]}
    without = bare("doctor", PIERHEAD_RUNTIME__SANDBOX="plain").stdout
    assert "bubblewrap" in without


def test_the_service_unit_starts_the_same_program(bare: Pier) -> None:
    unit = bare("service", "install", "--print").stdout
    assert f"ExecStart={sys.executable} -m pierhead.cli.main serve" in unit
    assert "PIERHEAD_HOME" in unit


def test_the_help_page_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pierhead.cli.main import entry\n"
        "try:\n    entry(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'rich', 'aiohttp', 'fastapi', 'pydantic', 'prompt_toolkit', 'xllamacpp', 'asyncio'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr.strip() == "set()"


def test_status_names_the_scheme_that_each_address_speaks():
    from pierhead.cli.operate import addresses

    found = {
        "listeners": ["127.0.0.1:1", "192.0.2.1:2"],
        "settings": {"gateway": {"tls_cert": "", "tls_loopback": False}},
    }
    assert addresses(found) == "http://127.0.0.1:1/v1\nhttp://192.0.2.1:2/v1"
    found["settings"]["gateway"]["tls_cert"] = "tls.crt"
    assert addresses(found) == "http://127.0.0.1:1/v1\nhttps://192.0.2.1:2/v1"
    found["settings"]["gateway"]["tls_loopback"] = True
    assert addresses(found) == "https://127.0.0.1:1/v1\nhttps://192.0.2.1:2/v1"
