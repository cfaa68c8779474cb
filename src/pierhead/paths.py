"""Where Pierhead keeps its files: state (store, database), cache and runtime folders; creates none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """The folders of one installation.

    ``PIERHEAD_HOME`` puts everything below one folder; else the XDG base directories hold. ``runtime`` holds sockets
    (their paths stay under 100 bytes), so it falls back to ``/tmp/pierhead-UID`` when the natural place is too long.
    """

    config: Path  # folder with config.toml and catalog.toml
    state: Path  # store/, pierhead.db, key pepper, logs
    cache: Path  # partial downloads, built images' contexts
    runtime: Path  # sockets, pid files, replicas/

    @property
    def store(self) -> Path:
        return self.state / "store"

    @property
    def database(self) -> Path:
        return self.state / "pierhead.db"

    @property
    def daemon_log(self) -> Path:
        return self.state / "daemon.log"

    @property
    def control_socket(self) -> Path:
        """The daemon's control API (HTTP)."""
        return self.runtime / "control.sock"

    @property
    def gateway_socket(self) -> Path:
        """The gateway's data plane for local clients (HTTP, no key needed)."""
        return self.runtime / "gateway.sock"

    @property
    def gateway_admin_socket(self) -> Path:
        """The gateway's link to the daemon (NDJSON, see ``gateway.link``)."""
        return self.runtime / "gateway-admin.sock"

    @property
    def replicas(self) -> Path:
        return self.runtime / "replicas"


def resolve(env: Mapping[str, str] | None = None) -> Paths:
    """Work out the folders from the environment (``PIERHEAD_HOME``, ``XDG_*``, ``HOME``)."""
    env = os.environ if env is None else env
    uid = os.getuid()
    home = Path(env.get("HOME") or "~").expanduser()
    root = env.get("PIERHEAD_HOME")
    if root:
        base = Path(root).expanduser().absolute()
        return Paths(base / "config", base / "state", base / "cache", _short(base / "run", uid))
    config = Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "pierhead"
    state = Path(env.get("XDG_STATE_HOME") or home / ".local" / "state") / "pierhead"
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache") / "pierhead"
    run = env.get("XDG_RUNTIME_DIR")
    runtime = Path(run) / "pierhead" if run else state / "run"
    return Paths(config, state, cache, _short(runtime, uid))


def _short(path: Path, uid: int) -> Path:
    """Keep ``path`` when the longest socket below it fits in a ``sockaddr_un``, else a per-user, per-path folder."""
    longest = len(os.fsencode(path)) + len("/replicas/xxxxxxxxxxxxxxxxxxxx/s/engine.sock")
    if longest < 100:
        return path
    import hashlib

    tag = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return Path(f"/tmp/pierhead-{uid}-{tag}")  # noqa: S108  # created 0700 and owner-checked by its user
