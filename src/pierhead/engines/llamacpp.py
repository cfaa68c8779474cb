"""The llama.cpp engine: turns a GGUF model and settings into a launch plan; pure, starts nothing."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pierhead.config import Settings
from pierhead.engines import serving
from pierhead.engines.base import EngineFacts, ImageRecipe, LaunchSpec, Limits, Plan, PlanRequest
from pierhead.engines.llamacpp_beside import Companions, companions
from pierhead.engines.llamacpp_gpu import CPU, GLIBC, INDEX, SMALLEST, Build, Fit, Wishes, build_for, fit
from pierhead.engines.llamacpp_params import canonical, spelled_out, usual
from pierhead.engines.llamacpp_template import Template
from pierhead.errors import OutOfMemory, UsageError
from pierhead.formats.estimate import Estimate, estimate, fit_context
from pierhead.store.model import ModelFile

ENTRY = Path(__file__).with_name("llamacpp_entry.py")
CHECKPOINTS = 4  # states of each prompt that the server may keep to go back to
UBATCH = 512  # tokens that are worked through at a time
MIB = 1 << 20
# What its server answers beside the work that a model is for.
_RANK = 4  # llama.cpp's number for pooling that ranks
_THINKS = ("enable_thinking", "<think>", "reasoning_content", "reasoning_effort")
_EXTENDS = frozenset({"rope_freq_base", "rope_freq_scale", "rope_scaling_type", "yarn_orig_ctx", "yarn_ext_factor"})
_TOOLS = ("llamacpp-tokenize", "llamacpp-detokenize", "llamacpp-template", "llamacpp-props", "llamacpp-infill")

_COMMON = ("context", "parallel", "threads", "kv_cache_type", "pooling", "normalize")


@functools.cache
def engine_version() -> str:
    """The installed wheel's version, which the container image is pinned to as well."""
    return importlib.metadata.version("xllamacpp")


FACTS = EngineFacts(
    name="llamacpp",
    title="llama.cpp",
    formats=("gguf",),
    serves=("chat", "completions", "embeddings", "llamacpp-rerank", *_TOOLS),
    metrics={
        "running": "llamacpp:requests_processing",
        "waiting": "llamacpp:requests_deferred",
        "prompt_tokens": "llamacpp:prompt_tokens_total",
        "generated_tokens": "llamacpp:tokens_predicted_total",
    },
    common=(*_COMMON, "reasoning_parser", "reasoning_budget", "draft", "draft_tokens"),
    accelerators=("cpu", "cuda", "vulkan", "rocm"),
    lora="start",
    speculative=True,
    untested="Vulkan and ROCm, and CUDA in a container. As a process it was run on one H200, built from its source.",
)


class _Place(NamedTuple):
    """Where a model is put: tokens, its need of this machine's memory, and the bytes that it may never exceed."""

    context: int
    needed: Estimate
    most: int
    fit: Fit | None = None


