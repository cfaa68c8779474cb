"""Models of Ollama's: taken from its folder on this machine when it has them whole, else from its registry."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import cast

import msgspec

from pierhead.errors import AccessDenied, CorruptData, NotFound
from pierhead.events import Listener, Note
from pierhead.formats import gguf
from pierhead.refs import Reference
from pierhead.registry.name import ImageName
from pierhead.sources.artifact import Artifacts
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.foreign import text
from pierhead.sources.go_template import to_jinja
from pierhead.sources.local import read_local
from pierhead.sources.ollama_model import (
    MAX_SMALL,
    OllamaLayer,
    OllamaName,
    Part,
    Parts,
    Settings,
    check_config,
    ollama_name,
    parts_of,
    read_manifest,
    settings_of,
)
from pierhead.sources.ollama_store import OllamaStore, ollama_folders
from pierhead.store.blobs import digest_of
from pierhead.store.media import SETTINGS

REVISION = "org.opencontainers.image.revision"
GO_TEMPLATE = "template.gotmpl"
_KEY = "tokenizer.chat_template"


@dataclass(frozen=True)
class _Place:
    """Where the parts of one model come from: ``small`` reads a blob, ``file`` plans one."""

    small: Callable[[OllamaLayer], Awaitable[bytes]]
    file: Callable[[Part], RemoteFile]


class Ollama:
    """Ollama's folders and registry. With ``only`` nothing is asked of the network."""

    def __init__(
        self,
        artifacts: Artifacts | None,
        env: Mapping[str, str],
        listener: Listener,
        only: OllamaStore | None = None,
    ) -> None:
        self._artifacts = artifacts
        self._env = env
        self._listener = listener
        self._only = only

    def telling(self, listener: Listener) -> Ollama:
        """The same source with another listener for its notes."""
        return Ollama(self._artifacts, self._env, listener, self._only)

    async def plan(self, reference: Reference) -> PullPlan:
        name = ollama_name(reference)
        if self._only is not None:
            return await self._here(self._only, name)
        for folder in await asyncio.to_thread(ollama_folders, self._env):
            store = OllamaStore(folder)
            try:
                plan = await self._here(store, name)
            except (NotFound, CorruptData) as exc:
                if exc.data.get("missing") or isinstance(exc, CorruptData):
                    self._note(f"{exc.message}; it is fetched from {name.host}")
                continue
            self._note(f"Taken from Ollama's folder {folder}; nothing is downloaded.")
            return plan
        return await self._there(name)

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        if file.data is not None:
            return file.data[offset : offset + length]
        if file.local is not None:
            return await asyncio.to_thread(read_local, file, offset, length)
        return await cast("Artifacts", self._artifacts).read(file, offset, length)

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        await cast("Artifacts", self._artifacts).fetch(file, sink)

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""

    # --- the two places -------------------------------------------------------------------------------------------

    async def _here(self, store: OllamaStore, name: OllamaName) -> PullPlan:
        """From a folder; NotFound with ``missing`` when a part of the model is not there."""
        body = await asyncio.to_thread(store.manifest, name)
        manifest = read_manifest(body, name.short)
        config = [(manifest.config.digest, manifest.config.size)] if manifest.config.digest else []
        wanted = parts_of(manifest, name.short).everything + config
        missing = await asyncio.to_thread(store.missing, wanted)
        if missing:
            began = any(store.partial(digest) for digest in missing)
            raise NotFound(
                f"Ollama's copy of {name.short} is not whole: {len(missing)} of {len(wanted)} parts are "
                + ("still being downloaded" if began else "missing or of another size"),
                hint=f"Type `ollama pull {name.short}`, or `pier pull ollama://{name.short}`.",
                data={"missing": missing},
            )

        async def small(layer: OllamaLayer) -> bytes:
            return await asyncio.to_thread(store.read, layer.digest, layer.size)

        def file(part: Part) -> RemoteFile:
            path = store.blob(part.digest)
            return RemoteFile(part.name, part.digest, part.size, part.digest, part.role, path, beneath=store.root)

        return await self._made(name, body, _Place(small, file))

    async def _there(self, name: OllamaName) -> PullPlan:
        """From the registry."""
        artifacts = cast("Artifacts", self._artifacts)
        mirrors = await artifacts.repository(ImageName(name.host, name.repository, name.tag))
        try:
            _, body = await mirrors.first(lambda registry: registry.manifest(name.tag))
        except AccessDenied as exc:
            hint = f"If the model is private, type `ollama pull {name.short}`, then pull it here: that copy is taken."
            raise AccessDenied(exc.message, hint=hint, data=exc.data) from exc
        except NotFound as exc:
            raise NotFound(
                f"{name.host} has no model '{name.short}'", hint="Check name and tag at https://ollama.com/library."
            ) from exc

        async def small(layer: OllamaLayer) -> bytes:
            return await mirrors.first(lambda registry: registry.small(layer.digest, layer.size))

        def file(part: Part) -> RemoteFile:
            return RemoteFile(
                part.name, part.digest, part.size, part.digest, part.role, opaque=mirrors, early=not mirrors.mirrored
            )

        return await self._made(name, body, _Place(small, file))

    # --- the plan -------------------------------------------------------------------------------------------------

    async def _made(self, name: OllamaName, body: bytes, place: _Place) -> PullPlan:
        where = f"ollama://{name.short}"
        manifest = read_manifest(body, where)
        renderer = ""
        if manifest.config.digest:
            renderer = check_config(await _small(place, manifest.config, where), where)
        parts = parts_of(manifest, where)
        documents = {key: await _small(place, layer, where) for key, layer in parts.documents.items()}
        settings = settings_of(documents, where)
        files = tuple(place.file(part) for part in parts.files)
        if settings.left_out:
            self._note(f"Not carried over from Ollama's parameters: {', '.join(settings.left_out)}.")
        template = text(documents.get("template", b""), f"the template of {where}")
        files += await self._templates(files, parts, template, renderer)
        annotations = {REVISION: digest_of(body), **_annotation(settings)}
        return PullPlan(name.ours, where, files, annotations)

    async def _templates(
        self, files: tuple[RemoteFile, ...], parts: Parts, template: str, renderer: str
    ) -> tuple[RemoteFile, ...]:
        """Ollama's template as it is, and as Jinja where the weights have none and it can be carried over."""
        weights = next(f for f in files if f.role == "weights")

        async def fetch(offset: int, length: int) -> bytes:
            return await self.read(weights, offset, length)

        try:
            header = await gguf.read_remote(fetch, weights.size)
        except CorruptData as exc:
            raise CorruptData(f"{weights.name} ({weights.digest[:19]}): {exc.message}", hint=exc.hint) from exc
        if any(t.name.startswith(("v.", "mm.")) for t in header.tensors):
            self._note(
                "The weights hold their vision part inside, as Ollama's engine wants it; llama.cpp may refuse them.",
                "warning",
            )
        kept: tuple[RemoteFile, ...] = ()
        if template:
            data = template.encode()
            kept = (RemoteFile(GO_TEMPLATE, parts.documents["template"].digest, len(data), "", "other", data=data),)
        if header.metadata.get(_KEY):
            return kept
        jinja = to_jinja(template) if template else None
        if jinja is not None:
            data = jinja.encode()
            return (*kept, RemoteFile("template.jinja", f"jinja {template}", len(data), "", "template", data=data))
        said = f"Ollama renders its chats itself ({renderer})" if renderer else "Ollama's own could not be carried over"
        self._note(f"The weights have no Jinja chat template, and {said}: chats may be badly formatted.", "warning")
        return kept

    def _note(self, message: str, level: str = "info") -> None:
        self._listener(Note(message=message, level=level))


def _annotation(settings: Settings) -> dict[str, str]:
    found = settings.to_dict()
    return {SETTINGS: msgspec.json.encode(found).decode()} if found else {}


async def _small(place: _Place, layer: OllamaLayer, where: str) -> bytes:
    """A document that is read into memory, as small as its manifest says and of the right digest."""
    if layer.size > MAX_SMALL:
        raise CorruptData(f"{where} has a {layer.kind or 'config'} of {layer.size} bytes, larger than it may be")
    data = await place.small(layer)
    if digest_of(data) != layer.digest:
        raise CorruptData(
            f"{where} has a {layer.kind or 'config'} that does not match its digest",
            hint="It is damaged: pull it again, with Ollama if the copy is Ollama's.",
        )
    return data
