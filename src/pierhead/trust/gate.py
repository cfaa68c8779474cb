"""Where the policy is asked: before a pull gives a model its name, and before every start; remembers its answers."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pierhead.errors import Untrusted
from pierhead.registry.referrers import Attachment, kept
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord
from pierhead.trust import policy
from pierhead.trust.evidence import evidence_of
from pierhead.trust.policy import FILE, Policy

_Stamp = tuple[tuple[str, int, int, int], ...]
MAX_REMEMBERED = 1000


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


class Gate:
    """The policy in ``folder``; without a file everything is allowed. Safe to use from many threads."""

    def __init__(self, folder: Path, today: Callable[[], datetime.date] = _today) -> None:
        self._path = folder / FILE
        self._today = today
        self._lock = threading.Lock()
        self._policy: Policy | None = None
        self._stamp: _Stamp | None = None
        self._answers: dict[tuple[str, ...], list[str]] = {}

    def check(self, source: str, name: str, digest: str, said: Sequence[Attachment]) -> list[str]:
        """Warnings; Untrusted or ConfigError (a damaged policy) when the model must not be used. Blocks."""
        found = self._current()
        if found is None:
            return []
        return policy.decide(found, [name], digest, evidence_of(said), self._today(), origins=[source])

    def vouches(self, source: str, name: str, digest: str, said: Sequence[Attachment]) -> bool:
        """Whether the policy asks for somebody's signature on this model, and it is there: its code may be run."""
        found = self._current()
        if found is None:
            return False
        rules = [found.content.rules[number] for number, _ in found.rules_for([policy.canonical(source)])]
        if not rules or any(rule.require not in ("any", "all") for rule in rules):
            return False
        try:
            return not policy.decide(found, [name], digest, evidence_of(said), self._today(), origins=[source])
        except Untrusted:
            return False

    def check_start(self, store: Store, record: ModelRecord) -> list[str]:
        """The same for a model of the store by what is kept with it, offline; a good answer is remembered."""
        found = self._current()
        if found is None:
            return []
        said = [r.digest for r in store.referrers(record.digest)]
        names = record.names or (record.name,)  # an earlier version is one of the name that it had
        key = (record.digest, found.hash, str(self._today()), str(store.moves), *names, "", *said)
        with self._lock:
            known = self._answers.get(key)
        if known is None:
            evidence = evidence_of(kept(store, record.digest))
            origins = store.pulled_from(record.digest)
            known = policy.decide(found, names, record.digest, evidence, self._today(), origins=origins)
            with self._lock:
                if len(self._answers) >= MAX_REMEMBERED:
                    self._answers.clear()
                self._answers[key] = known
        return known

    def _current(self) -> Policy | None:
        """The policy as its files are now; they are read again when one of them changed."""
        with self._lock:
            if self._stamp is not None and self._policy is not None and self._stamp == _stamp(self._policy.files):
                return self._policy
            self._policy, self._stamp = None, None
            found = policy.read(self._path)
            if found is not None:
                stamp = _stamp(found.files)
                again = policy.read(self._path)  # a file that is written just now is not remembered half
                if again is not None and again.hash == found.hash:
                    self._policy, self._stamp = found, stamp
            self._answers.clear()
            return found


def _stamp(files: Sequence[Path]) -> _Stamp | None:
    """What tells whether files changed; None when one is gone."""
    try:
        found = [(str(f), f.stat()) for f in files]
    except OSError:
        return None
    return tuple((name, s.st_mtime_ns, s.st_size, s.st_ino) for name, s in found)
