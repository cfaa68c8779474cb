"""The store's ``index.json``: names and their manifests, earlier versions, what refers to them; no files."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from pierhead.store.blobs import DIGEST
from pierhead.store.media import CONFIG, INDEX, MANIFEST, REF_NAME
from pierhead.store.model import Blob

KEPT_VERSIONS = 3  # earlier versions of a name that stay until they are pruned
PREVIOUS = "ai.pierhead.previous"  # the name that an entry had before it moved on
SUBJECT = "ai.pierhead.subject"  # the manifest that an entry (a signature, an SBOM) is about
_DIGEST_LIKE = re.compile(r"(?:sha256:[0-9a-f]{8,64}|[0-9a-f]{12,64})")


class Descriptor(msgspec.Struct, rename="camel", omit_defaults=True):
    """A pointer to a blob."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: dict[str, str] = {}

    @property
    def name(self) -> str:
        return self.annotations.get(REF_NAME, "")

    @property
    def previous(self) -> str:
        """The name whose earlier version this is."""
        return self.annotations.get(PREVIOUS, "")

    @property
    def subject(self) -> str:
        """The digest of what this is about."""
        return self.annotations.get(SUBJECT, "")


class Index(msgspec.Struct, rename="camel"):
    """Entries with a name are models; without, they are earlier versions or referrers."""

    schema_version: int = 2
    media_type: str = INDEX
    manifests: list[Descriptor] = []

    @property
    def named(self) -> list[Descriptor]:
        return [e for e in self.manifests if e.name]

    def versions(self, name: str) -> list[Descriptor]:
        """The earlier versions of a name, the latest first."""
        return [e for e in reversed(self.manifests) if e.previous == name]

    def referrers(self, digest: str) -> list[Descriptor]:
        return [e for e in self.manifests if e.subject == digest]

    def set(self, name: str, blob: Blob, artifact_type: str = CONFIG) -> str:
        """Point ``name`` to a manifest; the digest it had before, which becomes an earlier version."""
        before = next((e for e in self.manifests if e.name == name), None)
        same = before is not None and before.digest == blob.digest
        self.manifests = [
            e for e in self.manifests if e.name != name and not (e.previous == name and e.digest == blob.digest)
        ]
        if before is not None and not same:
            old = {REF_NAME: "", **before.annotations, PREVIOUS: name}
            del old[REF_NAME]
            self.manifests.append(msgspec.structs.replace(before, annotations=old))
        self.manifests.append(Descriptor(MANIFEST, blob.digest, blob.size, artifact_type, {REF_NAME: name}))
        self.trim({name}, KEPT_VERSIONS)
        return before.digest if before else ""

    def set_aside(self, name: str, blob: Blob, artifact_type: str = CONFIG) -> None:
        """Keep a manifest as a version of ``name`` that the name does not point to."""
        if not any(e.digest == blob.digest and name in (e.name, e.previous) for e in self.manifests):
            self.manifests.append(Descriptor(MANIFEST, blob.digest, blob.size, artifact_type, {PREVIOUS: name}))
            self.trim({name}, KEPT_VERSIONS)

    def refer(self, subject: str, blob: Blob, artifact_type: str) -> None:
        """Note a manifest that is about another."""
        self.manifests = [e for e in self.manifests if not (e.subject == subject and e.digest == blob.digest)]
        self.manifests.append(Descriptor(MANIFEST, blob.digest, blob.size, artifact_type, {SUBJECT: subject}))

    def drop(self, names: Iterable[str]) -> None:
        """Forget names and their earlier versions."""
        gone = set(names)
        self.manifests = [e for e in self.manifests if not gone & {e.name, e.previous}]

    def forget(self, digest: str, name: str = "") -> None:
        """Forget a digest as an earlier version of ``name``, or of every name."""
        self.manifests = [
            e for e in self.manifests if not (e.digest == digest and e.previous and name in ("", e.previous))
        ]

    def trim(self, names: Iterable[str], keep: int) -> None:
        """Forget all but the latest ``keep`` earlier versions of each name."""
        gone = {id(e) for name in names for e in self.versions(name)[keep:]}
        self.manifests = [e for e in self.manifests if id(e) not in gone]

    def live(self, pinned: Iterable[str]) -> set[str]:
        """The manifests that must stay: named ones, earlier versions, pinned ones, and what refers to those."""
        return self.with_referrers({e.digest for e in self.manifests if not e.subject} | set(pinned))

    def with_referrers(self, digests: set[str]) -> set[str]:
        """These manifests, what refers to them, and what refers to that."""
        found, more = set(digests), True
        while more:
            about = {e.digest for e in self.manifests if e.subject in found}
            more = not about <= found
            found |= about
        return found

    def find(self, name: str) -> tuple[str, str] | None:
        """The digest that a word means, and the exact name where it is one.

        A word is a name, ``name:latest``, ``name@digest``, or a digest or unambiguous start of one.
        """
        by_name = {e.name: e.digest for e in self.named}
        for wanted in (name, f"{name}:latest", name.removesuffix(":latest")):
            if wanted in by_name:
                return by_name[wanted], wanted
        word = name.rpartition("@")[2]
        if is_digest_like(word):
            wanted = word if word.startswith("sha256:") else f"sha256:{word}"
            found = {e.digest for e in self.manifests if not e.subject and e.digest.startswith(wanted)}
            return (found.pop(), "") if len(found) == 1 else None
        return None


def is_digest_like(name: str) -> bool:
    """Whether a user's word is a digest or the start of one."""
    return _DIGEST_LIKE.fullmatch(name) is not None


def decode_index(data: bytes) -> Index:
    """Read ``index.json``; entries that are not ours to read are kept. msgspec.DecodeError when it is damaged."""
    index = msgspec.json.decode(data, type=Index)
    for entry in index.manifests:
        if not DIGEST.fullmatch(entry.digest):
            raise msgspec.ValidationError(f"not a digest: {entry.digest[:80]!r}")
    return index
