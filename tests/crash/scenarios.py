"""The operations whose every crash point is tried; run as ``python -m tests.crash.scenarios NAME FOLDER``.

After each crash: the store opens, all that it names is whole, nothing of before is lost, the operation succeeds when
it is repeated and ends as if it had never died, and ``prune`` leaves the very files that an undisturbed run leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash import crashing
from tests.sources.servers import make_gguf

from pierhead.store import blobs, history, keep, layout
from pierhead.store.index import decode_index
from pierhead.store.layout import Store
from pierhead.store.manifest import reachable
from pierhead.store.media import GGUF
from pierhead.store.model import Layer, ModelRecord

TIME = "2026-01-01T00:00:00+00:00"


def fetch(store: Store, name: str, data: bytes, *, promised: bool = True) -> ModelRecord:
    """What a pull does to the store."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    with store.lease():
        with store.ingest(f"key {name}", size=len(data), digest=digest if promised else None) as ingest:
            if ingest.done is None:
                ingest.write(data[ingest.offset :])
            blob = ingest.commit()
        layers = [Layer(blob.digest, blob.size, GGUF, "m.gguf")]
        return store.commit_model(name, layers=layers, metadata={"format": "gguf", "name": name})


def say(store: Store, digest: str, text: str) -> None:
    """Attach a statement to a model."""
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": blobs.digest_of(b"{}"), "size": 2}
    size = store.blob_path(digest).stat().st_size
    about = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size}
    document = {"schemaVersion": 2, "mediaType": about["mediaType"], "artifactType": "application/x.said"}
    body = json.dumps({**document, "config": empty, "layers": [], "subject": about, "annotations": {"text": text}})
    store.attach(digest, body.encode(), [b"{}"])


def base(root: Path) -> None:
    """Two models that share a blob, an earlier version, a statement, a model folder, a partial, a pin."""
    store = Store.open(root)
    fetch(store, "kept", b"kept" * 500)
    first = fetch(store, "moving", b"first" * 500)
    fetch(store, "moving", b"second" * 500)
    store.tag("kept", "alias")
    fetch(store, "other", b"kept" * 500)
    say(store, store.get("kept").digest, "good")
    store.materialize(store.get("kept"))
    store.pin(first.digest, "replica1")
    store.unpin("replica1")
    with store.ingest("never finished") as ingest:
        ingest.write(b"half")


def local(root: Path, *, link: bool) -> None:
    """A pull of a user's file, as the command does it."""
    from pierhead.config import SourceSettings
    from pierhead.paths import resolve
    from pierhead.sources.pull import pull

    file = root.parent / "user" / "mine.gguf"
    paths = resolve({"PIERHEAD_HOME": str(root.parent / "home"), "HOME": str(root.parent)})
    asyncio.run(pull(str(file), store=Store.open(root), settings=SourceSettings(), paths=paths, name="new", link=link))


def users_file(root: Path) -> None:
    base(root)
    (root.parent / "user").mkdir(exist_ok=True)
    (root.parent / "user" / "mine.gguf").write_bytes(make_gguf(4000))
    (root.parent / "user" / "LICENSE").write_text("free")
    (root.parent / "user" / "a.jinja").write_text("{{ messages }}")


def no_store(root: Path) -> None:
    """Nothing at all."""


def use(root: Path) -> None:
    """What a replica's start does."""
    store = Store.open(root)
    record = store.get("moving")
    store.pin(record.digest, "replica2")
    store.materialize(record)


def repull(root: Path) -> None:
    """A pull that finds its blob there and an artifact that others made."""
    store = Store.open(root)
    with store.lease():
        fetch(store, "again", b"kept" * 500)
        manifest = store.blob_path(store.get("kept").digest).read_bytes()
        config = store.blob_path(json.loads(manifest)["config"]["digest"]).read_bytes()
        store.commit_artifact("moving", manifest, config, {"source": "oci://there", "summary": {}})
    store.note("moving", by="pull", source="oci://there")


