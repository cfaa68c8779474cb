"""Signatures and attestations as referrers, made for a model of the store or straight for one in a registry."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pierhead.config import SourceSettings
from pierhead.errors import NotFound, UsageError
from pierhead.refs import parse
from pierhead.registry import referrers
from pierhead.registry.client import Registry
from pierhead.registry.credentials import find_login
from pierhead.registry.name import ImageName, image_name
from pierhead.registry.referrers import Attachment, digest_of, manifest_for
from pierhead.registry.wire import Retry
from pierhead.store.index import Descriptor
from pierhead.store.layout import Store
from pierhead.store.media import CREATED
from pierhead.store.model import ModelRecord
from pierhead.trust import bundle
from pierhead.trust.bundle import BUNDLE
from pierhead.trust.dsse import statement
from pierhead.trust.keys import PrivateKey


class Signs(Protocol):
    """A way to sign a statement: its bytes in, a bundle's bytes out."""

    def __call__(self, payload: bytes) -> bytes: ...


def with_key(key: PrivateKey) -> Signs:
    return lambda payload: bundle.sign_with_key(payload, key)


def keyless(token: str, trust_config: Path | None) -> Signs:
    return lambda payload: bundle.sign_keyless(payload, token, trust_config)


def signed(subject: Descriptor, kind: str, predicate: Any, sign: Signs, name: str = "") -> Attachment:
    """A referrer with a signed statement of type ``kind`` about a manifest, laid out as cosign lays it out. Blocks."""
    data = sign(statement(subject.digest, kind, predicate, name))
    annotations = {
        CREATED: _now(),
        "dev.sigstore.bundle.content": "dsse-envelope",
        "dev.sigstore.bundle.predicateType": kind,
    }
    return manifest_for(subject, BUNDLE, [(BUNDLE, data)], annotations)


def bare(subject: Descriptor, media_type: str, document: bytes) -> Attachment:
    """A referrer with a document that nobody signed."""
    return manifest_for(subject, media_type, [(media_type, document)], {CREATED: _now()})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- where the model is -----------------------------------------------------------------------------------------------


class Place(Protocol):
    """A model that things are said about: in the store, or in a registry."""

    @property
    def subject(self) -> Descriptor:
        """The model's manifest."""
        ...

    @property
    def name(self) -> str:
        """What signatures call it; empty where it has no place yet."""
        ...

    async def said(self) -> list[Attachment]:
        """What is attached."""
        ...

    async def attach(self, attachment: Attachment) -> None:
        """One more."""
        ...


@dataclass(frozen=True)
class InStore:
    """A model of the store; what is attached goes along with a push."""

    store: Store
    subject: Descriptor
    name: str = ""

    async def said(self) -> list[Attachment]:
        return await asyncio.to_thread(referrers.kept, self.store, self.subject.digest)

    async def attach(self, attachment: Attachment) -> None:
        await asyncio.to_thread(referrers.keep, self.store, self.subject.digest, [attachment])


@dataclass(frozen=True)
class InRegistry:
    """A model in a registry."""

    registry: Registry
    subject: Descriptor
    name: str

    async def said(self) -> list[Attachment]:
        return await referrers.fetch_all(self.registry, self.subject.digest)

    async def attach(self, attachment: Attachment) -> None:
        await referrers.push(self.registry, self.subject.digest, attachment)


@asynccontextmanager
async def place_of(
    text: str,
    store: Store,
    settings: SourceSettings,
    env: Mapping[str, str],
    retry: Retry | None = None,
) -> AsyncGenerator[Place]:
    """Where a model is that a user names: ``oci://…`` is in its registry, anything else in the store."""
    if not text.lower().startswith("oci://"):
        record = await asyncio.to_thread(_stored, store, text)
        body = await asyncio.to_thread(store.blob_path(record.digest).read_bytes)
        yield InStore(store, Descriptor(Attachment(body).document.media_type, record.digest, len(body)))
        return
    name = image_name(parse(text))
    login = await asyncio.to_thread(find_login, name.host, env)
    async with Registry(name, settings, login, retry=retry) as registry:
        kind, body = await registry.manifest(name.target)
        if name.digest and digest_of(body) != name.digest:
            raise UsageError(f"{name} is another manifest than its digest says")
        yield InRegistry(registry, Descriptor(kind, digest_of(body), len(body)), repository(name))


def _stored(store: Store, text: str) -> ModelRecord:
    """A model of the store; who names a registry without saying so is told how."""
    try:
        return store.get(text)
    except NotFound as exc:
        host, slash, _ = text.partition("/")
        if slash and ("." in host or ":" in host or host == "localhost"):
            hint = f"The one in the registry is `oci://{text}`."
            raise NotFound(exc.message, hint=hint, data=exc.data) from exc
        raise


def repository(name: ImageName) -> str:
    """``host/repository``: what signatures call a place."""
    return f"{name.host}/{name.repository}"
