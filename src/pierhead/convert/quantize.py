"""A model of the store becomes a smaller one: quantized, measured and committed; draws nothing."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pierhead.convert.job import Job, Workshop
from pierhead.convert.types import TYPES, WHOLE, known
from pierhead.engines.base import Environment
from pierhead.errors import EngineFailed, OutOfSpace, UsageError
from pierhead.events import AnyEvent, Listener, Note
from pierhead.package.build import package
from pierhead.package.inputs import Input, Inputs
from pierhead.package.recipe import Recipe
from pierhead.store.layout import Store
from pierhead.store.media import HEAVY, MADE_BY, UNSAFE
from pierhead.store.model import ModelFile, ModelRecord

# llama-quantize itself, by the author of most of its types, in a wheel for old and new systems on x86-64 and Arm.
PACKAGE = "ik-llama-cpp-python==0.1.5"
ENVIRONMENT = Environment((PACKAGE,))
_BASE_NAME, _BASE_DIGEST = "org.opencontainers.image.base.name", "org.opencontainers.image.base.digest"
_CONTEXT, _WINDOWS = 512, 40
Tell = Callable[[str, str, float], None]  # step, what of it, share


@dataclass(frozen=True)
class Wish:
    """What is asked for; ``text`` None: no perplexity. ``created`` is RFC 3339."""

    name: str
    type: str
    created: str
    text: str | None = None
    imatrix: Path | None = None
    allow_requantize: bool = False
    pure: bool = False
    keep_output: bool = False
    threads: int = 1


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What came out. Sizes are bytes of weights, ``bits`` per weight; perplexities are None where none were measured.

    ``perplexity_error`` is the standard error of the change of its logarithm; ``same_top`` how often both models think
    the same token likeliest.
    """

    name: str
    digest: str
    type: str
    size_before: int
    size_after: int
    bits_before: float
    bits_after: float
    tensors: int
    fallbacks: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_error: float | None = None
    perplexity_tokens: int = 0
    same_top: float | None = None


async def quantize(store: Store, shop: Workshop, base: ModelRecord, wish: Wish, listener: Listener, tell: Tell) -> Made:
    """Quantize ``base`` as the wish says; nothing is left of it unless it is committed.

    UsageError for a model or type that cannot be, OutOfSpace before any work, EngineFailed with the quantizer's reason.
    """
    weights = _weights(base, wish)
    async with at_work(store, "quantize", base) as (source, out):
        _room(out, base, wish)
        told = _told(wish, weights[0].name, out)
        job = Job("quantize.py", "llama-quantize", ENVIRONMENT, told)
        found = await shop.run(job, source, out, listener, lambda what, share: tell("Quantizing", what, share))
        measured = await _perplexity(shop, job, source, out, wish, listener, tell)
        record = await asyncio.to_thread(_commit, store, base, wish, out / told["out"], listener)
    count = float(base.metadata.get("parameters") or 0)
    sizes = sum(f.size for f in weights), sum(f.size for f in record.laid_out if f.role == "weights")
    bits = [round(8 * size / count, 3) if count else 0.0 for size in sizes]
    return Made(
        name=wish.name,
        digest=record.digest,
        type=wish.type,
        size_before=sizes[0],
        size_after=sizes[1],
        bits_before=bits[0],
        bits_after=bits[1],
        tensors=int(found.get("tensors", 0)),
        fallbacks=int(found.get("fallbacks", 0)),
        **measured,
    )


@contextlib.asynccontextmanager
async def at_work(store: Store, work: str, source: ModelRecord | Path) -> AsyncGenerator[tuple[Path, Path]]:
    """The folder of a model, which stays whoever removes the model meanwhile, and one for what is made of it."""
    kept = contextlib.ExitStack()
    try:
        if isinstance(source, ModelRecord):
            await asyncio.to_thread(kept.enter_context, store.hold(source.digest))
            source = await asyncio.to_thread(store.materialize, source)
        yield source, await asyncio.to_thread(kept.enter_context, store.scratch(work))
    finally:
        await asyncio.to_thread(kept.close)


