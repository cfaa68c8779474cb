"""Ollama's API for managing models, over the parts of the daemon; the gateway answers its requests for text.

Errors are ``{"error": text}``; a model that is not here is a 404, as Ollama's clients expect.
"""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pierhead import __version__
from pierhead.daemon import ollama_shapes as shapes
from pierhead.daemon.ollama_blobs import Arrivals
from pierhead.daemon.ollama_create import CreateRequest, recipe
from pierhead.daemon.ollama_progress import answer, respond, said
from pierhead.daemon.parts import Parts
from pierhead.daemon.streams import happenings
from pierhead.errors import BadReference, CorruptData, NotFound, PierError, UsageError
from pierhead.events import AnyEvent, Listener, PullDone, PullPlanned
from pierhead.fleet.info import ReplicaInfo
from pierhead.formats.gguf import read_file
from pierhead.gateway.managing import SCOPE
from pierhead.refs import parse
from pierhead.sources.catalog import Catalog
from pierhead.store.model import ModelRecord

SPOKEN = "0.13.5"  # the version of Ollama whose API this is: clients ask for one that is new enough
_MAX_BODY = 8 << 20
_MAX_TEXT = 1 << 20
log = logging.getLogger(__name__)
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class _Named(msgspec.Struct, kw_only=True):
    """A request about one model; ``name`` is the older word for ``model``."""

    model: str = ""
    name: str = ""
    stream: bool | None = None
    verbose: bool = False

    @property
    def wanted(self) -> str:
        found = self.model or self.name
        if not found:
            raise UsageError("model is required")
        return found


class _Copy(msgspec.Struct):
    source: str
    destination: str


