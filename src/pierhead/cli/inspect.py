"""The verb inspect: what a model is, in the store or at its source, and what memory it needs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import nearest, open_store
from pierhead.cli.output import age, here, number, pairs, print_json, settings, several, size
from pierhead.cli.planned import planned
from pierhead.engines.llamacpp import CHECKPOINTS, UBATCH
from pierhead.errors import NotFound, PierError
from pierhead.fleet.memory import processor_features
from pierhead.formats.estimate import estimate
from pierhead.formats.offload import offload
from pierhead.formats.pictures_estimate import estimate as estimate_picture
from pierhead.formats.pictures_estimate import usual_pixels
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.store.media import SETTINGS, SOURCE

_NEED = "Memory estimate"
_PARTS = {"weights": "weights", "kv_cache": "KV cache", "compute": "compute", "overhead": "program"}
_BESIDE = {"repacked": "weights repacked for the processor", "checkpoints": "checkpoints"}


@click.command(
    cls=Verb,
    examples=(
        ("pier inspect smollm2 --context 8192", "What the model in the store needs for this context."),
        ("pier inspect hf:Qwen/Qwen3-0.6B-GGUF:Q8_0", "Look before pulling: only the header is fetched."),
        ("pier inspect -r ghcr.io/team/model:1.0", "What a registry has, with digest, layers and annotations."),
    ),
)
@click.argument("model", shell_complete=complete_model)
@option("--context", type=click.IntRange(1), metavar="TOKENS", section=_NEED, help="Tokens that one request may use.")
@option(
    "--parallel",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    section=_NEED,
    help="Slots: requests at a time.",
)
@option(
    "--cache-type",
    default="f16",
    show_default=True,
    metavar="TYPE",
    section=_NEED,
    help="KV cache: f16, q8_0, …",
)
@option("-r", "--remote", is_flag=True, help="Look at the source even if the model is in the store.")
@option("--check", is_flag=True, help="Ask the source whether the model in the store is still the newest.")
@option("--attestations", is_flag=True, help="Also list what is attached: signatures, SBOMs, provenance.")
@json_option
def inspect(
    model: str,
    context: int | None,
    parallel: int,
    cache_type: str,
    remote: bool,
    check: bool,
    attestations: bool,
    as_json: bool,
) -> None:
    """Show what a model is and what memory it needs.

    A reference that is not in the store is read at its source by range requests; nothing is pulled. The estimate is for
    the context that the model was packaged with, else its own, at most 8,192 tokens; --context names another.
    """
    paths = here()
    found = _remote(paths, model) if remote else look(paths, model)
    freshness = _freshness(paths, found, check)
    summary: dict[str, Any] = found["metadata"]
    told: dict[str, Any] = found.get("memory") or {}
    packaged: dict[str, Any] = found.get("packaged") or {}
    tokens = context or int(packaged.get("context") or 0) or min(int(summary.get("context_length") or 4096), 8192)
    need: dict[str, Any] = {}
    sizes: dict[str, Any] = {"context": context, "parallel": parallel}
    if summary.get("type") == "diffusion":
        pixels = usual_pixels(str(summary.get("architecture")))
        need = {"pixels": pixels, **estimate_picture(summary, pixels=pixels).to_dict()}
    elif found.get("names") and summary.get("format") != "gguf" and (plan := planned(paths, model, **sizes)):
        need = plan
    elif summary.get("weights_bytes"):
        asked = _asked(found, context=tokens, parallel=parallel, cache_type=cache_type)
        sizing = estimate(summary, **asked, processor=processor_features())
        need = {"context": tokens, "parallel": parallel, "cache_type": cache_type, **sizing.to_dict()}
        need |= _on_gpu(summary, asked)
    elif all(isinstance(told.get(key), int) for key in (*_PARTS, "context", "total")):  # as it was packaged
        need = {key: told[key] for key in (*_PARTS, "context", "total")} | {"parallel": 1, "cache_type": "f16"}
    said = _attached(model, remote) if attestations else {}
    said["peaks"] = _peaks(paths, str(found.get("digest") or ""))
    if as_json:
        print_json({**found, "estimate": need, **freshness, **said})
        return
    _show({**found, **freshness, **said}, summary, need)


def _asked(found: dict[str, Any], *, context: int, parallel: int, cache_type: str) -> dict[str, Any]:
    """What both estimates of a GGUF model are asked for."""
    return {
        "context": context,
        "parallel": parallel,
        "cache_type_k": cache_type,
        "cache_type_v": cache_type,
        "extra_weights": _total(found, "lora", "draft"),
        "projector": _total(found, "mmproj"),
        "checkpoints": CHECKPOINTS,
    }


def _on_gpu(summary: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """With every layer of a GGUF model on a GPU: what is needed there, and of the machine's own memory."""
    if summary.get("format") != "gguf" or not summary.get("layers"):
        return {}
    layers, reserved = int(summary["layers"]) + 1, 0 if summary.get("pooling") else UBATCH
    parts = offload(summary, layers=layers, **asked, reserved=reserved)
    return {"gpu": {"layers": parts.layers, **parts.gpu.to_dict(), "host": parts.host.total}}


