"""The verb package: files, a folder, a Modelfile or another model become a model of the store; it needs no daemon."""

from __future__ import annotations

import asyncio
import datetime
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pierhead import events
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import fetch_missing, open_store
from pierhead.cli.output import here, say, settings, several, size, warn
from pierhead.cli.progress import bars
from pierhead.errors import BadReference, NotFound, UsageError
from pierhead.paths import Paths
from pierhead.store.model import ModelRecord

_SOURCE, _ADD, _HOW = "Source (one of them)", "What is added", "Artifact"
_PATH = click.Path(path_type=Path)
_EXAMPLES = (
    ("pier package ./model-Q4_K_M.gguf mine", "A file; the other parts of a split model are found beside it."),
    ("pier package ./my-model team/mine:1.0", "A folder with safetensors, ONNX or a model of your own."),
    ("pier package ./my_model.py mine", "A Python class with load and predict, and what it needs, pinned."),
    ("pier package --from smollm2 --lora style.gguf=0.8 smollm2-style", "Another model with a LoRA: only it is read."),
    ("pier package -f Modelfile mine", "As a Modelfile says."),
    ("pier package --from smollm2 --context-size 2048 --push localhost:5000/team/small:1", "To a registry at once."),
)


@click.command("package", cls=Verb, examples=_EXAMPLES)
@click.argument("names", nargs=-1, required=True, metavar="[SOURCE] NAME")
@option("--gguf", type=_PATH, metavar="PATH", section=_SOURCE, help="A GGUF file, or a folder with one model.")
@option("--safetensors-dir", type=_PATH, metavar="DIR", section=_SOURCE, help="A folder with safetensors.")
@option(
    "--onnx", type=_PATH, metavar="PATH", section=_SOURCE, help="An ONNX file with its weights beside it, or a folder."
)
@option("--dduf", type=_PATH, metavar="FILE", section=_SOURCE, help="A DDUF archive.")
@option("--dir", "folder", type=_PATH, metavar="DIR", section=_SOURCE, help="A folder of any model, as it is.")
@option("--python", "program", type=_PATH, metavar="PATH", section=_SOURCE, help="A .py file or folder with a class.")
@option(
    "--from",
    "base",
    metavar="MODEL",
    shell_complete=complete_model,
    section=_SOURCE,
    help="Another model; pulled if need be.",
)
@option(
    "-f", "--file", "modelfile", type=_PATH, metavar="MODELFILE", section=_SOURCE, help="A Modelfile (- reads stdin)."
)
@option("--lora", multiple=True, metavar="FILE[=SCALE]", section=_ADD, help="A LoRA in GGUF; repeatable.")
@option("--mmproj", type=_PATH, metavar="FILE", section=_ADD, help="A projector, for pictures.")
@option("--chat-template", type=_PATH, metavar="FILE", section=_ADD, help="A Jinja chat template.")
@option("--license", "licenses", type=_PATH, multiple=True, metavar="FILE", section=_ADD, help="A licence; repeatable.")
@option("--context-size", type=click.IntRange(1, 1 << 24), metavar="N", section=_ADD, help="Tokens of a request.")
@option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", section=_ADD, help="An engine parameter; repeatable."
)
@option(
    "--format",
    "shape",
    type=click.Choice(["docker", "docker-v0.1", "docker-v0.2", "cncf"]),
    section=_HOW,
    help="Whose artifact  [default: the base's own, else docker]",
)
@option(
    "--link", is_flag=True, section=_HOW, help="Hard-link weights instead of copying them; they must not change then."
)
@option("--no-lock", is_flag=True, section=_HOW, help="Do not look up exact versions of what a Python model needs.")
@option("--allow-unsafe", is_flag=True, section=_HOW, help="Take in files that would run code of their author.")
@option("--annotation", "annotations", multiple=True, metavar="K=V", section=_HOW, help="Of the manifest; repeatable.")
@option("--push", is_flag=True, section=_HOW, help="Send it to a registry afterwards; NAME says where.")
@json_option
def package(names: tuple[str, ...], as_json: bool, push: bool, **given: Any) -> None:
    """Make a model out of files, a folder, a Modelfile or another model.

    SOURCE is a file, a folder or a model; an option can say which kind it is. NAME is what the model is called in the
    store. With --from no weights are read, copied or hashed again. The same files give the same digest where
    SOURCE_DATE_EPOCH is set. With --json each line is one event.
    """
    paths = here()
    name = _one_source(names, given)
    target = _target(name) if push else None
    if as_json:
        record = _make(paths, name, given, _emit)
        _emit(events.PullDone(name=name, digest=record.digest, size=record.size))
        if target is not None:
            asyncio.run(_push(paths, name, target, _emit))
        return
    with bars() as listener:
        record = _make(paths, name, given, listener)
    say(f"Packaged {name}, {size(record.size)} in {several(len(record.files), 'file')}.")
    if target is not None:
        with bars() as listener:
            done = asyncio.run(_push(paths, name, target, listener))
        say(f"Pushed {done.name}, {size(done.sent)} sent." + ("" if done.sent else " The registry had everything."))
    click.echo(record.digest)


