"""Engine images: pulled bases, built on first use without any network, named by the hash of what they are made of."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from pierhead.config import RuntimeSettings
from pierhead.engines import serving
from pierhead.engines.base import ImageRecipe
from pierhead.errors import RuntimeUnavailable, SourceUnavailable
from pierhead.events import BuildProgress, Listener
from pierhead.runtimes.docker_api import Engine, Refused
from pierhead.runtimes.docker_context import DOCKERFILE, LAUNCHER, gather, write_context
from pierhead.runtimes.lock import locked

RECIPE_VERSION = 2
LABEL = "ai.pierhead.engine-image"
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class ImageName(msgspec.Struct, frozen=True):
    """A reference taken apart: ``registry``/``repository`` and either ``:tag`` or ``@digest``."""

    registry: str
    repository: str
    suffix: str

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}{self.suffix}"


def parse_image(text: str) -> ImageName:
    """Take a reference apart as Docker does: ``python`` is ``docker.io/library/python:latest``."""
    first, slash, rest = text.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, rest = "docker.io", text
    name, at, digest = rest.partition("@")
    repository, _, tag = name.partition(":")
    if first in ("docker.io", "index.docker.io"):
        first = "docker.io"
        repository = repository if "/" in repository else f"library/{repository}"
    return ImageName(first, repository, f"@{digest}" if at else f":{tag or 'latest'}")


def image_name(recipe: ImageRecipe, machine: str) -> str:
    """The local name of the image that ``recipe`` makes: the same inputs give the same name."""
    made_of = {name: value for name, value in msgspec.to_builtins(recipe).items() if name != "index" or value}
    inputs: list[Any] = [RECIPE_VERSION, made_of, machine, DOCKERFILE, LAUNCHER]
    return f"pierhead/engine-{recipe.engine}:{hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()[:12]}"


def with_python(base: str, version: str) -> str:
    """The base image with another Python: the same name with that version; RuntimeUnavailable where it has none.

    ``python:3.11-slim-bookworm`` becomes ``python:3.13-slim-bookworm``.
    """
    if version in ("", serving.python_of(base)):
        return base
    found = serving.VERSION.search(base)
    if found is None:
        raise RuntimeUnavailable(
            f"this model needs Python {version}, and the base image {base} does not say which it has",
            hint=f'Use `--runtime process`, or name one: runtime.base_image = "python:{version}-slim-bookworm".',
        )
    return f"{base[: found.start()]}:{version}{base[found.end() :]}"


class Images:
    """Makes and finds engine images on one Engine; ``folder`` holds the lock that concurrent builds share."""

    def __init__(self, engine: Engine, settings: RuntimeSettings, folder: Path) -> None:
        self._engine = engine
        self._settings = settings
        self._folder = folder

    @property
    def machine(self) -> str:
        """The Engine's CPU, as in ``uname -m``."""
        found = str(self._engine.info.get("Architecture", ""))
        return MACHINES.get(found, found)

    def resolve(self, recipe: ImageRecipe) -> ImageRecipe:
        """``recipe`` with the configured base and its Python filled in."""
        base = with_python(str(parse_image(recipe.base or self._settings.base_image)), recipe.python)
        return msgspec.structs.replace(recipe, base=base, python=serving.python_of(base))

    async def find(self, name: str) -> str | None:
        """The id of a local image."""
        try:
            with self._engine.refusals("look for an image", passing=(404,)):
                found: dict[str, Any] = await self._engine.docker.images.inspect(name)
        except Refused:
            return None
        return str(found["Id"])

    async def of(self, recipe: ImageRecipe) -> str | None:
        """The id of the image of ``recipe``, if it is here."""
        return await self.find(image_name(self.resolve(recipe), self.machine))

    async def ensure(self, recipe: ImageRecipe, listener: Listener) -> str:
        """The id of the image of ``recipe``, built if need be; callers at the same time share one build."""
        recipe = self.resolve(recipe)
        name = image_name(recipe, self.machine)
        if found := await self.find(name):
            return found
        async with locked(self._folder / ".images.lock"):
            return await self.find(name) or await self._build(recipe, name, listener)

    async def _build(self, recipe: ImageRecipe, name: str, listener: Listener) -> str:
        base = await self.base(recipe.base, lambda step, done, total: listener(_progress(name, step, done, total)))
        listener(BuildProgress(image=name, step=f"collecting {', '.join(recipe.requirements) or 'files'}"))
        with tempfile.TemporaryDirectory(prefix="pierhead-image-") as work:
            site, context = Path(work) / "site", Path(work) / "context.tar"
            site.mkdir()
            await asyncio.to_thread(gather, recipe, self.machine, site)
            size = await asyncio.to_thread(write_context, recipe, base, self.machine, site, context)
            listener(BuildProgress(image=name, step="building the image"))
            await self._send(name, recipe, context, size, listener)
        made = await self.find(name)
        if made is None:
            raise RuntimeUnavailable(f"Docker built {name} but does not have it", hint="Try again.")
        listener(BuildProgress(image=name, step="done", done=1, total=1))
        return made

    async def _send(self, name: str, recipe: ImageRecipe, context: Path, size: int, listener: Listener) -> None:
        labels = {LABEL: recipe.engine, f"{LABEL}.base": recipe.base}
        params = {"t": name, "networkmode": "none", "rm": "1", "forcerm": "1", "labels": _json(labels)}
        headers = {"Content-Type": "application/x-tar", "Content-Length": str(size)}
        with self._engine.refusals("build the engine image"), context.open("rb") as data:
            try:
                async for item in self._engine.progress("build", params, data, headers):
                    if text := str(item.get("stream", "")).strip():
                        listener(BuildProgress(image=name, step=text[:200]))
            except TimeoutError as exc:
                raise RuntimeUnavailable(f"the build of {name} stalled", hint="See the Docker Engine's log.") from exc

    async def base(self, reference: str, report: Report) -> str:
        """The id of a base image: the local one, else pulled from the mirrors of its registry in their order."""
        if found := await self.find(reference):
            return found
        wanted = parse_image(reference)
        places = [*self._settings.mirrors.get(wanted.registry, ()), wanted.registry]
        failures: list[str] = []
        for place in places:
            source = f"{place}/{wanted.repository}{wanted.suffix}"
            try:
                await self._pull(source, report)
            except (Refused, TimeoutError) as exc:
                failures.append(f"{source}: {self._reason(place, exc)}")
                continue
            return await self._keep(source, wanted)
        raise SourceUnavailable(
            f"the image {reference} could not be pulled ({'; '.join(failures)})",
            hint=f'Name a registry that has it: runtime.mirrors = {{"{wanted.registry}" = ["registry.example:5000"]}}, '
            "choose another runtime.base_image, or bring it in with `docker load`.",
        )

    async def _pull(self, source: str, report: Report) -> None:
        name = parse_image(source)
        suffix = name.suffix[1:]
        params = {"fromImage": f"{name.registry}/{name.repository}", "tag": suffix}
        layers: dict[str, tuple[int, int]] = {}
        report(f"pulling {source}", 0, 0)
        with self._engine.refusals("pull", passing=tuple(range(600))):
            async for item in self._engine.progress("images/create", params, headers={"Content-Type": "text/plain"}):
                detail: dict[str, Any] = item.get("progressDetail") or {}
                if detail.get("total") and item.get("status") == "Downloading":
                    layers[str(item.get("id"))] = (int(detail.get("current", 0)), int(detail["total"]))
                    done, total = (sum(v[i] for v in layers.values()) for i in (0, 1))
                    report(f"pulling {source}", done, total)

    async def _keep(self, source: str, wanted: ImageName) -> str:
        """Give what came from a mirror the name that it was asked for by."""
        found = await self.find(source)
        if found is None:
            raise RuntimeUnavailable(f"Docker pulled {source} but does not have it", hint="Try again.")
        if wanted.suffix.startswith(":") and source != str(wanted):
            with self._engine.refusals("tag the base image"):
                repository = f"{wanted.registry}/{wanted.repository}"
                await self._engine.docker.images.tag(found, repo=repository, tag=wanted.suffix[1:])
        return found

    def _reason(self, place: str, exc: Exception) -> str:
        said = str(exc).strip() or "no answer in time"
        if place in self._settings.insecure_registries and "HTTP response to HTTPS client" in said:
            said += f' (the Engine itself must allow it: "insecure-registries": ["{place}"] in its daemon.json)'
        return said[:500]

    async def prune(self, keep: tuple[ImageRecipe, ...] = ()) -> list[str]:
        """Remove engine images that nothing uses and that are not of ``keep``; returns their names."""
        kept = {image_name(self.resolve(r), self.machine) for r in keep}
        gone: list[str] = []
        with self._engine.refusals("list images"):
            found: list[dict[str, Any]] = await self._engine.docker.images.list(filters={"label": [LABEL]})
        for image in found:
            names: list[str] = image.get("RepoTags") or []
            if kept.intersection(n.removeprefix("docker.io/") for n in names):
                continue
            with contextlib.suppress(Refused), self._engine.refusals("remove an image", passing=(404, 409)):
                for name in names or [str(image["Id"])]:
                    await self._engine.docker.images.delete(name)
                    gone.append(name)
        return gone


class Report(Protocol):
    """What ``Images.base`` tells: a step, bytes done and bytes in all."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def _progress(image: str, step: str, done: int, total: int) -> BuildProgress:
    return BuildProgress(image=image, step=step, done=done, total=total)


def _json(value: Mapping[str, str]) -> str:
    return msgspec.json.encode(value).decode()
