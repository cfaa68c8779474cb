"""What registries keep about a manifest: the referrers API, its tag fallback, cosign's older tags; judges nothing.

Sources: OCI distribution 1.1 (listing referrers, the referrers tag schema) and cosign's signature specification.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urljoin

import msgspec

from pierhead.errors import Conflict, CorruptData, NotFound, PierError, SourceUnavailable
from pierhead.registry.client import MAX_DOCUMENT, Registry, limited
from pierhead.registry.push import push_bytes
from pierhead.registry.wire import origin, redact
from pierhead.store.blobs import DIGEST
from pierhead.store.index import Descriptor
from pierhead.store.layout import Store
from pierhead.store.manifest import Manifest
from pierhead.store.media import INDEX, MANIFEST

MAX_LISTED = 1000  # entries that are looked at
MAX_PAGES = 32
MAX_FETCHED = 64  # referrers that are brought here
MAX_MANIFEST = 1 << 20
MAX_BLOBS = 16  # of one referrer
MAX_BLOB = 8 << 20
MAX_TOTAL = 32 << 20  # bytes of all referrers of one model
WRITES = 6  # of the fallback's index, when others write too
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
DSSE_LAYER = "application/vnd.dsse.envelope.v1+json"
_FIRST = re.compile(r"sigstore|cosign|simplesigning|in-toto|dsse|spdx|cyclonedx")
_NO_API = frozenset({400, 404, 405, 406, 501})
_LINK = re.compile(r"<([^>]*)>\s*;[^,]*\brel\s*=\s*\"?next\"?")


@dataclass(frozen=True)
class Attachment:
    """One referrer, whole: its manifest's very bytes and its blobs by digest."""

    manifest: bytes
    blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def document(self) -> Manifest:
        """The manifest, read; CorruptData when it is none."""
        try:
            return msgspec.json.decode(self.manifest, type=Manifest)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise CorruptData(f"the referrer {self.digest[:19]} has a manifest that cannot be read: {exc}") from exc

    @property
    def kind(self) -> str:
        document = self.document
        return document.artifact_type or document.config.media_type


@dataclass(frozen=True)
class Listing:
    """Descriptors of what refers to a manifest; ``api`` tells whether the registry itself keeps the list."""

    entries: tuple[Descriptor, ...]
    api: bool


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def fallback_tag(digest: str) -> str:
    """The tag whose index lists the referrers of ``digest`` where a registry does not."""
    return digest.replace(":", "-")


# --- listing ----------------------------------------------------------------------------------------------------------


async def list_referrers(registry: Registry, digest: str, artifact_type: str = "") -> Listing:
    """What refers to ``digest``, of one artifact type or of all; by the API, else by the fallback's tag."""
    pages = await _pages(registry, digest, artifact_type)
    entries = _entries(await _fallback(registry, digest)) if pages is None else pages
    sound = [e for e in entries[:MAX_LISTED] if DIGEST.fullmatch(e.digest) and e.size >= 0]
    unique = {e.digest: e for e in sound if not artifact_type or e.artifact_type == artifact_type}
    return Listing(tuple(unique.values()), pages is not None)


async def _pages(registry: Registry, digest: str, artifact_type: str) -> list[Descriptor] | None:
    """All pages of the referrers API; None where the registry has none."""
    url = registry.url("referrers", digest) + (
        f"?{urlencode({'artifactType': artifact_type})}" if artifact_type else ""
    )
    found: list[Descriptor] = []
    for number in range(MAX_PAGES):
        try:
            page, following = await registry.repeat(lambda at=url: _page(registry, at))
        except PierError as exc:
            if number == 0 and exc.data.get("status") in _NO_API:
                return None
            raise
        if page is None:
            return None
        found += page
        if not following or len(found) >= MAX_LISTED:
            break
        url = following
    return found


async def _page(registry: Registry, url: str) -> tuple[list[Descriptor] | None, str]:
    async with registry.request("GET", url, headers={"Accept": INDEX}) as answer:
        where = redact(url)
        if answer.content_type != INDEX:
            return None, ""  # a web page, say: not the API
        entries = _index(await limited(answer, MAX_DOCUMENT, where), where)
        link = _LINK.search(answer.headers.get("Link", ""))
        following = urljoin(url, link[1]) if link else ""
        if following and origin(following) != origin(registry.base):
            raise SourceUnavailable(f"{where} continues on another host, which is refused")
        return entries, following


