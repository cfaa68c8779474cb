"""Short names: what ``smollm2`` stands for, from the data file of this package and the user's own; fetches nothing."""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
from collections.abc import Generator, Iterable, Sequence
from importlib import resources
from pathlib import Path

import msgspec

from pierhead import refs
from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, BadReference, ConfigError, NotFound
from pierhead.paths import Paths

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model of a catalog. ``tags`` name it (``latest``: without a tag); ``sources`` are tried in order.

    ``digest`` is what the weights must have, where it is known; ``size`` their bytes, 0 when unknown.
    """

    name: str
    tags: tuple[str, ...] = ("latest",)
    sources: tuple[str, ...]
    digest: str = ""
    size: int = 0
    description: str = ""
    parameters: str = ""
    license: str = ""
    origin: str = ""  # the catalog file; set by the reader

    @property
    def references(self) -> tuple[str, ...]:
        """How users can write it: ``smollm2``, ``smollm2:135m``."""
        return tuple(self.name if tag == "latest" else f"{self.name}:{tag}" for tag in self.tags)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: tuple[Entry, ...] = ()


class Catalog:
    """All short names; an entry of an earlier file hides one of the same name and tag in a later."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)
        self._found: dict[str, Entry] = {}
        for entry in entries:
            for reference in entry.references:
                self._found.setdefault(reference.lower(), entry)

    @classmethod
    def load(cls, settings: SourceSettings, paths: Paths) -> Catalog:
        """The user's ``catalog.toml``, then the catalogs of the settings, then ours; ConfigError when damaged."""
        own = paths.config / "catalog.toml"
        found: list[Entry] = []
        for path in [*([own] if own.exists() else []), *(Path(c).expanduser() for c in settings.catalogs)]:
            try:
                found += read(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as exc:
                raise ConfigError(f"cannot read the catalog {path}: {exc}", hint="Correct or remove it.") from exc
        return cls([*found, *builtin()])

    def entries(self) -> list[Entry]:
        """Every model once, by name."""
        shown = {id(e): e for e in self._found.values()}
        return sorted(shown.values(), key=lambda e: (e.name, e.size))

    def find(self, name: str) -> Entry:
        """The entry of ``name`` or ``name:tag`` (any case); NotFound names the closest."""
        wanted = name.lower().removesuffix(":latest")
        if wanted in self._found:
            return self._found[wanted]
        base = wanted.partition(":")[0]
        tags = [r for r in self._found if r.partition(":")[0] == base]
        close = tags or difflib.get_close_matches(wanted, self._found, 3)
        hint = f"Did you mean {', '.join(close[:8])}? " if close else ""
        raise NotFound(
            f"no catalog has a model '{name}'",
            hint=f"{hint}Any GGUF works by its full reference: hf:org/repo:Q4_K_M, https://…, ./file.gguf.",
            data={"choices": close or sorted(self._found)[:50]},
        )

    def meaning(self, reference: refs.Reference) -> Entry | refs.Reference:
        """What a short name stands for: its entry, else for ``owner/name`` a repository of Docker Hub, as Docker reads
        it."""
        try:
            return self.find(str(reference))
        except NotFound:
            if "/" not in reference.repo:
                raise
            return refs.Reference("oci", repo=f"docker.io/{reference.repo}", tag=reference.tag)


@contextlib.contextmanager
def unknown_name(reference: refs.Reference | None) -> Generator[None]:
    """Say of a name that no catalogue has, and Docker Hub refuses, that both are so; None is another kind of name."""
    try:
        yield
    except (NotFound, AccessDenied) as exc:
        if reference is None:
            raise
        raise type(exc)(
            f"no catalog has a model '{reference}', and Docker Hub does not give it out: {exc.message}",
            hint="Check the name. A private repository needs `docker login`; models of Hugging Face are hf:org/repo.",
            data=exc.data,
        ) from exc


def builtin() -> list[Entry]:
    """The entries that come with this package."""
    text = resources.files("pierhead.sources").joinpath("catalog.toml").read_text(encoding="utf-8")
    return read(text, "the built-in catalog")


def read(text: str, origin: str) -> list[Entry]:
    """Entries of a catalog file; ConfigError says which entry is wrong and how."""
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as exc:
        raise ConfigError(f"cannot read the catalog {origin}: {exc}", hint="See the page on short names.") from exc
    return [msgspec.structs.replace(_checked(entry, origin), origin=origin) for entry in file.model]


def _checked(entry: Entry, origin: str) -> Entry:
    problems = list(_problems(entry))
    if problems:
        raise ConfigError(f"{origin}: model '{entry.name}': {problems[0]}", hint="Correct the entry.")
    return entry


def _problems(entry: Entry) -> Iterable[str]:
    if not _NAME.fullmatch(entry.name):
        yield "not a name"
    if not entry.tags or not all(_TAG.fullmatch(tag) for tag in entry.tags):
        yield "tags must be words like 'latest' or '135m'"
    if entry.digest and not _DIGEST.fullmatch(entry.digest):
        yield "digest must be sha256: and 64 hex digits"
    if not entry.sources:
        yield "it has no sources"
    for source in entry.sources:
        try:
            if refs.parse(source).kind == "short":
                yield f"source '{source}' is itself a short name"
        except BadReference as exc:
            yield exc.message
