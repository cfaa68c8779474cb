"""What to run: the engine seam and the launch plan it makes; pure data, starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from pierhead.engines.builds import Build
from pierhead.engines.gpus import Device
from pierhead.store.model import ModelFile


class Mount(msgspec.Struct, frozen=True):
    """A host path made visible inside; ``target`` is an absolute path inside a container."""

    source: str
    target: str
    read_only: bool = True


class Limits(msgspec.Struct, frozen=True):
    """Upper bounds; 0 means unlimited. ``memory`` in bytes, ``cpus`` in cores."""

    memory: int = 0
    cpus: float = 0.0
    pids: int = 512


class Readiness(msgspec.Struct, frozen=True):
    """How a started engine shows that it answers: HTTP 200 on ``path`` within ``timeout`` seconds."""

    path: str = "/health"
    timeout: float = 300.0


class Environment(msgspec.Struct, frozen=True):
    """A Python environment that an engine has to itself, so that no engine's wheels meet another's.

    ``requirements`` are pip's, exact pins of what matters; what those need comes with them, unless ``dependencies`` is
    false and they are all. ``python`` is the minor version that the wheels exist for ("": Pierhead's own). ``torch`` is
    the build of PyTorch (``cpu``) where the index of PyPI has another. ``index`` is the address of the package index
    that the first of them comes from; whatever else is needed comes from the user's own.
    """

    requirements: tuple[str, ...]
    python: str = ""
    dependencies: bool = True
    torch: Literal["", "cpu"] = ""
    index: str = ""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is and can do, as data: shown to people, checked by the conformance suite, used by the fleet.

    ``formats`` are those of ``ModelFile.format``. ``serves`` are the gateway's operations that it may answer natively;
    which of them it does for one model is in the launch spec. ``metrics`` maps our words (``running``, ``waiting``,
    ``cache_usage``, ``prompt_tokens``, ``generated_tokens``) to the names that it gives to Prometheus. ``lora`` tells
    whether adapters are given at its start or also while it runs, ``lora_inside`` that only those of the model's own
    folder can be; ``sleep`` whether it can let its memory go and stay.
    ``marks`` are names of files that show that a model was made for this engine. ``parallel`` is how many requests it
    takes at a time where nobody says (0: any number). ``pictures`` says whether it serves models that paint:
    no, those only, or those also. ``untested`` says what of it no machine of the project could try; ``never_run``: that
    is all of it.
    """

    name: str
    title: str
    formats: tuple[str, ...]
    serves: tuple[str, ...]
    accelerators: tuple[str, ...] = ("cpu",)  # cpu, cuda, rocm, openvino …
    platforms: tuple[str, ...] = ("linux/amd64", "linux/arm64")
    common: tuple[str, ...] = (
        "context",
        "parallel",
        "threads",
    )  # settings of most engines that it knows
    marks: tuple[str, ...] = ()
    parallel: int = 1
    metrics: dict[str, str] = {}
    metrics_path: str = "/metrics"
    lora: Literal["", "start", "runtime"] = ""
    lora_inside: bool = False
    sleep: bool = False
    speculative: bool = False
    pictures: Literal["no", "only", "also"] = "no"
    untested: str = ""
    never_run: bool = False


class ImageRecipe(msgspec.Struct, frozen=True):
    """The inputs of an engine image; its name is the hash of them. ``requirements`` are exact wheel pins.

    ``python`` is the minor version that is wanted, as ``3.13`` ("": that of the base image). ``torch`` is the build of
    PyTorch, ``index`` the package index that an ``Environment`` has.
    """

    engine: str
    base: str
    requirements: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()  # (path in image, text); what runs is /opt/engine/entry.py or entry/
    glibc: tuple[int, int] = (2, 28)  # the newest that its wheels ask for; the base image must have it
    dependencies: bool = False  # whether what the requirements need comes with them; else they are all
    python: str = ""
    torch: Literal["", "cpu"] = ""
    index: str = ""


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA that a started engine can use for single requests: by its number (``id``), or as a ``model`` name."""

    name: str
    id: int = -1
    model: str = ""


class Loading(msgspec.Struct, frozen=True):
    """How a started engine takes LoRA adapters, and lets them go.

    ``folder`` is the host folder that it sees and in which they are put, each in a folder of its own; the engine knows
    that one by its bare name. ``load`` and ``unload`` are paths to POST vLLM's ``lora_name`` and ``lora_path`` to.
    """

    folder: str
    load: str = "/v1/load_lora_adapter"
    unload: str = "/v1/unload_lora_adapter"


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a runtime needs to start one replica; serializable, so that it survives the daemon.

    In ``argv`` and ``env`` values, ``$(PYTHON)``, ``$(ENTRY)``, ``$(BRIDGE)``, ``$(MODEL_DIR)``, ``$(SOCKET)``,
    ``$(BUILT)`` and, in a job, ``$(OUTPUT)`` stand for places that each runtime knows (see ``runtimes.base.Places``);
    ``$(MOUNT0)`` is where the first of ``mounts`` is to be found, and so on. ``$$(`` is a literal ``$(``.
    """

    replica: str  # [a-z0-9]{1,20}, unique on this host
    model: str  # the route name
    engine: str
    argv: tuple[str, ...]
    model_dir: str  # host folder, materialized read-only
    entry: str = ""  # host path of the engine's own entry program: a file, or a folder with a __main__.py
    environment: Environment | None = None  # of its own; None: Pierhead's
    kind: Literal["service", "job"] = "service"
    env: dict[str, str] = {}
    mounts: tuple[Mount, ...] = ()
    image: ImageRecipe | None = None
    image_name: str = ""  # resolved name or digest; overrides ``image``
    limits: Limits = Limits()
    readiness: Readiness = Readiness()
    stop_timeout: float = 10.0
    devices: tuple[str, ...] = ()  # CDI names, such as nvidia.com/gpu=0
    shm_size: int = 0  # bytes; 0: the runtime's own
    tmp_size: int = 0  # bytes of its private /tmp; 0: the runtime's own
    ulimits: dict[str, int] = {}
    user: str = ""
    stdio: bool = False
    labels: dict[str, str] = {}
    sleep: tuple[str, ...] = ()  # a POST to the first path lets go of GPU memory, to the second takes it back
    build: Build | None = None  # what has to be built for this machine before the first start
    built: str = ""  # host folder of that
    serves: tuple[str, ...] = ()  # the gateway's operations that the engine answers natively
    called: str = ""  # the name by which the engine wants its model asked for, where it minds
    adapters: tuple[Adapter, ...] = ()
    loading: Loading | None = None  # None: it has the adapters that it was started with, and no others
    fixed: tuple[tuple[int, float], ...] = ()  # number and scale of the LoRAs that always count
    call_prefix: str = ""  # what a required tool call must begin with, where the engine does not see to it itself


@dataclass(frozen=True)
class Beside:
    """Another model of the store that is to be at hand: one that drafts, or a LoRA with its ``scale``."""

    role: Literal["draft", "lora"]
    name: str
    folder: Path
    files: tuple[ModelFile, ...]
    metadata: Mapping[str, Any]
    scale: float = 1.0


@dataclass(frozen=True)
class PlanRequest:
    """What the fleet asks an engine to plan: a model on disk and the settings that the user or config gave."""

    replica: str
    model: str
    model_dir: Path
    files: tuple[ModelFile, ...]
    metadata: Mapping[str, Any]  # ``formats.summarize`` of the weights
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # by engine parameter name
    free_memory: int = 0  # bytes available for this replica
    cpus: int = 1
    processor: frozenset[str] = frozenset()  # its features, as Linux names them
    beside: tuple[Beside, ...] = ()
    adapters: Path | None = None  # the folder for LoRAs that come and go, for an engine that loads them while it runs
    devices: tuple[Device, ...] = ()  # the accelerators of this machine, with what each has free for this replica
    settle: bool = False  # for less than the best, fewer layers on a GPU or none, rather than for OutOfMemory
    opening: tuple[Mapping[str, str], ...] = ()  # messages (role, content) that begin every chat without a system one


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's answer: the spec, the context it chose (tokens per request) and the memory it will need (bytes).

    ``devices`` are the bytes of accelerators' own memory, by CDI name (see ``gpus.take``). ``parallel`` is how many
    requests it takes at a time, where that depends on the machine (0: as a setting or the engine's facts say).
    """

    spec: LaunchSpec
    context: int
    memory: int
    devices: dict[str, int] = {}
    parallel: int = 0
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """A kind of server program. Pure: no I/O, no clock."""

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> EngineFacts:
        """What it is and can do."""
        ...

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether this engine can serve these files."""
        ...

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """What it would do with a model it accepts, in the words of ``/v1/models``.

        ``chat``, ``completions``, ``embeddings``, ``rerank``, ``classify``, ``infer``, ``predict``, ``transcriptions``,
        ``translations``, ``speech``, ``images``; further ``vision``, ``tools``, ``thinking``.
        """
        ...

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match.

        Only the error for an unknown one has its name as ``data["parameter"]``.
        """
        ...

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; UsageError for bad settings, OutOfMemory (with the numbers) when nothing fits."""
        ...


@runtime_checkable
class Describes(Protocol):
    """An engine that can say what it does where nobody says anything."""

    def defaults(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings as they are by themselves for a model with this ``metadata``, under canonical names."""
        ...


@runtime_checkable
class Spells(Protocol):
    """An engine whose canonical values are not the words that a person types."""

    def spelled(self, name: str, value: Any) -> Any:
        """The value of the setting of this canonical name, as it is typed."""
        ...