def _emit(event: events.AnyEvent) -> None:
    sys.stdout.write(events.encode(event).decode() + "\n")
    sys.stdout.flush()


def _one_source(names: tuple[str, ...], given: dict[str, Any]) -> str:
    """The name; a source that stands before it becomes one of the options."""
    kinds = ("gguf", "safetensors_dir", "onnx", "dduf", "folder", "program", "base", "modelfile")
    told = [kind for kind in kinds if given[kind] is not None]
    *before, name = names or ("",)
    given["source"] = before[0] if before else None
    if len(before) > 1 or len(told) + (given["source"] is not None) != 1:
        raise UsageError(
            "say what to package, once, and what to call it",
            hint="`pier package ./model.gguf NAME`, or one of --gguf, --safetensors-dir, --onnx, --python, --from …",
        )
    return name


def _target(name: str) -> Any:
    """The place in a registry that the name means."""
    from pierhead.refs import parse
    from pierhead.registry.name import image_name

    reference = parse(name)
    if reference.kind == "short" and "/" in reference.repo:
        reference = parse(f"oci://{reference}")
    if reference.kind != "oci":
        raise BadReference(
            f"'{name}' does not name a place in a registry", hint="Write HOST/REPOSITORY:TAG with --push."
        )
    return image_name(reference)


async def _push(paths: Paths, name: str, target: Any, listener: events.Listener) -> events.PushDone:
    from pierhead.registry.publish import push_model

    wanted = settings(paths).settings.sources
    return await push_model(open_store(paths), name, target, settings=wanted, env=os.environ, listener=listener)


def _make(paths: Paths, name: str, given: Mapping[str, Any], listener: events.Listener) -> ModelRecord:
    from pierhead.package.build import package as build

    with tempfile.TemporaryDirectory(prefix="pier-package-") as scratch:
        recipe = _recipe(paths, name, given, Path(scratch), listener)
        return build(open_store(paths), recipe, listener)


def _recipe(paths: Paths, name: str, given: Mapping[str, Any], scratch: Path, listener: events.Listener) -> Any:
    from pierhead.package.recipe import Recipe, merged, settings_of
    from pierhead.store.model import Packaged

    extras = _extras(given)
    packaged = Packaged()
    if given["modelfile"] is not None:
        from pierhead.package.apply import apply, read

        folder, written = read(given["modelfile"], template_elsewhere=given["chat_template"] is not None)
        base = _found(paths, written.source, folder, listener)
        more, packaged = apply(written, folder, scratch)
        alone = {extra.role for extra in extras} & {"template", "mmproj"}
        extras = (*(extra for extra in more if extra.role not in alone), *extras)
        packaged = merged(packaged, settings_of(_validated(paths, base, packaged.options)))
    elif given["base"] is not None:
        base = model_of(paths, given["base"], listener)
    elif (program := _program(given)) is not None:
        base = python_inputs(program, scratch, lock=not given["no_lock"])
    elif given["source"] is not None:
        base = _found(paths, given["source"], Path(), listener)
    else:
        base = _files(given)
    asked = settings_of(_validated(paths, base, _pairs(given["options"], "option")))
    asked = merged(asked, Packaged(context=given["context_size"] or 0))
    return Recipe(
        name=name,
        base=base,
        created=created(os.environ),
        extras=extras,
        packaged=merged(packaged, asked),
        format=given["shape"] or "",
        link=given["link"],
        allow_unsafe=given["allow_unsafe"],
        annotations=_pairs(given["annotations"], "annotation"),
    )


def _program(given: Mapping[str, Any]) -> Path | None:
    """The Python file or folder that is to be packaged, where it is one."""
    from pierhead.package.python_model import is_program

    if given["program"] is not None:
        return given["program"]
    path = Path(given["source"]).expanduser() if given["source"] else None
    return path if path is not None and path.exists() and is_program(path) else None