class LlamaCpp:
    """Serves GGUF through llama.cpp's own server."""

    name = FACTS.name
    facts = FACTS

    def __init__(self, base_image: str = "", max_context: int = 8192, index: str = INDEX) -> None:
        self._base_image = base_image
        self._max_context = max_context
        self._index = index

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there are GGUF weights."""
        return bool(_gguf(files))

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        pooling = metadata.get("pooling")
        if pooling:
            return ("rerank",) if pooling == _RANK else ("embeddings",)
        found = ["chat", "completions", "embeddings"]
        template = str(metadata.get("chat_template") or "")
        if any(file.role == "mmproj" for file in files):
            found.append("vision")
        if template.strip():
            found.append("tools")  # a template that knows none is taught them when the model starts
        if any(word in template for word in _THINKS):
            found.append("thinking")
        return tuple(found)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under llama.cpp's names; UsageError names an unknown one with its closest match."""
        return canonical(settings)

    def defaults(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What llama.cpp does by itself."""
        return usual()

    def spelled(self, name: str, value: Any) -> Any:
        """See ``Spells``."""
        return spelled_out(name, value)

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        settings = canonical(request.settings)
        wishes = Wishes.of(settings)
        build = build_for(wishes, request.devices)
        if build.name:
            chosen = {name: value for name, value in settings.items() if name != "n_gpu_layers"}
            if made := self._planned(request, chosen, build, wishes):
                return made
            build = Build(note="not one layer fits in what is free of the GPU's memory: it runs on the processor")
        made = self._planned(request, dict(settings), build, None)
        assert made is not None  # the processor is nobody's second choice
        return made

    def _planned(
        self, request: PlanRequest, settings: dict[str, Any], build: Build, wishes: Wishes | None
    ) -> Plan | None:
        """With one build of llama.cpp; None where nothing fits on the GPU of the ``wishes``."""
        parallel = int(settings.pop("parallel", 0)) or 1
        asked = int(settings.pop("context", 0))
        if _EXTENDS.isdisjoint(settings):
            asked = serving.within(asked, request.metadata)  # its server would do so, too, after it has filled memory
        mode = self._mode(settings, request)
        sizing = _sizing(request, settings, mode, parallel, gpu=wishes is not None)
        most = asked or min(int(request.metadata.get("context_length") or self._max_context), self._max_context)
        beside = companions(request, settings, most, sizing)
        sizing["extra_weights"] = beside.memory
        outputs = _outputs(request, mode, sizing)
        if settings.get("embedding"):  # whoever asks for embeddings uses them; most models that write only write
            sizing["outputs"] = outputs
        if wishes is None:
            place = self._on_cpu(request, asked, sizing, outputs)
        else:
            place = _on_gpu(request, wishes, sizing | _reserved(settings, outputs), asked, most)
        if place is None:
            return None
        if request.free_memory and place.needed.total > request.free_memory:
            raise _too_large(request.model, place.needed, place.context, request.free_memory)
        engine: dict[str, Any] = {
            "model": _weights(request.files),
            "alias": request.model,
            "n_ctx": -(-place.context // 256) * 256 * parallel,  # the engine rounds up itself; so does the estimate
            "cache_ram_mib": 0,  # outside the estimate unless asked for
            "n_ctx_checkpoints": CHECKPOINTS,
            "n_parallel": parallel,
            "n_ubatch": sizing["ubatch"],
            "cpuparams.n_threads": max(1, request.cpus),
            **mode,
            **(place.fit.settings if place.fit else {}),
            **{name: value for name, value in settings.items() if name != "n_ubatch"},
            **beside.settings,
        }
        template = Template.of(request, settings)
        spec = self._spec(request, engine | template.settings, place.most, build)
        spec = msgspec.structs.replace(
            spec,
            argv=(*spec.argv, *beside.argv),
            call_prefix=template.call_prefix,
            serves=(*_work(mode, request), *_TOOLS),
            mounts=beside.mounts,
            adapters=beside.adapters,
            fixed=_fixed(beside),
            devices=place.fit.names if place.fit else (),
        )
        said = (place.fit.note if place.fit else "", build.note)
        return Plan(
            spec=spec,
            context=place.context,
            memory=place.needed.total,
            devices=place.fit.devices if place.fit else {},
            notes=(*template.notes, *(note for note in said if note)),
        )

    def _mode(self, settings: dict[str, Any], request: PlanRequest) -> dict[str, Any]:
        """Embeddings are always offered beside chat; rerank is a mode of its own."""
        mode: dict[str, Any] = {}
        if settings.pop("rerank", False):
            mode |= {"embedding": True, "pooling_type": "LLAMA_POOLING_TYPE_RANK"}
        elif settings.get("embedding", True) and not request.metadata.get("pooling"):
            mode |= {"embedding": True, "pooling_type": "LLAMA_POOLING_TYPE_MEAN"}
        elif settings.get("embedding", True):
            mode |= {"embedding": True}
        names = {f.name for f in request.files}
        projector = next((f.name for f in request.files if f.role == "mmproj"), None)
        if projector and "mmproj" not in settings:
            mode["mmproj"] = projector
        wanted = [settings["mmproj"]] if "mmproj" in settings else []
        wanted += [a["file"] for a in settings.get("lora", ())]
        for file in wanted:
            if file not in names:
                raise UsageError(
                    f"the model '{request.model}' has no file '{file}'", hint=f"It has: {', '.join(sorted(names))}."
                )
        return mode

    def _on_cpu(self, request: PlanRequest, asked: int, sizing: dict[str, Any], outputs: int) -> _Place:
        context = self._context(request, asked, sizing)
        needed = estimate(request.metadata, context=context, **sizing)
        widest: dict[str, Any] = {**sizing, "outputs": outputs}
        return _Place(context, needed, estimate(request.metadata, context=context, **widest).total)

    def _context(self, request: PlanRequest, asked: int, sizing: dict[str, Any]) -> int:
        trained = int(request.metadata.get("context_length") or 0) or self._max_context
        if asked:
            return asked
        limit = min(trained, self._max_context)
        if not request.free_memory:
            return limit
        fits = fit_context(request.metadata, free=request.free_memory, limit=limit, **sizing)
        if fits < min(SMALLEST, limit):
            smallest = min(SMALLEST, limit)
            needed = estimate(request.metadata, context=smallest, **sizing)
            raise _too_large(request.model, needed, smallest, request.free_memory)
        return fits

    def _spec(self, request: PlanRequest, engine: dict[str, Any], most: int, build: Build = CPU) -> LaunchSpec:
        """``most``: bytes that no request may exceed."""
        pins = build.requirements(engine_version())
        recipe = ImageRecipe(self.name, self._base_image, pins, serving.files(ENTRY))
        environment = build.environment(engine_version(), self._index)
        if environment is not None:
            recipe = msgspec.structs.replace(recipe, glibc=GLIBC, index=environment.index)
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=serving.command(engine),
            model_dir=str(request.model_dir),
            entry=str(ENTRY),
            environment=environment,
            image=recipe,
            limits=Limits(memory=most * 5 // 4 + 512 * MIB),
            env=serving.ENV,
        )


def _sizing(
    request: PlanRequest, settings: Mapping[str, Any], mode: Mapping[str, Any], parallel: int, *, gpu: bool
) -> dict[str, Any]:
    """What ``estimate`` wants to know."""
    alone = not gpu and settings.get("n_gpu_layers", 0) in (0, -1)
    return {
        "cache_type_k": _cache(settings.get("cache_type_k")),
        "cache_type_v": _cache(settings.get("cache_type_v")),
        "parallel": parallel,
        "batch": int(settings.get("n_batch", 2048)),
        "ubatch": _ubatch(settings, mode, parallel),
        "projector": sum(f.size for f in request.files if f.role == "mmproj"),
        "flash_attention": settings.get("flash_attn_type") != "LLAMA_FLASH_ATTN_TYPE_DISABLED",
        "checkpoints": max(0, int(settings.get("n_ctx_checkpoints", CHECKPOINTS))),
        "processor": request.processor if alone else frozenset[str](),
    }


def _reserved(settings: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    """What ``offload`` wants to know beside that."""
    return {"reserved": outputs, "cache": not settings.get("no_kv_offload", False)}


def _on_gpu(request: PlanRequest, wishes: Wishes, sizing: Mapping[str, Any], asked: int, limit: int) -> _Place | None:
    found = fit(request, wishes, sizing, asked, limit)
    if found is None:
        return None
    needed = found.parts.host
    logits = 4 * int(request.metadata.get("vocab_size") or 0) * sizing["reserved"]  # of a whole text to embed
    return _Place(found.context, needed, needed.total + logits, found)


def _outputs(request: PlanRequest, mode: dict[str, Any], sizing: Mapping[str, Any]) -> int:
    """Tokens whose logits may be worked out at once: a model that writes does so for all of a text to embed."""
    return sizing["ubatch"] if mode.get("embedding") and not request.metadata.get("pooling") else 0


def _fixed(beside: Companions) -> tuple[tuple[int, float], ...]:
    """The LoRAs that count for every request."""
    return tuple((at, float(a["scale"])) for at, a in enumerate(beside.settings.get("lora", ())) if "beside" not in a)


def _work(mode: dict[str, Any], request: PlanRequest) -> tuple[str, ...]:
    """The operations that the model is for: a reranker only ranks, an encoder only embeds, all others write."""
    if mode.get("pooling_type") == "LLAMA_POOLING_TYPE_RANK":
        return ("llamacpp-rerank",)
    embeds = ("embeddings",) if mode.get("embedding") else ()
    return embeds if embeds and request.metadata.get("pooling") else ("chat", "completions", *embeds)


def _too_large(model: str, needed: Estimate, context: int, free: int) -> OutOfMemory:
    parts = {"weights": needed.weights, "KV cache": needed.kv_cache, "compute": needed.compute}
    return serving.too_large(
        model,
        {**parts, "the rest": needed.total - sum(parts.values())},
        free,
        hint="Try a smaller --context, a smaller quantization, --option cache-type-k=q8_0, or stop another model.",
        context=context,
        **needed.to_dict(),
    )


def _ubatch(settings: Mapping[str, Any], mode: Mapping[str, Any], parallel: int) -> int:
    """Tokens that are worked through at a time. Where means are taken over them, llama.cpp ends if slots do not part
    them evenly.
    """
    wanted = min(int(settings.get("n_ubatch", UBATCH)), int(settings.get("n_batch", 2048)))
    return max(1, wanted // parallel) * parallel if mode.get("embedding") else wanted


def _cache(member: str | None) -> str:
    return (member or "GGML_TYPE_F16").removeprefix("GGML_TYPE_").lower()


def _gguf(files: tuple[ModelFile, ...]) -> list[str]:
    """The names of the weights that llama.cpp reads."""
    return [f.name for f in files if f.role == "weights" and f.format in ("gguf", "")]


def _weights(files: tuple[ModelFile, ...]) -> str:
    """The weights' file, of several shards the first."""
    return min(_gguf(files))


def make(settings: Settings) -> LlamaCpp:
    """The engine as this installation has it."""
    return LlamaCpp(settings.runtime.base_image, settings.engine.max_context, settings.engine.llamacpp_index or INDEX)
