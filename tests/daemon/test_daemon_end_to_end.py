"""A daemon, its gateway and the real model: starts, crashes, adoption and upgrades."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pierhead.daemon.client import Client
from pierhead.daemon.lifecycle import make_folders
from pierhead.daemon.watch import watched
from pierhead.errors import AccessDenied, Conflict, DaemonUnavailable, EngineFailed, NotFound, PierError
from pierhead.events import Note, Phase, PullDone, Ready
from pierhead.sockets import connect_unix

if TYPE_CHECKING:
    from tests.daemon.conftest import House

pytestmark = pytest.mark.model


def replica(house: House) -> dict[str, Any]:
    (only,) = house.client.get("/replicas")
    return only


def start(house: House, **extra: Any) -> Ready:
    *_, last = house.client.events("POST", "/replicas", {"model": "smollm2", **extra})
    assert isinstance(last, Ready)
    return last


def gone(pid: int, timeout: float = 15) -> bool:
    """Whether the process ends in time; told by the kernel."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout)[0])
    finally:
        os.close(fd)


def metrics(house: House) -> str:
    """The gateway's own figures."""
    connection = http.client.HTTPConnection("localhost", timeout=20)
    with contextlib.closing(connection):
        connection.sock = connect_unix(house.paths.gateway_socket)
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


class Stream:
    """A long answer, read one event at a time."""

    def __init__(self, house: House, tokens: int = 300) -> None:
        self.connection, self.response = house.ask(tokens=tokens, stream=True)
        assert self.response.status == 200, self.response.read()

    def next(self) -> dict[str, Any] | None:
        while line := self.response.readline():
            if line.startswith(b"data: "):
                return None if line.strip() == b"data: [DONE]" else json.loads(line[6:])
        raise AssertionError("the stream ended without [DONE]")

    def rest(self) -> int:
        """Read to the proper end; how many events came."""
        count = 0
        while (event := self.next()) is not None:
            assert "error" not in event, event
            count += 1
        self.connection.close()
        return count


# --- starting a model ---------------------------------------------------------------------------------------------


def test_a_model_starts_on_its_first_request_and_then_stays(running: House) -> None:
    status, answer = running.chat()
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"]
    first = replica(running)
    assert (first["state"], first["model"], first["context"]) == ("ready", "smollm2", 1024)
    assert running.chat()[0] == 200
    assert replica(running)["id"] == first["id"]


def test_many_first_requests_share_one_start(running: House) -> None:
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(running.chat()[0])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 6
    assert replica(running)["restarts"] == 0


def test_the_phases_of_a_start_are_told_with_their_times(running: House) -> None:
    events = list(running.client.events("POST", "/replicas", {"model": "smollm2"}))
    phases = [e for e in events if isinstance(e, Phase)]
    assert [p.state for p in phases] == ["created", "preparing", "starting", "loading", "ready"]
    times = [p.elapsed_s for p in phases]
    assert times == sorted(times)
    assert isinstance(events[-1], Ready)


def test_settings_that_differ_restart_the_model_and_say_so(running: House) -> None:
    before = start(running)
    assert start(running, settings={}).replica == before.replica
    events = list(running.client.events("POST", "/replicas", {"model": "smollm2", "settings": {"context": 512}}))
    assert any(isinstance(e, Note) and "restarting" in e.message for e in events)
    assert isinstance(events[-1], Ready)
    assert events[-1].context == 512
    assert start(running).replica == events[-1].replica


def test_what_is_not_in_the_store_gives_the_command_to_type(running: House) -> None:
    with pytest.raises(NotFound, match="nosuch") as caught:
        list(running.client.events("POST", "/replicas", {"model": "nosuch"}))
    assert "pier pull nosuch" in (caught.value.hint or "")
    status, answer = running.chat("nosuch")
    assert status == 404
    assert "pier pull nosuch" in json.dumps(answer)