def archived(root: Path) -> None:
    """A store, and beside it an archive with a model that is not in it and a statement."""
    from pierhead.store.export import save

    fetch(Store.open(root), "moving", b"first" * 500)
    other = Store.open(root.parent / "other")
    say(other, fetch(other, "moving", make_gguf(4000)).digest, "new")
    (root.parent / "user").mkdir(exist_ok=True)
    save(other, ["moving"], root.parent / "user" / "a.tar", lambda *_: None)


def bring(root: Path) -> None:
    from pierhead.sources.archive import import_models

    with (root.parent / "user" / "a.tar").open("rb") as file:
        import_models(Store.open(root), file, report=lambda *_: None)


def send(root: Path) -> None:
    """An export into a folder of the store's, so that its steps are seen."""
    from pierhead.store.export import save

    save(Store.open(root), ["kept", "moving"], root / "out.tar", lambda *_: None)


def pack(root: Path) -> None:
    """A package of a user's file with a licence."""
    from pierhead.package.build import package
    from pierhead.package.inputs import Input, detect
    from pierhead.package.recipe import Recipe

    user = root.parent / "user"
    extras = (Input(user / "LICENSE", "LICENSE", "license"),)
    package(Store.open(root), Recipe("new", detect(user / "mine.gguf"), TIME, extras))


def pack_from(root: Path) -> None:
    """A package of a model of the store with a template."""
    from pierhead.package.build import package
    from pierhead.package.inputs import Input
    from pierhead.package.recipe import Recipe

    store, user = Store.open(root), root.parent / "user"
    extras = (Input(user / "a.jinja", "a.jinja", "template"),)
    package(store, Recipe("moving", store.get("kept"), TIME, extras))


def remove_both(root: Path) -> None:
    remove(root, "kept")
    remove(root, "alias")


def remove(root: Path, name: str) -> None:
    from pierhead.errors import NotFound

    store = Store.open(root)
    try:
        store.remove(name)
    except NotFound:
        store.collect()  # it was removed before the crash


@dataclass(frozen=True)
class Scenario:
    """An operation and where it begins; ``grows`` where a full disk must be told (else it may succeed)."""

    act: Callable[[Path], None]
    prepare: Callable[[Path], None] = base
    grows: bool = True
    slow: bool = False  # only kills: the rest of it is the same as that of another


SCENARIOS: dict[str, Scenario] = {
    "create": Scenario(lambda root: fetch(Store.open(root), "new", b"new" * 500) and None, no_store),
    "pull-moves": Scenario(lambda root: fetch(Store.open(root), "moving", b"n" * 5000, promised=False) and None),
    "pull-again": Scenario(repull),
    "pull-file": Scenario(lambda root: local(root, link=False), users_file),
    "pull-link": Scenario(lambda root: local(root, link=True), users_file),
    "package": Scenario(pack, users_file),
    "package-from": Scenario(pack_from, users_file),
    "tag": Scenario(lambda root: Store.open(root).tag("kept", "moving") and None),
    "attach": Scenario(lambda root: say(Store.open(root), Store.open(root).get("moving").digest, "fine")),
    "use": Scenario(use),
    "remove": Scenario(lambda root: remove(root, "moving")),
    "remove-shared": Scenario(remove_both),
    "export": Scenario(send),
    "import": Scenario(bring, archived),
    "prune": Scenario(lambda root: Store.open(root).prune(partials=True) and None, grows=False),
}


# --- what must hold ---------------------------------------------------------------------------------------------------


def named(root: Path) -> dict[str, str]:
    """What each name means; nothing without a store."""
    if not (root / "index.json").exists():
        return {}
    return {e.name: e.digest for e in decode_index((root / "index.json").read_bytes()).named}


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*")}


