"""What a removal takes out of the index, and what it refuses; pure."""

from __future__ import annotations

from collections.abc import Mapping

from pierhead.errors import Conflict, NotFound
from pierhead.store.index import Index, is_digest_like


def drop(index: Index, word: str, digest: str, pinned: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Take out what ``word`` (which was found to mean ``digest``) names; the names that are gone.

    A name goes with its earlier versions, a digest with all its names, ``NAME@digest`` is one earlier version of NAME.
    """
    before, known = index.live(()), {e.digest: e.name for e in reversed(index.named)}
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
    _refuse_used(word, before - index.live(()), pinned, known)
    return gone


def _refuse_used(word: str, lost: set[str], pinned: Mapping[str, tuple[str, ...]], known: Mapping[str, str]) -> None:
    """Conflict where a replica runs from what is lost, or has it beside its own model (an owner ``REPLICA-NUMBER``)."""
    using = {owner for digest in lost for owner in pinned.get(digest, ())}
    owners = sorted({owner.partition("-")[0] for owner in using})
    if owners:
        models = {owner: known[d] for d, all_of in pinned.items() if d in known for owner in all_of}
        model = models.get(owners[0], owners[0])
        beside = f", after `pier lora rm {model} {word}` if it is an adapter" if not using & set(owners) else ""
        raise Conflict(
            f"'{word}' is in use by {', '.join(f'{o} ({models[o]})' if o in models else o for o in owners)}",
            hint=f"Type `pier stop {model}` first{beside}, or `pier rm --force {word}`.",
            data={"owners": owners},
        )