class Ollama:
    """The handlers."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.arrivals = Arrivals(parts)

    def routes(self) -> list[Route]:
        """What is mounted in the control application."""
        table: tuple[tuple[str, list[str], Handler], ...] = (
            ("/api/version", ["GET", "HEAD"], self.version),
            ("/api/tags", ["GET", "HEAD"], self.tags),
            ("/api/ps", ["GET"], self.ps),
            ("/api/show", ["POST"], self.show),
            ("/api/pull", ["POST"], self.pull),
            ("/api/push", ["POST"], self.push),
            ("/api/create", ["POST"], self.create),
            ("/api/copy", ["POST"], self.copy),
            ("/api/delete", ["DELETE"], self.delete),
            ("/api/blobs/{digest}", ["HEAD"], self.arrivals.head),
            ("/api/blobs/{digest}", ["POST"], self.arrivals.post),
        )
        return [Route(path, _plain(handler), methods=methods) for path, methods, handler in table]

    # --- reading --------------------------------------------------------------------------------------------------

    async def version(self, _: Request) -> Response:
        return answer({"version": SPOKEN, "pierhead": __version__})

    async def tags(self, request: Request) -> Response:
        models = await asyncio.to_thread(self.parts.store.models)
        seen = [model for model in models if not model.damaged and _sees(request, model)]
        entries = [entry for model in seen for entry in shapes.listed(model, self.parts.fleet.capabilities(model))]
        return answer({"models": sorted(entries, key=lambda e: e["modified_at"], reverse=True)})

    async def ps(self, request: Request) -> Response:
        """What answers: each model once, with the memory of all its replicas."""
        fleet = self.parts.fleet
        ready = [r for r in fleet.all() if r.state.value == "ready" and _sees(request, r.life.model)]
        found: dict[str, tuple[ReplicaInfo, ModelRecord]] = {}
        for replica in ready:
            info, model = fleet.info(replica), replica.life.model
            before = found[model.digest][0].memory_estimate if model.digest in found else 0
            found[model.digest] = (replace(info, memory_estimate=info.memory_estimate + before), model)
        return answer({"models": [shapes.running(*one) for one in found.values()]})

    async def show(self, request: Request) -> Response:
        body = await _body(request, _Named)
        model = await asyncio.to_thread(self.find, body.wanted)
        if not _sees(request, model):
            raise _unknown(body.wanted)
        return answer(await asyncio.to_thread(self._shown, model, body.verbose))

    def _shown(self, model: ModelRecord, verbose: bool) -> dict[str, Any]:
        store = self.parts.store
        weights = sorted((f.name, f.digest) for f in model.files if f.role == "weights" and f.format == "gguf")
        header = None
        if weights:
            header = read_file(store.blob_path(weights[0][1]))
        return shapes.shown(model, header, self._texts(model), self.parts.fleet.capabilities(model), verbose=verbose)

    def _texts(self, model: ModelRecord) -> dict[str, str]:
        """Licence and template, where files of the model hold them; Ollama's own template before its Jinja."""
        found: dict[str, str] = {}
        own = [f for f in model.files if f.name == "template.gotmpl"]
        roles = [("template", own or [f for f in model.files if f.role == "template"])]
        roles.append(("license", [f for f in model.files if f.role == "license"]))
        for key, files in roles:
            texts = [
                self.parts.store.blob_path(f.digest).read_bytes().decode("utf-8", "replace")
                for f in files
                if f.packing == "raw" and f.size <= _MAX_TEXT
            ]
            if texts:
                found[key] = "\n".join(texts)
        return found

    def find(self, name: str) -> ModelRecord:
        """The model that Ollama's users mean; NotFound in the words that its clients look for."""
        store = self.parts.store
        try:
            return store.get(name)
        except (NotFound, UsageError, CorruptData):
            wanted = shapes.folded(name)
            for model in store.models():
                if any(shapes.folded(known) == wanted for known in model.names) and not model.damaged:
                    return model
        raise _unknown(name)

    # --- changing -------------------------------------------------------------------------------------------------

    async def pull(self, request: Request) -> Response:
        body = await _body(request, _Named)
        name = body.wanted
        references = await asyncio.to_thread(self.references, name)

        async def work(listener: Listener) -> None:
            await self._pulled(references, listener)

        return await respond(happenings(work), stream=body.stream is not False)

    async def _pulled(self, references: list[str], listener: Listener) -> None:
        """Pull the first of these that is a model; what a name means is not always to be seen from it."""
        last = references[-1]
        for reference in references:
            listener(PullPlanned(name=reference, source=reference, total=0))
            try:
                await self.parts.pull(reference, None, _without_plan(listener))
            except (NotFound, UsageError, CorruptData):
                if reference == last:
                    raise
                continue
            return

    def references(self, name: str) -> list[str]:
        """What to pull for a name: as it is where the store or a catalogue knows it, else as Ollama's registry has it.

        A name with another registry's host may be a model of Ollama's or one of ours.
        """
        reference = parse(name)
        if reference.kind == "oci" and "://" not in name:
            return [f"ollama://{name}", name] if name.count("/") == 2 else [name]
        if reference.kind != "short":
            return [name]
        try:
            Catalog.load(self.parts.settings.sources, self.parts.paths).find(name)
            return [name]
        except NotFound:
            pass
        try:
            return [self.find(name).source or f"ollama://{name}"]
        except NotFound:
            return [f"ollama://{name}"]

    async def push(self, request: Request) -> Response:
        body = await _body(request, _Named)
        model = await asyncio.to_thread(self.find, body.wanted)
        reference = parse(body.wanted)
        if reference.kind != "oci":
            raise BadReference(
                f"'{body.wanted[:100]}' does not name a place in a registry",
                hint="Give the model the name HOST/REPOSITORY:TAG first (/api/copy); Ollama's own registry takes "
                "models from Ollama alone.",
            )

        async def work(listener: Listener) -> None:
            await self.parts.push(model.name, reference, listener)

        return await respond(happenings(work), stream=body.stream is not False)

    async def create(self, request: Request) -> Response:
        body = await _body(request, CreateRequest)
        body.check()

        async def work(listener: Listener) -> None:
            with self.parts.store.lease():
                base = await self._base(body, listener) if body.from_ else None
                await asyncio.to_thread(recipe, self.parts.store, body, base, listener)
            await self.parts.models_refreshed()
            listener(PullDone(name=body.wanted, digest="", size=0))

        return await respond(happenings(work), stream=body.stream is not False)

    async def _base(self, body: CreateRequest, listener: Listener) -> ModelRecord:
        """The model that another is made from, pulled where it is not here, as Ollama does."""
        try:
            return await asyncio.to_thread(self.find, body.from_)
        except NotFound:
            await self._pulled(await asyncio.to_thread(self.references, body.from_), _without_end(listener))
            return await asyncio.to_thread(self.find, body.from_)

    async def copy(self, request: Request) -> Response:
        body = await _body(request, _Copy)
        source = await asyncio.to_thread(self.find, body.source)
        await asyncio.to_thread(self.parts.store.tag, source.name, body.destination.removesuffix(":latest"))
        await self.parts.models_refreshed()
        return Response(b"", 200)

    async def delete(self, request: Request) -> Response:
        """Remove a name; what runs under the last one of a model is stopped first."""
        body = await _body(request, _Named)
        model = await asyncio.to_thread(self.find, body.wanted)
        wanted = shapes.folded(body.wanted)
        name = next((n for n in model.names if shapes.folded(n) == wanted), model.name)
        if self.parts.fleet.in_use(model.digest) and len(model.names) <= 1:
            await self.parts.fleet.stop_replica(model.name)
        await asyncio.to_thread(self.parts.store.remove, name)
        await self.parts.models_refreshed()
        return Response(b"", 200)


def _unknown(name: str) -> NotFound:
    return NotFound(f"model '{name[:200]}' not found", hint=f"Type: pier pull {name[:200]}")


def _sees(request: Request, model: ModelRecord) -> bool:
    """Whether the key that the gateway let in may use the model, by any of its names."""
    scopes = [[unquote(p) for p in line.split(",")] for line in request.headers.getlist(SCOPE.decode())]
    return all(any(fnmatch.fnmatchcase(name, p) for p in patterns for name in model.names) for patterns in scopes)


def _without_plan(listener: Listener) -> Listener:
    """Without the source's own plan: that a manifest is fetched was told already."""

    def told(event: AnyEvent) -> None:
        if not isinstance(event, PullPlanned):
            listener(event)

    return told


def _without_end(listener: Listener) -> Listener:
    """Without the end: there is more to come."""

    def told(event: AnyEvent) -> None:
        if not isinstance(event, PullDone):
            listener(event)

    return told


def _plain(handler: Handler) -> Handler:
    """Tell errors as Ollama does."""

    @functools.wraps(handler)
    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except PierError as exc:
            return answer({"error": said(exc)}, exc.http_status)

    return answered


async def _body(request: Request, kind: type[T]) -> T:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_BODY:
            raise UsageError("the request's body is larger than 8 MiB")
    if not data:
        raise UsageError("missing request body")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise UsageError(f"the request cannot be used: {exc}") from exc