def whole(root: Path) -> None:
    """Everything that the index names is there and has its digest; so have the folders of models."""
    store = Store.open(root)
    for entry in decode_index((root / "index.json").read_bytes()).manifests:
        for name in (entry.digest.removeprefix("sha256:"), *reachable(store.blobs.path(entry.digest))):
            data = (store.blobs.folder / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == name, f"{name} of {entry.name or entry.annotations} is damaged"
    for record in store.models():
        store.recheck(record)
        assert store.history(record.name)[0].digest == record.digest or record.name not in ("moving",)
        folder = root / "models" / record.digest.removeprefix("sha256:")
        if folder.exists():
            for file in record.files:
                found = hashlib.sha256((folder / file.name).read_bytes()).hexdigest()
                assert found == file.digest.removeprefix("sha256:"), "a model's folder is damaged"


def settle(root: Path) -> set[str]:
    """Clean up; the files that are left."""
    Store.open(root).prune(3, partials=True)
    return files(root)


class Trial:
    """One scenario in a folder of its own, with what an undisturbed run of it leaves."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.folder = folder
        self.root = folder / "store"
        self.base = folder / "base"
        scenario.prepare(self.root)
        if self.root.exists():
            shutil.copytree(self.root, self.base)
        self.before = named(self.root)
        scenario.act(self.root)
        self.after = named(self.root)
        self.left = settle(self.root)

    def reset(self) -> Path:
        shutil.rmtree(self.root, ignore_errors=True)
        if self.base.exists():
            shutil.copytree(self.base, self.root)
        return self.root

    def check(self, root: Path, *, ended: bool = False) -> None:
        """All that must hold after a crash, for the tree ``root``."""
        if (root / "index.json").exists():
            whole(root)
        now = named(root)
        for name in self.before.keys() | self.after.keys():
            allowed = {self.after.get(name)} if ended else {self.before.get(name), self.after.get(name)}
            assert now.get(name) in allowed, f"{name} means {now.get(name)}"
        self.scenario.act(root)
        assert named(root) == self.after
        left = settle(root)
        assert left == self.left, f"rubbish: {left - self.left}; lost: {self.left - left}"
        whole(root)


def kills(trial: Trial) -> int:
    points = 0
    for number in range(1, 2000):
        for torn in (False, True):
            status, can_tear = crashing.killed_at(number, torn, trial.reset(), trial.scenario.act)
            if status == crashing.ENDED:
                return points
            assert status == -9, f"step {number}: the child ended with {status}"
            points += 1
            _tried(trial, trial.root, f"killed at step {number}{' (torn)' if torn else ''}")
            if not can_tear:
                break
    raise AssertionError("it never ends")


def cuts(trial: Trial) -> int:
    points = 0
    blobs.boot_id = lambda: "before the cut"  # type: ignore[assignment]
    for tree, ended in crashing.power_cuts(trial.reset(), trial.folder, trial.scenario.act):
        blobs.boot_id = lambda: "after the cut"  # type: ignore[assignment]
        points += 1
        _tried(trial, tree, f"power cut {tree.name}", ended=ended)
        shutil.rmtree(tree)
    return points


def full(trial: Trial) -> int:
    points = 0
    for number in range(1, 2000):
        status, reached = crashing.full_at(number, trial.reset(), trial.scenario.act)
        if not reached:
            break
        assert status == crashing.NO_SPACE or (status == crashing.ENDED and not trial.scenario.grows), (
            f"full disk at step {number}: the child ended with {status}"
        )
        points += 1
        _tried(trial, trial.root, f"full disk at step {number}")
    for size in (0, 1, 10, 27, 50, 100, 150, 200, 300, 400, 500, 700, 1000, 1499, 2000, 3000):
        status = crashing.limited_to(size, trial.reset(), trial.scenario.act)
        assert status in (crashing.NO_SPACE, crashing.ENDED), f"limit {size}: the child ended with {status}"
        points += 1
        _tried(trial, trial.root, f"a limit of {size} bytes")
    return points


def _tried(trial: Trial, root: Path, what: str, **more: Any) -> None:
    try:
        trial.check(root, **more)
    except BaseException as exc:
        exc.add_note(what)
        raise


# --- rivals -----------------------------------------------------------------------------------------------------------


def clean(root: Path) -> None:
    """The hardest collector there is."""
    Store.open(root).prune(0, partials=True)


def empty(root: Path) -> None:
    """Everybody else's models go, and with them the blobs that the operation may have found there."""
    from pierhead.errors import Conflict

    for name in ("kept", "alias", "other"):
        with contextlib.suppress(Conflict):  # a replica has it
            remove(root, name)


def same_file(root: Path) -> None:
    """A pull of a user's file whose bytes a model has already."""
    base(root)
    (root.parent / "user").mkdir(exist_ok=True)
    (root.parent / "user" / "mine.gguf").write_bytes(make_gguf(4000))
    (root.parent / "user" / "LICENSE").write_text("free")
    (root.parent / "user" / "a.jinja").write_text("{{ messages }}")
    fetch(Store.open(root), "kept", make_gguf(4000))


def same_archive(root: Path) -> None:
    archived(root)
    fetch(Store.open(root), "kept", make_gguf(4000))


def serve(root: Path) -> None:
    """A replica starts with a model that loses its name: it gets the whole model, or is told that it is gone."""
    from pierhead.errors import NotFound

    store = Store.open(root)
    try:
        record = store.get("kept")
        store.pin(record.digest, "replica3")
    except NotFound:
        return
    folder = store.materialize(record)
    for file in record.files:
        assert hashlib.sha256((folder / file.name).read_bytes()).hexdigest() == file.digest.removeprefix("sha256:")


def carry(root: Path) -> None:
    """An export of a model that loses its name: a whole archive, or none."""
    from pierhead.errors import NotFound
    from pierhead.sources.archive import import_models
    from pierhead.store.export import save

    out = root.parent / "carried.tar"
    try:
        save(Store.open(root), ["kept"], out, lambda *_: None)
    except NotFound:
        return
    with out.open("rb") as file:
        import_models(Store.open(root.parent / "there"), file, report=lambda *_: None)


def rename(root: Path) -> None:
    from pierhead.errors import NotFound

    with contextlib.suppress(NotFound):  # it was removed before
        Store.open(root).tag("kept", "new")


# --- registries -------------------------------------------------------------------------------------------------------


def pulled(root: Path) -> None:
    """A pull from a registry, in ranges that are smaller than the model."""
    from pierhead.config import SourceSettings
    from pierhead.paths import resolve
    from pierhead.sources.pull import pull

    paths = resolve({"PIERHEAD_HOME": str(root.parent / "home"), "HOME": str(root.parent)})
    where = (root.parent / "user" / "place").read_text()
    asyncio.run(pull(where, store=Store.open(root), settings=SourceSettings(), paths=paths, name="moving", env={}))


def push(root: Path, where: str) -> None:
    from pierhead.config import SourceSettings
    from pierhead.events import ignore
    from pierhead.refs import parse
    from pierhead.registry.name import image_name
    from pierhead.registry.publish import push_model

    place = image_name(parse(where))
    asyncio.run(push_model(Store.open(root), "real", place, settings=SourceSettings(), env={}, listener=ignore))


def new_place() -> str:
    host = os.environ["PIERHEAD_TEST_IMAGE"].partition("/")[0]
    return f"{host}/crash/{uuid.uuid4().hex[:12]}:v1"


def registered(root: Path) -> None:
    """A store, and a registry that has another model for one of its names, with a statement."""
    base(root)
    other = Store.open(root.parent / "other")
    say(other, fetch(other, "real", make_gguf(30_000)).digest, "good")
    (root.parent / "user").mkdir(exist_ok=True)
    (root.parent / "user" / "place").write_text(new_place())
    push(other.root, (root.parent / "user" / "place").read_text())


SCENARIOS["pull-registry"] = Scenario(pulled, registered, slow=True)


def pushes(folder: Path) -> int:
    """Kill a push before and after each of its requests, chunk by chunk; then push again, and pull it elsewhere."""
    from pierhead.registry import client
    from pierhead.registry import push as pushing

    pushing.CHUNK = 16_000  # type: ignore[misc]
    store = Store.open(folder / "store")
    say(store, fetch(store, "real", make_gguf(30_000)).digest, "good")
    digest = store.get("real").digest
    request = client.Registry.request
    for number in range(1, 2000):
        where, counter = new_place(), itertools.count(1)

        def step(counter: Iterator[int] = counter, number: int = number) -> None:
            if next(counter) == number:
                os.kill(os.getpid(), 9)

        @contextlib.asynccontextmanager
        async def counted(self: Any, *args: Any, step: Callable[[], None] = step, **more: Any) -> AsyncGenerator[Any]:
            step()
            async with request(self, *args, **more) as answer:
                yield answer
            step()

        def work(where: str = where, counted: Any = counted) -> None:
            client.Registry.request = counted  # type: ignore[method-assign]
            push(store.root, where)

        status = crashing.in_child(work)
        push(store.root, where)
        (folder / "user").mkdir(exist_ok=True)
        (folder / "user" / "place").write_text(where)
        shutil.rmtree(folder / "back", ignore_errors=True)
        pulled(folder / "back")
        back = Store.open(folder / "back")
        assert back.get("moving").digest == digest, f"killed at step {number}"
        assert back.verify("moving") == []
        assert back.referrers(digest) == store.referrers(digest)
        assert store.verify("real") == []
        if status == crashing.ENDED:
            assert settle(store.root) == settle(store.root)
            assert not list((store.root / "leases").iterdir())
            return number
        assert status == -9
    raise AssertionError("it never ends")


RACES: dict[str, tuple[Scenario, Callable[[Path], None]]] = {
    "pull-empty": (Scenario(lambda root: fetch(Store.open(root), "new", b"kept" * 500) and None), empty),
    "pull-unpromised-empty": (
        Scenario(lambda root: fetch(Store.open(root), "new", b"kept" * 500, promised=False) and None),
        empty,
    ),
    "package-empty": (Scenario(pack, same_file), empty),
    "import-empty": (Scenario(bring, same_archive), empty),
    "attach-clean": (SCENARIOS["attach"], clean),
    "use-clean": (SCENARIOS["use"], clean),
    "serve-empty": (Scenario(serve), empty),
    "carry-empty": (Scenario(carry, same_file), empty),
    "tag-empty": (Scenario(rename), empty),
}


def age(root: Path) -> Path:
    """Wait until the filesystem's clock has moved: what is in the store now is older than what comes."""
    probe = root.with_name("probe")
    probe.touch()
    begun = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == begun:
        probe.touch()
    return root


def races(trial: Trial, rival: Callable[[Path], None]) -> int:
    for number in range(1, 2000):
        status, reached = crashing.meanwhile(number, age(trial.reset()), trial.scenario.act, rival)
        if not reached:
            return number - 1
        assert status == crashing.ENDED, f"rival at step {number}: the child ended with {status}"
        try:
            whole(trial.root)
            now = named(trial.root)
            for name in trial.after.keys() - {"kept", "alias", "other"}:
                assert now.get(name) == trial.after[name] or trial.scenario.act is rename, f"{name} is lost"
            clean(trial.root)
            whole(trial.root)
        except BaseException as exc:
            exc.add_note(f"rival at step {number}")
            raise
    raise AssertionError("it never ends")


# --- the program -----------------------------------------------------------------------------------------------------


def main(name: str, folder: Path) -> None:
    history.now = lambda: TIME  # type: ignore[assignment]
    layout.now = lambda: TIME  # type: ignore[assignment]
    os.umask(0o022)
    if name == "push":
        print(json.dumps({"pushes": pushes(folder)}))
        return
    if name in RACES:
        scenario, rival = RACES[name]
        keep.MARGIN = 0  # type: ignore[misc]
        print(json.dumps({"races": races(Trial(scenario, folder), rival)}))
        return
    scenario = SCENARIOS[name]
    counts = {
        kind.__name__: kind(Trial(scenario, folder / kind.__name__))
        for kind in ((kills,) if scenario.slow else (kills, cuts, full))
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
