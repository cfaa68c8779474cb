"""The verb dev: a model is served from its folder, and anew whenever a file of it is saved."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import click

from pierhead import events
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import here, print_json_line, printable, say
from pierhead.cli.progress import bars
from pierhead.daemon.client import Client
from pierhead.errors import EngineFailed, NotFound, PierError
from pierhead.paths import Paths
from pierhead.store.model import ModelRecord

_EXAMPLES = (
    ("pier dev ./my_model.py", "Serve a Python class; save the file, and the next answer is the new one's."),
    ("pier dev ./my-folder sentiment", "A folder of Python, ONNX, GGUF …, under another name."),
    ("pier dev ./my_model.py --option max-batch-size=8 --runtime docker", "With settings, in a container."),
)
_FEW = 3  # files that are named


@click.command(cls=Verb, examples=_EXAMPLES)
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("name", required=False)
@option("--engine", metavar="NAME", help="Which engine serves it [default: the first that can]")
@option("--runtime", type=click.Choice(["auto", "process", "docker"]), help="Where the engine runs.")
@option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Any engine parameter; repeatable.")
@json_option
def dev(path: Path, name: str | None, as_json: bool, **given: Any) -> None:
    """Serve the model in PATH while you work on it.

    The file or folder is packaged as NAME (else as it is called itself) and started. When something in it is saved,
    that is done again beside what runs; requests go over to the new one once it answers. When it does not, the reason
    is shown and the one before goes on. Ctrl-C ends it; the model stays in the store.
    """
    from pierhead.cli.request import engine_settings

    path = path.expanduser().absolute()
    if not path.exists():
        raise NotFound(f"no such file or folder: {path}", hint="Check the path.")
    wanted = engine_settings(given["options"], None) | ({"engine": given["engine"]} if given["engine"] else {})
    called = name or path.stem.lower().replace("_", "-")
    workshop = Workshop(here(), path, called, {"settings": wanted, "runtime": given["runtime"]}, as_json=as_json)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it in another way ends it in full, too
    with contextlib.suppress(KeyboardInterrupt), watched(path) as saved:
        workshop.serve(())
        while True:
            workshop.serve(saved())
    workshop.close()


class Workshop:
    """One model at work: packages it, starts it beside the one before, and lets requests go over."""

    def __init__(self, paths: Paths, path: Path, name: str, wanted: dict[str, Any], *, as_json: bool) -> None:
        from pierhead.cli.package import created

        self._paths = paths
        self._path = path
        self._name = name
        self._wanted = {key: value for key, value in wanted.items() if value}
        self._json = as_json
        self._client = Client(paths)
        self._created = created(os.environ)  # the same all the time: the same files are the same model
        self._pins: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._serving = ""  # the digest of what answers

    def serve(self, saved: tuple[str, ...]) -> None:
        """Serve what is in the folder now; what is wrong with it is told, and what runs goes on."""
        if saved:
            more = f" and {len(saved) - _FEW} more" if len(saved) > _FEW else ""
            self._tell("saved", f"{', '.join(saved[:_FEW])}{more} saved.", files=list(saved))
        began = time.monotonic()
        try:
            with bars() as listener:
                record = self._package(listener)
                if record.digest == self._serving:
                    self._tell("same", "Nothing of the model has changed.")
                    return
                self._swap(record, events.ignore if self._json else listener)
        except PierError as exc:
            self._refused(exc)
            return
        seconds = time.monotonic() - began
        first, self._serving = not self._serving, record.digest
        told = f"Serving {self._name} ({record.digest[7:19]}), {seconds:.1f} s after it was saved."
        self._tell("serving", told if not first else self._greeting(record), digest=record.digest, seconds=seconds)

    def _package(self, listener: events.Listener) -> ModelRecord:
        from pierhead.cli.models import open_store
        from pierhead.cli.package import python_inputs
        from pierhead.package.build import package
        from pierhead.package.inputs import detect
        from pierhead.package.python_model import is_program
        from pierhead.package.recipe import Recipe

        with tempfile.TemporaryDirectory(prefix="pier-package-") as scratch:
            program = is_program(self._path)
            base = python_inputs(self._path, Path(scratch), pins=self._pins) if program else detect(self._path)
            aside = bool(self._serving)
            return package(open_store(self._paths), Recipe(self._name, base, self._created, aside=aside), listener)

    def _swap(self, record: ModelRecord, listener: events.Listener) -> None:
        """Start the model beside the one before; once it answers, the name means it and the other is drained."""
        self._client.ensure_daemon()
        before = self._serving
        version = f"{self._name}@{record.digest}" if before else self._name
        try:
            for event in self._client.events("POST", "/replicas", {"model": version, **self._wanted}):
                listener(event)
        except PierError:
            if before:
                self._leave(record.digest)
            raise
        if before:
            self._client.request("POST", "/models/copy", {"source": version, "target": self._name})
            self._leave(before)

    def _end(self, digest: str) -> None:
        """Let what an earlier version is answering come to its end."""
        running = [one for one in self._client.get("/replicas") if one["digest"] == digest]
        for one in running:
            with contextlib.suppress(NotFound):
                self._client.request("DELETE", f"/replicas/{one['id']}", timeout=600)

    def _leave(self, digest: str) -> None:
        """End and remove a version that nobody has asked to keep; what is still held stays until `pier prune`."""
        self._end(digest)
        with contextlib.suppress(PierError):
            self._client.request("DELETE", f"/models/{self._name}@{digest}")

    def _refused(self, error: PierError) -> None:
        goes_on = "The one before goes on." if self._serving else "Nothing is served yet; save it again."
        if self._json:
            print_json_line({"event": "refused", "error": error.to_dict(), "serving": self._serving})
            return
        log = error.data.get("log") if isinstance(error, EngineFailed) else None
        for line in log[-20:] if isinstance(log, list) else ():  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            say(f"  | {printable(str(line))}")  # pyright: ignore[reportUnknownArgumentType]
        say(f"{click.style('Not served:', fg='red', bold=True)} {printable(error.message)}")
        say(f"  {goes_on}")

    def _greeting(self, record: ModelRecord) -> str:
        from pierhead.cli.operate import addresses

        base, *_ = addresses(self._client.get("/status")).splitlines()
        python = record.metadata.get("format") == "python"
        about = f"\n  {base}/models/{self._name}/openapi.json describes it." if python else ""
        return f"Serving {self._name} at {base}.{about}\n  Save a file to serve it anew; Ctrl-C ends."

    def _tell(self, event: str, text: str, **data: Any) -> None:
        if self._json:
            print_json_line({"event": event, "model": self._name, **data})
        else:
            say(text)

    def close(self) -> None:
        """End what this started."""
        if self._serving:
            with contextlib.suppress(PierError):
                self._end(self._serving)
            self._tell("ended", f"Ended. {self._name} stays in the store: `pier run {self._name}` starts it again.")


@contextlib.contextmanager
def watched(path: Path) -> Generator[Any]:
    """Yields a function that waits until files are saved, and names them; what is saved meanwhile is not missed."""
    import watchfiles

    over = threading.Event()
    found: queue.Queue[set[str]] = queue.Queue()
    folder = path if path.is_dir() else path.parent  # editors replace files: a file itself would be lost
    keeps = watchfiles.DefaultFilter()

    def wanted(change: watchfiles.Change, name: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(name).relative_to(folder).parts)
        return keeps(change, name) and not hidden and (path.is_dir() or Path(name) == path)

    def watch() -> None:
        options: dict[str, Any] = {"recursive": path.is_dir(), "raise_interrupt": False}
        for changes in watchfiles.watch(folder, watch_filter=wanted, stop_event=over, rust_timeout=500, **options):
            found.put({os.path.relpath(name, folder) for _, name in changes})

    def saved() -> tuple[str, ...]:
        names = found.get()
        with contextlib.suppress(queue.Empty):
            while True:
                names |= found.get_nowait()
        return tuple(sorted(names))

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield saved
    finally:
        over.set()
        thread.join(2)