def python_inputs(
    path: Path, scratch: Path, *, lock: bool = True, pins: dict[tuple[str, ...], tuple[str, ...]] | None = None
) -> Any:
    """A Python model's files; its requirements are pinned unless that is not wanted (``pins``: see ``prepare``)."""
    from pierhead.engines.python import BOUNDS
    from pierhead.engines.python_settings import TABLE
    from pierhead.package.python_model import find, prepare, settings_of

    if not path.exists():
        raise NotFound(f"no such file or folder: {path}", hint="Check the path.")
    program = find(path)
    for name, close in program.served.misspelt.items():
        warn(f"{program.served.cls}.{name} means nothing to Pierhead. Did you mean {close}?")
    return prepare(program, TABLE.canonical(settings_of(program)), scratch, BOUNDS, lock=lock, pins=pins)


def _files(given: Mapping[str, Any]) -> Any:
    """The files behind the option that says of which kind they are."""
    from pierhead.package import inputs

    readers = {
        "gguf": inputs.gguf,
        "safetensors_dir": inputs.safetensors,
        "onnx": inputs.onnx,
        "dduf": inputs.detect,
        "folder": inputs.custom,
    }
    return next(reader(given[kind]) for kind, reader in readers.items() if given[kind] is not None)


def _extras(given: Mapping[str, Any]) -> tuple[Any, ...]:
    from pierhead.package import inputs

    found: list[Any] = []
    for text in given["lora"]:
        path, equals, scale = text.rpartition("=")
        path, scale = (path, scale) if equals and not Path(text).exists() else (text, "1")
        try:
            strength = float(scale)
        except ValueError as exc:
            raise UsageError(f"bad scale in --lora {text}", hint="Write --lora FILE=0.8.") from exc
        found.append(inputs.single(Path(path), "lora", format="gguf", scale=strength))
    if given["mmproj"] is not None:
        found.append(inputs.single(given["mmproj"], "mmproj", format="gguf"))
    if given["chat_template"] is not None:
        found.append(inputs.single(given["chat_template"], "template", name="template.jinja"))
    found += [inputs.single(path, "license") for path in given["licenses"]]
    return tuple(found)


def _found(paths: Paths, text: str, folder: Path, listener: events.Listener) -> Any:
    """What a word means: a path that is there, else a model."""
    from pierhead.package import inputs

    path = folder / Path(text).expanduser()
    if path.exists() or text.startswith(("./", "../", "/", "~")):
        return inputs.detect(path)
    try:
        return model_of(paths, text, listener)
    except NotFound as exc:
        if path.suffix[1:].isalpha():
            raise NotFound(f"there is no file and no model '{text}'", hint="Check the path.", data=exc.data) from exc
        raise


def model_of(paths: Paths, name: str, listener: events.Listener) -> ModelRecord:
    """A model of the store that may be used; pulled where it is not there."""
    from pierhead.trust.gate import Gate

    store = open_store(paths)
    try:
        found = store.get(name)
    except NotFound as missing:
        return fetch_missing(paths, name, missing, listener)
    for warning in Gate(paths.config).check_start(store, found):
        listener(events.Note(message=warning, level="warning"))
    return found


def _pairs(texts: tuple[str, ...], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"bad --{what} '{text[:80]}'", hint=f"Write --{what} KEY=VALUE.")
        found[key.strip()] = value
    return found


def _validated(paths: Paths, base: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the engine that will run the model understands them."""
    if not options:
        return {}
    from pierhead.engines.registry import choose, engines
    from pierhead.formats.reading import File
    from pierhead.formats.summarize import summarize

    if isinstance(base, ModelRecord):
        files, metadata = base.laid_out, base.metadata
    else:
        wanted = [File(f.name, f.path.stat().st_size, f.role, f.format) for f in base.files]
        files, metadata = base.files, summarize(wanted, {f.name: f.path for f in base.files})
    name = str(options.get("engine", ""))
    engine = choose(engines(settings(paths).settings), files, name, "this model", metadata)
    told = engine.validate({key: value for key, value in options.items() if key != "engine"})
    return ({"engine": name} if name else {}) | told


def created(env: Mapping[str, str]) -> str:
    """The time that the model bears: SOURCE_DATE_EPOCH's, else now."""
    given = env.get("SOURCE_DATE_EPOCH", "")
    if given:
        try:
            at = datetime.datetime.fromtimestamp(int(given), datetime.UTC)
        except (ValueError, OverflowError, OSError) as exc:
            raise UsageError(
                f"SOURCE_DATE_EPOCH is {given[:40]!r}, not a time", hint="Write seconds since 1970."
            ) from exc
    else:
        at = datetime.datetime.now(datetime.UTC)
    return at.replace(microsecond=0).isoformat().replace("+00:00", "Z")