def _peaks(paths: Paths, digest: str) -> list[dict[str, Any]]:
    """What replicas of this model were seen to use on this machine."""
    import msgspec

    from pierhead.fleet.peaks import Peaks

    return [msgspec.to_builtins(peak) for peak in Peaks(paths.state / "memory-peaks.json").of_model(digest)[:5]]


def _attached(model: str, remote: bool) -> dict[str, Any]:
    """What is attached to the model, in the store or in its registry."""
    from pierhead.cli.signing import attached

    where = str(parse(model)) if remote else model
    return {"attestations": asyncio.run(attached(where))}


def _freshness(paths: Paths, found: dict[str, Any], check: bool) -> dict[str, Any]:
    """For a model of the store: ``state``, ``newest`` and ``checked``; nothing for one at its source."""
    from pierhead.cli.listing import ask, states

    if not found.get("digest") or not found.get("names"):
        return {}
    store = open_store(paths)
    try:
        record = store.get(found["names"][0])
    except NotFound:
        return {}
    return states(store, [record], ask(paths, store, [record]) if check else {})[record.digest]


def look(paths: Paths, model: str) -> dict[str, Any]:
    """What a model is, in the store or else at its source."""
    try:
        import msgspec

        made: dict[str, Any] = msgspec.to_builtins(open_store(paths).get(model))
        return made
    except NotFound as missing:
        try:
            reference = parse(model)
            return _remote(paths, str(reference))
        except NotFound as exc:
            raise nearest(exc, missing) from exc
        except PierError as exc:
            raise exc from missing


def _remote(paths: Paths, model: str) -> dict[str, Any]:
    from pierhead.sources.pull import inspect_remote

    return asyncio.run(inspect_remote(model, settings=settings(paths).settings.sources, paths=paths))


def _total(found: dict[str, Any], *roles: str) -> int:
    """Bytes of the model's files in these roles."""
    return sum(int(f["size"]) for f in found.get("files", ()) if f.get("role") in roles)


def _files(files: Sequence[dict[str, Any]]) -> list[str]:
    """Each file's name, size and role, aligned."""
    longest = max((len(f["name"]) for f in files), default=0)
    widest = max((len(size(f["size"])) for f in files), default=0)
    return [f"{f['name']:<{longest}}  {size(f['size']):>{widest}}  {_role(f)}" for f in files]


def _values(values: Sequence[dict[str, Any]] | None) -> str:
    """Inputs or outputs of a graph: names with types and shapes."""
    return "\n".join(f"{v['name']}: {v['type']}[{', '.join(map(str, v['shape']))}]" for v in (values or ())[:20])


def _role(file: dict[str, Any]) -> str:
    """What a file is for, and how strongly a LoRA counts."""
    scale = file.get("scale", 1.0)
    return str(file.get("role", "")) + (f" × {scale:g}" if scale != 1.0 else "")


def _settings(packaged: dict[str, Any]) -> str:
    """How the model is to run, a line for each setting."""
    lines = [f"context {packaged['context']:,} tokens"] if packaged.get("context") else []
    options: dict[str, Any] = packaged.get("options") or {}
    lines += [f"{name} = {value}" for name, value in options.items()]
    if packaged.get("system"):
        lines.append(f"system prompt: {packaged['system']}")
    if packaged.get("messages"):
        lines.append(f"{several(len(packaged['messages']), 'message')} before a chat")
    return "\n".join(lines)