class _Index(msgspec.Struct):
    manifests: list[Descriptor] = []


def _index(body: bytes, where: str) -> list[Descriptor]:
    try:
        return msgspec.json.decode(body, type=_Index).manifests
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"{where} has a list of referrers that cannot be read: {exc}") from exc


async def _fallback(registry: Registry, digest: str) -> bytes:
    """The fallback's index; empty where there is none."""
    tag = fallback_tag(digest)
    try:
        kind, body = await registry.manifest(tag)
    except NotFound:
        return b""
    if kind != INDEX:
        raise CorruptData(f"{registry.name.repository}:{tag} is not a list of referrers, although it is named like one")
    return body


def _entries(body: bytes) -> list[Descriptor]:
    return _index(body, "the repository") if body else []


# --- fetching ---------------------------------------------------------------------------------------------------------


async def fetch_all(registry: Registry, digest: str) -> list[Attachment]:
    """What is said about ``digest``: referrers and cosign's older tags, the signatures first; within the limits."""
    entries = (await list_referrers(registry, digest)).entries
    chosen = sorted(entries, key=lambda e: not _FIRST.search(e.artifact_type))[:MAX_FETCHED]
    found: list[Attachment] = []
    room = MAX_TOTAL
    for entry in chosen:
        one = await _attempt(lambda e=entry: fetch(registry, e.digest, digest))
        if one is not None:
            found.append(one)
            room -= sum(map(len, one.blobs.values())) + len(one.manifest)
        if room <= 0:
            break
    for ending in ("sig", "att"):
        target = f"{fallback_tag(digest)}.{ending}"
        one = await _attempt(lambda t=target: fetch(registry, t, digest)) if room > 0 else None
        if one is not None and all(one.digest != f.digest for f in found):
            found.append(one)
            room -= sum(map(len, one.blobs.values()))
    return found


async def _attempt(asking: Callable[[], Awaitable[Attachment]]) -> Attachment | None:
    """None for what is gone, damaged or too large: one bad referrer does not hide the others."""
    try:
        return await asking()
    except (NotFound, CorruptData):
        return None


async def fetch(registry: Registry, target: str, subject: str) -> Attachment:
    """One referrer with its blobs; CorruptData when it is not about ``subject``, or larger than it may be.

    ``target`` is its digest, or one of cosign's older tags, whose manifests do not name their subject.
    """
    _, body = await registry.manifest(target)
    if DIGEST.fullmatch(target) and digest_of(body) != target:
        raise CorruptData(f"{registry.name.host} sends another manifest than the digest {target[:19]} names")
    if len(body) > MAX_MANIFEST:
        raise CorruptData(f"the referrer {target[:80]} has a manifest of more than {MAX_MANIFEST} bytes")
    found = Attachment(body).document
    if DIGEST.fullmatch(target) and (found.subject is None or found.subject.digest != subject):
        raise CorruptData(f"the referrer {target[:19]} is about something else")
    parts = {p.digest: p for p in (found.config, *found.layers)}
    sizes = [p.size for p in parts.values()]
    odd = any(not DIGEST.fullmatch(d) for d in parts) or len(parts) > MAX_BLOBS
    if odd or max(sizes) > MAX_BLOB or min(sizes) < 0:
        raise CorruptData(f"the referrer {target[:80]} is larger than a referrer may be")
    blobs: dict[str, bytes] = {}
    for digest, part in parts.items():
        blobs[digest] = await registry.small(digest, max(part.size, 1))
        if digest_of(blobs[digest]) != digest:
            raise CorruptData(f"{registry.name.host} sends another blob than {digest[:19]}")
    return Attachment(body, blobs)


# --- publishing -------------------------------------------------------------------------------------------------------


