"""Finding the manifest of a model: checked against its digest, and looked for in lists of them; reads no blobs."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import msgspec

from pierhead.errors import CorruptData, PierError, SourceUnavailable, UsageError
from pierhead.registry.client import Registry
from pierhead.store.blobs import DIGEST
from pierhead.store.index import Descriptor

MAX_DEPTH = 3  # lists within lists
MAX_LOOKS = 32  # manifests that are read to find a model
_LISTS = ("index.v1+json", "list.v2+json")
_MODELS = ("application/vnd.docker.ai.", "application/vnd.cncf.model.")
_ATTACHED = "vnd.docker.reference.type"  # an entry that is about another one


class _List(msgspec.Struct, rename="camel"):
    media_type: str = ""
    manifests: list[Descriptor] = []


class _Kind(msgspec.Struct, rename="camel"):
    media_type: str = ""


Ask = Callable[[Callable[[Registry], Awaitable[tuple[str, bytes]]]], Awaitable[tuple[str, bytes]]]


def digest_of(data: bytes) -> str:
    """The digest of a whole document."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Finder:
    """``ask`` sends one question to whoever answers; ``usable`` raises PierError for a manifest that is no model."""

    def __init__(self, ask: Ask, where: str, usable: Callable[[bytes], None]) -> None:
        self._ask = ask
        self._where = where
        self._usable = usable
        self._looks = 0

    async def find(self, target: str) -> bytes:
        """The manifest's bytes; of a list, those of its first entry that is a model."""
        kind, body = await self._get(target)
        if not _is_list(kind, body):
            self._usable(body)
            return body
        reasons: list[PierError] = []
        found = await self._search(body, 1, reasons)
        if found is not None:
            return found
        if len(reasons) == 1:
            raise reasons[0]
        raise UsageError(
            f"{self._where} is a list without a model that can be used",
            hint="Name one of its entries by digest.",
            data={"reasons": [r.message for r in reasons[:10]]},
        )

    async def _get(self, target: str) -> tuple[str, bytes]:
        async def ask(registry: Registry) -> tuple[str, bytes]:
            kind, body = await registry.manifest(target)
            if target.startswith("sha256:") and digest_of(body) != target:
                raise CorruptData(f"{self._where} sends another manifest than the digest names", hint="Try again.")
            return kind, body

        return await self._ask(ask)

    async def _search(self, body: bytes, depth: int, reasons: list[PierError]) -> bytes | None:
        """Depth first; what cannot be used is passed over, what cannot be reached ends the search."""
        if depth > MAX_DEPTH:
            raise CorruptData(f"{self._where} has lists of manifests within lists, more than {MAX_DEPTH} deep")
        for entry in self._entries(body):
            self._looks += 1
            if self._looks > MAX_LOOKS:
                raise CorruptData(f"{self._where} has no model among its first {MAX_LOOKS} manifests")
            kind, inner = await self._get(entry.digest)
            if _is_list(kind, inner):
                if (found := await self._search(inner, depth + 1, reasons)) is not None:
                    return found
                continue
            try:
                self._usable(inner)
            except SourceUnavailable:
                raise
            except PierError as exc:
                reasons.append(exc)
            else:
                return inner
        return None

    def _entries(self, body: bytes) -> list[Descriptor]:
        """A list's entries, those that call themselves models first."""
        try:
            listed = msgspec.json.decode(body, type=_List).manifests
        except (msgspec.DecodeError, RecursionError) as exc:
            raise CorruptData(f"{self._where} has no manifest that can be read: {exc}") from exc
        if any(not DIGEST.fullmatch(entry.digest) for entry in listed):
            raise CorruptData(f"{self._where} is a list with an entry that is not named by a sha256 digest")
        entries = [entry for entry in listed if _ATTACHED not in entry.annotations]
        return sorted(entries, key=lambda entry: not entry.artifact_type.startswith(_MODELS))


def _is_list(kind: str, body: bytes) -> bool:
    """By the answer's type, else by the document's own."""
    if kind.endswith(_LISTS):
        return True
    try:
        return msgspec.json.decode(body, type=_Kind).media_type.endswith(_LISTS)
    except (msgspec.DecodeError, RecursionError):
        return False