def _weights(base: ModelRecord, wish: Wish) -> list[ModelFile]:
    """The files to quantize, the first part first."""
    known(wish.type, matrix=wish.imatrix is not None)
    weights = sorted((f for f in base.laid_out if f.role == "weights"), key=lambda f: f.name)
    formats = {f.format for f in weights}
    if formats != {"gguf"}:
        raise UsageError(
            f"'{base.name}' is not in GGUF but in {', '.join(sorted(formats)) or 'no form of weights'}",
            hint=f"Make one first: pier convert {base.name} NAME --to gguf",
        )
    now = str(base.metadata.get("quantization") or "")
    if now and now.upper() not in WHOLE and not wish.allow_requantize:
        raise UsageError(
            f"'{base.name}' is quantized already ({now}); doing it again loses more than doing it once",
            hint="Take the model in F16 or BF16, or give --allow-requantize.",
        )
    return weights


def _room(folder: Path, base: ModelRecord, wish: Wish) -> None:
    count = float(base.metadata.get("parameters") or 0)  # twice: as it is made, and where the store copies it to
    need, free = int(count * TYPES[wish.type][0] / 8 * 2.2), shutil.disk_usage(folder).free
    if need > free:
        raise OutOfSpace(
            f"the new model needs about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="`pier prune --all` frees what nothing needs.",
        )


def _told(wish: Wish, file: str, out: Path) -> dict[str, Any]:
    matrix = ""
    if wish.imatrix is not None:
        matrix = "imatrix" + wish.imatrix.suffix
        shutil.copyfile(wish.imatrix, out / matrix)
    return {
        "do": "quantize",
        "file": file,
        "out": f"model-{wish.type}.gguf",
        "type": wish.type,
        "threads": wish.threads,
        "allow_requantize": wish.allow_requantize,
        "pure": wish.pure,
        "keep_output": wish.keep_output,
        "imatrix": matrix,
    }


async def _perplexity(
    shop: Workshop, job: Job, source: Path, out: Path, wish: Wish, listener: Listener, tell: Tell
) -> dict[str, Any]:
    """What quantizing cost; a model that cannot be measured is quantized all the same."""
    if wish.text is None:
        return {}
    await asyncio.to_thread((out / "text").write_text, wish.text, encoding="utf-8")
    more = {"do": "perplexity", "text": "text", "context": _CONTEXT, "windows": _WINDOWS}
    measure = Job(job.script, job.name, job.environment, {**job.told, **more})
    try:
        found = await shop.run(measure, source, out, listener, lambda what, share: tell("Measuring", what, share))
    except EngineFailed as exc:
        listener(Note(message=f"perplexity was not measured: {exc.message}", level="warning"))
        return {}
    return {
        "perplexity_before": round(found["before"], 4),
        "perplexity_after": round(found["after"], 4),
        "perplexity_error": round(found["error"], 5),
        "perplexity_tokens": found["tokens"],
        "same_top": round(found["same_top"], 4),
    }


def _commit(store: Store, base: ModelRecord, wish: Wish, file: Path, listener: Listener) -> ModelRecord:
    """The new weights with everything else that the model had: licence, template, projector, settings."""
    others = [
        Input(store.blob_path(f.digest), f.name, f.role, f.format, f.scale, f.digest)
        for f in base.laid_out
        if f.role != "weights" and f.digest
    ]
    files = (Input(file, file.name, "weights", "gguf"), *others)
    made_by = f"llama-quantize {wish.type}, {PACKAGE}"
    return package(store, recipe(base, wish.name, wish.created, files, made_by), warnings_of(listener))


def warnings_of(listener: Listener) -> Listener:
    """All but notes that say how the store took the files in: they were ours, and go again."""

    def heard(event: AnyEvent) -> None:
        if not isinstance(event, Note) or event.level == "warning":
            listener(event)

    return heard


def recipe(base: ModelRecord, name: str, created: str, files: tuple[Input, ...], made_by: str) -> Recipe:
    """What was made out of ``base``, with its settings and where it came from."""
    about = {_BASE_NAME: base.name, _BASE_DIGEST: base.digest, MADE_BY: made_by}
    if UNSAFE in base.annotations:
        about[UNSAFE] = base.annotations[UNSAFE]
    folder = any(f.role not in HEAVY | {"license", "template"} for f in files)
    return Recipe(
        name=name,
        base=Inputs(files, folder=folder),
        created=created,
        packaged=base.packaged,
        allow_unsafe=UNSAFE in base.annotations,
        annotations=about,
    )