async def push(registry: Registry, subject: str, attachment: Attachment) -> None:
    """Publish a referrer, and list it where the registry does not do so itself."""
    for digest, data in attachment.blobs.items():
        await push_bytes(registry, digest, data)
    document = attachment.document
    if document.subject is None:
        await registry.put_manifest(_older_tag(subject, document), document.media_type, attachment.manifest)
        return
    noted = await registry.put_manifest(attachment.digest, document.media_type, attachment.manifest)
    if noted != subject:
        entry = Descriptor(
            document.media_type, attachment.digest, len(attachment.manifest), attachment.kind, document.annotations
        )
        await _list(registry, subject, entry)


def _older_tag(subject: str, document: Manifest) -> str:
    attested = any(layer.media_type == DSSE_LAYER for layer in document.layers)
    return f"{fallback_tag(subject)}.{'att' if attested else 'sig'}"


async def _list(registry: Registry, subject: str, entry: Descriptor) -> None:
    """Add to the fallback's index; whoever writes it at the same time may undo that, so it is looked at afterwards."""
    tag = fallback_tag(subject)
    for number in range(1, WRITES + 1):
        body = await _fallback(registry, subject)
        if any(e.digest == entry.digest for e in _entries(body)):
            return
        await registry.put_manifest(tag, INDEX, _with(body, entry))
        if any(e.digest == entry.digest for e in _entries(await _fallback(registry, subject))):
            return
        await registry.retry.pause(number, None)
    raise Conflict(
        f"others keep replacing {registry.name.repository}:{tag}, the list of what refers to this model",
        hint="Try again when they are done.",
    )


def _with(body: bytes, entry: Descriptor) -> bytes:
    """The index with one more entry; what others wrote stays as it is, also fields that we do not know."""
    index: dict[str, Any] = msgspec.json.decode(body, type=dict[str, Any]) if body else {}
    entries: list[Any] = [*(index.get("manifests") or []), msgspec.to_builtins(entry)]
    return msgspec.json.encode({**index, "schemaVersion": 2, "mediaType": INDEX, "manifests": entries})


# --- the store's side -------------------------------------------------------------------------------------------------


def kept(store: Store, subject: str) -> list[Attachment]:
    """What the store knows about a manifest; what is gone, or larger than a registry's may be, is passed over."""
    found: list[Attachment] = []
    room = MAX_TOTAL
    for entry in store.referrers(subject)[:MAX_LISTED]:
        try:
            manifest = _small_blob(store, entry.digest, min(MAX_MANIFEST, room))
            document = Attachment(manifest).document
            parts = {p.digest for p in (document.config, *document.layers)}
            blobs: dict[str, bytes] = {}
            left = room - len(manifest)
            for digest in parts if len(parts) <= MAX_BLOBS else ():
                blobs[digest] = _small_blob(store, digest, min(MAX_BLOB, left))
                left -= len(blobs[digest])
        except (NotFound, CorruptData, OSError):
            continue
        if len(blobs) == len(parts):
            found.append(Attachment(manifest, blobs))
            room = left
    return found


def _small_blob(store: Store, digest: str, limit: int) -> bytes:
    path = store.blob_path(digest)
    if path.stat().st_size > limit:
        raise CorruptData(f"the blob {digest[:19]} is larger than a referrer may be")
    return path.read_bytes()


def keep(store: Store, subject: str, attachments: Sequence[Attachment]) -> None:
    """Attach to a model of the store what is not attached yet."""
    there = {entry.digest for entry in store.referrers(subject)}
    for one in attachments:
        if one.digest not in there:
            store.attach(subject, one.manifest, list(one.blobs.values()))


def manifest_for(
    subject: Descriptor,
    artifact_type: str,
    layers: Sequence[tuple[str, bytes]],
    annotations: dict[str, str],
) -> Attachment:
    """A referrer of ``subject``: an OCI 1.1 manifest with the empty config; ``layers`` are media types and bytes."""
    empty = b"{}"
    blobs = {digest_of(data): data for data in (empty, *(data for _, data in layers))}
    document = Manifest(
        MANIFEST,
        Descriptor("application/vnd.oci.empty.v1+json", digest_of(empty), len(empty)),
        [Descriptor(kind, digest_of(data), len(data)) for kind, data in layers],
        artifact_type=artifact_type,
        subject=subject,
        annotations=annotations,
    )
    raw: dict[str, Any] = msgspec.to_builtins(document)
    return Attachment(msgspec.json.encode({"schemaVersion": 2, **raw}), blobs)