def _layers(layers: Sequence[dict[str, Any]]) -> list[str]:
    """Each layer's digest, size and media type, aligned."""
    widest = max((len(size(x["size"])) for x in layers), default=0)
    return [f"{x['digest'][:19]}  {size(x['size']):>{widest}}  {x['media_type']}" for x in layers]


def _annotations(found: dict[str, Any]) -> str:
    """A line for each annotation, without those that other rows tell."""
    told = {SETTINGS, SOURCE} if found.get("source") else {SETTINGS}
    return "\n".join(f"{k}: {v}" for k, v in sorted(found.get("annotations", {}).items()) if k not in told)


def _statement(one: dict[str, Any]) -> str:
    """One thing that is attached."""
    return f"{one['digest'][:19]}  {one['what']}, {'signed' if one['signed'] else 'not signed'}"


def _checked(found: dict[str, Any]) -> str:
    """When the source was last asked, and what it said."""
    state, newest = found.get("state", ""), str(found.get("newest") or "")
    said = {
        "stale": f"the source has another version, {newest[:19]}: `pier pull {(found.get('names') or [''])[0]}`",
        "gone": "the source does not have it any more",
        "unknown": str(found.get("reason") or ""),
        "fixed": "nothing that could change",
    }.get(state, state)
    when = age(found["checked"]) if found.get("checked") else ""
    return ": ".join(text for text in (when, said) if text)


def _at(context: int) -> str:
    return f" at {context:,} tokens" if context else ""


def _tokens(need: Mapping[str, Any]) -> str:
    slots = f" × {need['parallel']}" if need["parallel"] else ""
    tokens = f"{_at(need['context'])}{slots}" if need["context"] else ""
    by = f", by {need['engine']}" if "engine" in need else f", {need['cache_type']} cache"
    return f"{size(need['total'])}{tokens}{by}"


def _show(found: dict[str, Any], summary: dict[str, Any], need: dict[str, Any]) -> None:
    rows = [("Name", ", ".join(found.get("names") or [found.get("name", "")]))]
    if found.get("digest"):
        rows.append(("Digest", found["digest"]))
    rows += [
        ("Source", found.get("source", "")),
        ("Checked", _checked(found)),
        ("Format", f"{summary.get('format', '')} {summary.get('version') or ''}".strip()),
        ("Architecture", str(summary.get("architecture") or "")),
        ("Parameters", number(summary.get("parameters"))),
        ("Quantization", str(summary.get("quantization") or "")),
        ("Context length", f"{summary['context_length']:,} tokens" if summary.get("context_length") else ""),
        (
            "Layers",
            f"{summary['layers']}, embedding {summary.get('embedding_length') or 0}" if summary.get("layers") else "",
        ),
        ("Inputs", _values(summary.get("inputs"))),
        ("Outputs", _values(summary.get("outputs"))),
        ("Licence", str(summary.get("license") or "not stated")),
        ("Chat template", "yes" if summary.get("chat_template") else "no"),
    ]
    rows.append(("Settings", _settings(found.get("packaged") or {})))
    rows.append(("Files", "\n".join(_files(found.get("files", ())))))
    rows.append(("Manifest", "\n".join(_layers(found.get("layers", ())))))
    rows.append(("Annotations", _annotations(found)))
    rows.append(("Attached", "\n".join(map(_statement, found.get("attestations", ())))))
    if need:
        head = f"{size(need['total'])} at {need['pixels']:,} pixels" if "pixels" in need else _tokens(need)
        told = {k: v for k, v in _PARTS.items() if k in need} | {k: v for k, v in _BESIDE.items() if need.get(k)}
        parts = ", ".join(f"{name} {size(need[key])}" for key, name in told.items())
        seen = [f"seen to use {size(p['memory'])}{_at(p['context'])}" for p in found.get("peaks", ())]
        gpu = need.get("gpu")
        also = [f"on a GPU {size(gpu['total'])}, and {size(gpu['host'])} of the machine's own"] if gpu else []
        rows.append(("Memory", "\n".join(line for line in (head, parts, *also, *seen) if line)))
    pairs([(name, value) for name, value in rows if value])
