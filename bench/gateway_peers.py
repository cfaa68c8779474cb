"""The proxies that the gateway's benchmark compares, each as its committed configuration starts it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from hmac import digest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "bench" / "gateway"
CACHE = ROOT / ".cache" / "bench"
KEY = "sk-bench-" + secrets.token_hex(24)
UPSTREAM_PORT = 12901
PORT = 12902
PEERS = ("nginx", "haproxy", "caddy", "litellm")


@dataclass
class Setup:
    """Where this run keeps its files and which cores it uses."""

    folder: Path
    proxy_core: int
    load_core: int
    notes: list[str] = field(default_factory=list)
    compiled: str = ""  # the folder of Pierhead's compiled gateway; "": it is interpreted
    full: bool = False  # Pierhead with everything on that the product has for an ordinary request

    def render(self, name: str, **values: str) -> Path:
        """A peer's committed configuration with this run's paths filled in."""
        text = (HERE / name).read_text()
        body = json.dumps(
            {
                "id": "chatcmpl-0yF8KqqOisUoGw9rLPTJQdKqvAy5Ki6k",
                "object": "chat.completion",
                "created": 1795489283,
                "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "%s"}}],
                "usage": {"prompt_tokens": 31, "completion_tokens": 4, "total_tokens": 35},
            },
            separators=(",", ":"),
        )
        body = body.replace("%s", "x" * (300 - len(body) + 2))
        fixed = {"DIR": str(self.folder), "PORT": str(PORT), "UPSTREAM_PORT": str(UPSTREAM_PORT), "BODY": body}
        for key, value in (fixed | {"KEY": KEY, "SOCKET": str(self.folder / "upstream.sock")} | values).items():
            text = text.replace(f"@{key}@", value)
        target = self.folder / name
        target.write_text(text)
        return target


@contextlib.contextmanager
def running(argv: list[str], core: int, ready: Callable[[], bool], **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A pinned process (and its children), up and answering inside the block and gone after it."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed below
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *argv], stdout=log, stderr=log, start_new_session=True, **popen
    )
    try:
        limit = time.monotonic() + 120
        while not ready():
            if process.poll() is not None or time.monotonic() > limit:
                log.seek(0)
                raise RuntimeError(f"{argv[0]} did not start: {log.read()[-2000:].decode(errors='replace')}")
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def listens(port: int) -> Callable[[], bool]:
    """A probe for a TCP port."""

    def probe() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    return probe


def pierhead(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """The gateway as the daemon starts it, with one route and (with ``auth``) one key.

    With ``setup.full`` the key has all limits, wide enough for the load, and two budgets; the route's engine has slots,
    so that admission counts them; usage is journalled on disk; metrics are always on.
    """
    pepper = secrets.token_bytes(32)
    key: dict[str, Any] = {"id": "bench", "mac": digest(pepper, KEY.encode(), sha256).hex()}
    endpoint: dict[str, Any] = {"replica": "r1", "socket": upstream}
    config: dict[str, Any] = {"settings": {"listen": [f"127.0.0.1:{PORT}"], "require_key": auth, "access_log": False}}
    snapshot: dict[str, Any] = {"type": "snapshot", "version": 1, "pepper": pepper.hex()}
    if setup.full:
        budgets = [{"amount": 10**15}, {"amount": 10**15, "unit": "usd", "window": "month"}]
        key["grants"] = {"rpm": 10**9, "tpm": 10**12, "concurrent": 10**5, "budgets": budgets}
        endpoint["slots"] = 4096
        snapshot["prices"] = [{"pattern": "*", "input": 150_000, "output": 600_000}]
        state = setup.folder / "state"
        state.mkdir(exist_ok=True)
        config["state"] = str(state)
    snapshot["keys"] = [key]
    snapshot["routes"] = [{"name": "m", "endpoints": [endpoint]}]
    config["snapshot"] = snapshot
    given = setup.folder / "pierhead.json"
    given.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "pierhead.gateway", "--admin", str(setup.folder / "admin.sock")]
    env = os.environ | ({"PYTHONPATH": setup.compiled} if setup.compiled else {})
    return running(argv, setup.proxy_core, listens(PORT), stdin=given.open("rb"), env=env)


def compiled_gateway(notes: list[str]) -> str:
    """The folder of the gateway as its wheels have it; "" where it cannot be compiled."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "compile")], capture_output=True, text=True)
    if done.returncode != 0:
        notes.append(f"pierhead: interpreted, as it could not be compiled here: {done.stderr.strip()[-200:]}")
        return ""
    return done.stdout.strip()


def nginx(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """nginx, one worker."""
    rule = "if ($authorized = 0) { return 401; }" if auth else ""
    conf = setup.render("nginx.conf", AUTH=rule, SOCKET=upstream, BUFFERING="off" if streaming else "on")
    return running(["nginx", "-c", str(conf), "-p", str(setup.folder)], setup.proxy_core, listens(PORT))


def haproxy(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """HAProxy, one thread."""
    rule = f'http-request deny deny_status 401 unless {{ req.hdr(authorization) -m str "Bearer {KEY}" }}'
    conf = setup.render("haproxy.cfg", AUTH=rule if auth else "", SOCKET=upstream)
    return running(["haproxy", "-db", "-f", str(conf)], setup.proxy_core, listens(PORT))


def caddy(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """Caddy with one processor."""
    rule = f'@strange not header Authorization "Bearer {KEY}"\n\trespond @strange 401' if auth else ""
    conf = setup.render("Caddyfile", AUTH=rule, SOCKET=upstream)
    env = os.environ | {"GOMAXPROCS": "1", "HOME": str(setup.folder), "XDG_DATA_HOME": str(setup.folder)}
    argv = ["caddy", "run", "--adapter", "caddyfile", "--config", str(conf)]
    return running(argv, setup.proxy_core, listens(PORT), env=env)


def litellm(setup: Setup, *, auth: bool, upstream: str, streaming: bool) -> contextlib.AbstractContextManager[Any]:
    """LiteLLM's proxy, one worker."""
    general = f"master_key: {KEY}" if auth else "dangerously_permit_weak_or_unset_master_key: true"
    conf = setup.render("litellm.yaml", AUTH=f"general_settings:\n  {general}")
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "HOME": str(setup.folder)}
    argv = [str(CACHE / "litellm/bin/litellm"), "--config", str(conf), "--port", str(PORT), "--host", "127.0.0.1"]
    return running([*argv, "--num_workers", "1"], setup.proxy_core, listens(PORT), env=env, cwd=setup.folder)


PROXIES = {"pierhead": pierhead, "nginx": nginx, "haproxy": haproxy, "caddy": caddy, "litellm": litellm}


def install_litellm() -> str:
    """Make LiteLLM's environment once; returns why it could not."""
    home = CACHE / "litellm"
    if (home / "bin/litellm").exists():
        return ""
    CACHE.mkdir(parents=True, exist_ok=True)
    for argv in (
        ["uv", "venv", "--quiet", str(home)],
        ["uv", "pip", "install", "--quiet", "--python", str(home), "litellm[proxy]", "prometheus-client"],
    ):
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(home, ignore_errors=True)
            return done.stderr.strip()[-300:] or "uv failed"
    return ""


def available(names: list[str], notes: list[str]) -> list[str]:
    """Those of ``names`` that this machine can run; a note for each of the others."""
    found: list[str] = []
    for name in names:
        why = "" if name in ("pierhead", "litellm") or shutil.which(name) else "it is not installed"
        if name == "litellm" and not why:
            why = install_litellm()
        if why:
            notes.append(f"{name} is left out: {why}")
        else:
            found.append(name)
    return found