def test_a_model_that_was_named_after_the_daemon_started_is_served(running: House) -> None:
    running.client.request("POST", "/models/copy", {"source": "smollm2", "target": "other"})
    deadline = time.monotonic() + 10
    while running.chat("other")[0] == 404:
        assert time.monotonic() < deadline
    assert len(running.client.get("/replicas")) == 1


def test_a_model_is_pulled_through_the_daemon_and_then_answers(house: House, smollm2: Path, tmp_path: Path) -> None:
    shutil.rmtree(house.paths.store)
    file = tmp_path / "fresh.gguf"
    os.link(smollm2, file)
    house.start()
    *_, done = house.client.events("POST", "/models/pull", {"reference": str(file), "name": "fresh"})
    assert isinstance(done, PullDone)
    assert (done.name, house.client.get("/models/fresh")["digest"]) == ("fresh", done.digest)
    assert house.chat("fresh")[0] == 200
    with pytest.raises(PierError) as caught:
        list(house.client.events("POST", "/models/pull", {"reference": str(tmp_path / "absent.gguf")}))
    assert "absent.gguf" in caught.value.message


def test_a_running_model_is_not_removed(running: House) -> None:
    start(running)
    with pytest.raises(Conflict) as caught:
        running.client.request("DELETE", "/models/smollm2")
    assert "pier stop smollm2" in (caught.value.hint or "")
    running.client.request("DELETE", "/replicas/smollm2")
    assert running.client.request("DELETE", "/models/smollm2")["names"] == ["smollm2"]


def test_an_engine_that_cannot_load_says_why_in_its_own_words(house: House, smollm2: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    with smollm2.open("rb") as whole:
        half.write_bytes(whole.read(20_000_000))
    house.stock("broken", half, like=smollm2)
    house.start()
    with pytest.raises(EngineFailed, match="broken") as caught:
        list(house.client.events("POST", "/replicas", {"model": "broken"}))
    assert any("tensor" in line for line in caught.value.data["log"]), caught.value.data
    failed = replica(house)
    assert (failed["state"], failed["error"]["code"]) == ("failed", "engine_failed")
    log = list(house.client.lines("GET", "/replicas/broken/logs"))
    assert [line.decode() for line in log] == caught.value.data["log"]
    status, answer = house.chat("broken")
    assert status == 502
    assert "broken" in answer["error"]["message"]
    assert house.client.request("DELETE", "/replicas/broken")["stopped"]


def test_an_idle_model_is_unloaded(running: House) -> None:
    start(running, keep_alive=0)
    pid = replica(running)["pid"]
    assert running.chat()[0] == 200
    assert gone(pid)
    assert running.chat()[0] == 200


def test_a_pinned_model_stays(running: House) -> None:
    start(running, keep_alive=0, pin=True)
    assert replica(running)["expires_at"] is None


def test_stopping_lets_running_answers_finish(running: House) -> None:
    stream = Stream(running, tokens=200)
    assert stream.next()
    stopped: list[Any] = []
    thread = threading.Thread(target=lambda: stopped.append(running.client.request("DELETE", "/replicas/smollm2")))
    thread.start()
    assert stream.rest() > 100
    thread.join(30)
    assert stopped[0]["stopped"]
    assert running.client.get("/replicas") == []


def test_logs_and_readings_of_what_runs(running: House) -> None:
    start(running)
    lines = list(running.client.lines("GET", "/replicas/smollm2/logs", query={"tail": 5}))
    assert 0 < len(lines) <= 5
    (reading,) = running.client.stream("GET", "/replicas/stats", query={"once": True})
    assert reading["replicas"][0]["model"] == "smollm2"
    assert reading["replicas"][0]["memory"] > 1 << 20


# --- what dies ----------------------------------------------------------------------------------------------------


def test_a_killed_engine_is_started_again(running: House) -> None:
    start(running)
    before = replica(running)
    pid = engine_pid(running)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    status, answer = running.chat()
    assert status == 200, answer
    after = replica(running)
    assert (after["id"], after["restarts"]) == (before["id"], 1)


def engine_pid(house: House) -> int:
    """The program that answers, below whatever wraps it."""
    import psutil

    top = psutil.Process(replica(house)["pid"])
    family = [top, *top.children(recursive=True)]
    return max(family, key=lambda p: p.memory_info().rss).pid


def test_a_killed_daemon_breaks_no_stream_and_the_next_one_adopts_what_runs(running: House) -> None:
    start(running, keep_alive=1234, pin=True)
    before = replica(running)
    stream = Stream(running)
    assert stream.next()
    running.kill()
    assert running.chat()[0] == 200
    assert "error" not in running.start()
    after = replica(running)
    for key in ("id", "pid", "digest", "context", "started", "pinned", "memory_estimate", "socket"):
        assert after[key] == before[key], key
    assert after["state"] == "ready"
    assert stream.rest() > 200
    pid = engine_pid(running)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert running.chat()[0] == 200
    assert replica(running)["restarts"] == 1


@pytest.mark.parametrize("moment", ["created", "preparing", "starting", "loading", "ready"])
def test_a_daemon_killed_in_the_middle_of_a_start_leaves_nothing_in_the_way(running: House, moment: str) -> None:
    with contextlib.suppress(DaemonUnavailable):
        for event in running.client.events("POST", "/replicas", {"model": "smollm2"}):
            if isinstance(event, Phase) and event.state == moment:
                running.kill()
    assert "error" not in running.start()
    assert running.chat()[0] == 200
    assert len(running.client.get("/replicas")) == 1
    assert len(list(running.paths.replicas.iterdir())) == 1
    running.client.shutdown()
    assert running.left == []
    assert list(running.paths.replicas.iterdir()) == []
    assert not running.paths.gateway_socket.exists()
    assert list((running.paths.runtime / "gateways").iterdir()) == []


def test_a_request_that_waits_while_the_daemon_dies_is_answered_by_the_next(running: House) -> None:
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(running.chat()[0]))
    for event in running.client.events("POST", "/replicas", {"model": "smollm2"}):
        if isinstance(event, Phase) and event.state == "loading":
            thread.start()
            os.kill(running.daemons[-1].pid, signal.SIGSTOP)
            running.kill()
            break
    assert "error" not in running.start()
    thread.join(30)
    assert answers == [200]


