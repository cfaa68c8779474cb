"""What a removal takes out of the index, and what it refuses; pure."""

from __future__ import annotations

from collections.abc import Mapping

from pierhead.errors import Conflict, NotFound
from pierhead.store.index import Index, is_digest_like


def drop(index: Index, word: str, digest: str, pinned: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Take out what ``word`` (which was found to mean ``digest``) names; the names that are gone.

    A name goes with its earlier versions, a digest with all its names, ``NAME@digest`` is one earlier version of NAME.
    """
    before = index.live(())
    owner, at, _ = word.rpartition("@")
    names = [e.name for e in index.named if e.digest == digest]
    exact = next((n for n in (word, f"{word}:latest", word.removesuffix(":latest")) if n in names), "")
    gone: tuple[str, ...] = ()
    if exact:
        gone = (exact,)
    elif at and owner in names:
        raise Conflict(
            f"'{owner}' means this version now",
            hint=f"Type `pier rm {owner}` for the name, or `pier tag {owner}@sha256:… {owner}` to go back first.",
        )
    elif at:
        index.forget(digest, owner)
    elif is_digest_like(word):
        gone = tuple(sorted(names))
        index.forget(digest)
    else:
        raise NotFound(f"'{word}' was moved or removed meanwhile", hint="`pier list` shows the models in the store.")
    index.drop(gone)
    _refuse_used(word, before - index.live(()), pinned, gone)
    return gone


def _refuse_used(word: str, lost: set[str], pinned: Mapping[str, tuple[str, ...]], gone: tuple[str, ...]) -> None:
    owners = sorted({owner for digest in lost for owner in pinned.get(digest, ())})
    if owners:
        raise Conflict(
            f"'{word}' is in use by {', '.join(owners)}",
            hint=f"Type `pier stop {gone[0] if gone else owners[0]}` first, or `pier rm --force {word}`.",
            data={"owners": owners},
        )