def test_a_killed_gateway_is_started_again(running: House) -> None:
    start(running)
    pid = running.client.get("/status")["gateway"]["pid"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if running.chat()[0] == 200:
                break
        assert time.monotonic() < deadline
    assert running.client.get("/status")["gateway"]["pid"] != pid


# --- daemons among themselves -------------------------------------------------------------------------------------


def test_of_two_daemons_one_wins(house: House) -> None:
    pipes = [house.launch("--background")[1] for _ in range(3)]
    said = [house.heard(fd) for fd in pipes]
    assert sorted(bool(s.get("already")) for s in said) == [False, True, True]
    (pid,) = {s["pid"] for s in said if "pid" in s}
    assert house.client.get("/version")["pid"] == pid
    house.client.shutdown()


def test_a_second_daemon_in_the_foreground_says_that_one_runs(running: House) -> None:
    daemon, _ = running.launch()
    assert daemon.wait(30) == Conflict.exit_code


def test_commands_at_the_same_moment_start_one_daemon(house: House) -> None:
    code = (
        "from pierhead.daemon.client import Client; from pierhead.paths import resolve;"
        "print(Client(resolve()).ensure_daemon()['pid'])"
    )
    programs = [
        subprocess.Popen([sys.executable, "-c", code], env=house.env, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    pids = {p.communicate(timeout=60)[0].strip() for p in programs}
    assert len(pids) == 1, pids
    house.client.shutdown()
    assert house.left == []


def test_a_newer_command_upgrades_an_older_daemon_and_its_gateway_without_dropping_a_stream(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    assert "error" not in house.start(version="0.0.9")
    start(house)
    before = replica(house)
    old = house.client.get("/status")
    stream = Stream(house)
    assert stream.next()
    assert old["version"] == "0.0.9"
    info = Client(house.paths).ensure_daemon()
    new = house.client.get("/status")
    assert info["version"] == new["version"] != "0.0.9"
    assert new["listeners"] == old["listeners"]
    assert new["gateway"]["pid"] != old["gateway"]["pid"]
    assert replica(house)["id"] == before["id"]
    assert house.chat()[0] == 200
    assert stream.rest() > 200
    assert gone(old["gateway"]["pid"])
    house.client.shutdown()


def test_a_newer_daemon_is_left_alone_with_a_clear_message(house: House) -> None:
    house.start(version="99.0.0")
    with pytest.raises(DaemonUnavailable, match=r"99\.0\.0, newer than this pier"):
        house.client.ensure_daemon()
    assert house.client.get("/version")["version"] == "99.0.0"


def test_a_daemon_with_nothing_to_do_leaves(house: House) -> None:
    daemon, read = house.launch("--idle-exit", "0.3")
    house.heard(read)
    assert daemon.wait(20) == 0
    assert house.left == []


def test_sigterm_drains_and_ends_everything(running: House) -> None:
    stream = Stream(running, tokens=150)
    assert stream.next()
    running.daemons[-1].send_signal(signal.SIGTERM)
    assert stream.rest() > 50
    assert running.daemons[-1].wait(30) == 0
    assert running.left == []
    assert not running.paths.control_socket.exists()


def test_a_signal_in_the_middle_of_the_start_leaves_nothing(house: House) -> None:
    daemon, read = house.launch()
    with watched(house.paths.runtime.parent) as home:
        assert home.wait(house.paths.runtime.exists, 10)
    with watched(house.paths.runtime) as runtime:
        assert runtime.wait((house.paths.runtime / "gateways").exists, 10)
    daemon.terminate()
    house.heard(read)
    assert daemon.wait(20) in (0, 128 + signal.SIGTERM)
    deadline = time.monotonic() + 10
    while house.left:
        assert time.monotonic() < deadline, house.left
    assert not house.paths.control_socket.exists()


def test_a_folder_that_cannot_be_made_is_named(house: House) -> None:
    house.paths.runtime.write_text("in the way")
    said = house.start()
    assert said["error"]["code"] == "access_denied"
    assert "PIERHEAD_HOME" in said["error"]["hint"]
    with pytest.raises(AccessDenied, match=str(house.paths.runtime)):
        make_folders(house.paths)


def test_a_second_signal_does_not_wait_for_streams(running: House) -> None:
    stream = Stream(running, tokens=900)
    assert stream.next()
    running.daemons[-1].send_signal(signal.SIGTERM)
    while replica(running)["state"] != "draining":
        pass
    running.daemons[-1].send_signal(signal.SIGINT)
    assert running.daemons[-1].wait(20) == 0
    stream.connection.close()
    assert running.left_after(10) == []


def test_a_gateway_that_a_killed_daemon_left_half_way_is_put_away(running: House) -> None:
    status = running.client.get("/status")
    notes = running.paths.runtime / "gateways"
    stray = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    birth = Path(f"/proc/{stray.pid}/stat").read_text().rpartition(")")[2].split()[19]
    (notes / str(stray.pid)).write_text(f"{birth} other")
    (notes / "1").write_text("not-its-birth other")
    running.kill()
    assert "error" not in running.start()
    assert stray.wait(10) == -signal.SIGTERM
    assert running.client.get("/status")["gateway"]["pid"] == status["gateway"]["pid"]
    assert [p.name for p in notes.iterdir()] == [str(status["gateway"]["pid"])]


def test_other_addresses_replace_the_gateway_and_keep_its_streams(running: House) -> None:
    start(running)
    stream = Stream(running)
    assert stream.next()
    running.kill()
    said = running.start("--listen", "127.0.0.1:0", "--listen", "[::1]:0")
    assert len(said["listeners"]) == 2
    assert running.chat()[0] == 200
    assert stream.rest() > 200


def test_who_waits_at_a_gateway_that_is_replaced_for_a_model_to_start_gets_an_answer(running: House) -> None:
    old = running.client.get("/status")["gateway"]["pid"]
    running.kill()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.chat)
        deadline = time.monotonic() + 8
        while 'pierhead_queue_waiting{model="smollm2"} 1' not in metrics(running):
            assert time.monotonic() < deadline
        said = running.start("--listen", "127.0.0.1:0", "--listen", "[::1]:0")
        assert len(said["listeners"]) == 2
        assert running.client.get("/status")["gateway"]["pid"] != old
        status, answer = waiting.result(60)
    assert status == 200, answer
    assert gone(old)
    assert running.chat()[0] == 200


def test_sighup_opens_logs_anew_that_another_program_has_moved_away(house: House) -> None:
    said = house.start(PIERHEAD_GATEWAY__ACCESS_LOG="true")
    log, moved = house.paths.state / "gateway.log", house.paths.state / "gateway.log.1"

    def logged(*args: str) -> str:
        command = [sys.executable, "-m", "pierhead.cli.main", "logs", "gateway", *args]
        return subprocess.run(command, env=house.env, capture_output=True, text=True, timeout=60, check=True).stdout

    with watched(house.paths.state, contents=True) as watch:
        assert house.chat("no-such-model")[0] == 404
        assert watch.wait(lambda: "/v1/chat/completions" in log.read_text(), 20)
        assert json.loads(logged("--tail", "1"))["status"] == 404
        log.rename(moved)
        os.kill(said["pid"], signal.SIGHUP)
        assert watch.wait(log.exists, 20)
        assert house.chat("another-one")[0] == 404
        assert watch.wait(lambda: "/v1/chat/completions" in log.read_text(), 20)
        assert len(moved.read_text().splitlines()) == 1
    assert house.client.get("/status")["pid"] == said["pid"]
    follow = [sys.executable, "-m", "pierhead.cli.main", "logs", "gateway", "--follow", "--json"]
    with subprocess.Popen(follow, env=house.env, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert b"404" in reader.stdout.readline()
        log.rename(moved)
        log.write_text("begun anew\n")
        assert json.loads(reader.stdout.readline()) == {"line": "begun anew"}
        reader.kill()


# --- addresses and keys -------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_with_the_way_out(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = house.start("--listen", f"127.0.0.1:{port}")
    assert said["error"]["code"] == "address_in_use"
    assert str(port) in said["error"]["message"]
    assert "--listen" in said["error"]["hint"]
    assert house.daemons[-1].wait(10) != 0
    assert house.left == []


def test_listening_beyond_this_machine_takes_a_key(house: House) -> None:
    said = house.start("--listen", "0.0.0.0:0")
    assert "pier key create" in said["error"]["hint"]
    assert "error" not in house.start()
    house.client.request("POST", "/keys", {"name": "lan"})
    house.client.shutdown()
    said = house.start("--listen", "0.0.0.0:0", "--listen", "127.0.0.1:0")
    assert len(said["listeners"]) == 2


def test_a_key_opens_the_gateway_until_it_is_revoked(house: House) -> None:
    (address,) = house.start(PIERHEAD_GATEWAY__REQUIRE_KEY="true")["listeners"]
    host, _, port = address.rpartition(":")

    def models(key: str = "") -> int:
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
            return connection.getresponse().status

    assert models() == 401
    new = house.client.request("POST", "/keys", {"name": "ci"})
    deadline = time.monotonic() + 10
    while models(new["key"]) != 200:
        assert time.monotonic() < deadline
    assert new["key"] not in json.dumps(house.client.get("/keys"))
    house.client.request("DELETE", f"/keys/{new['id']}")
    while models(new["key"]) != 401:
        assert time.monotonic() < deadline
