"""The composition root of the daemon: makes the parts, joins them, and runs them until told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from pierhead import __version__
from pierhead.config import Loaded
from pierhead.daemon.control import Counting, application
from pierhead.daemon.docker import LazyDocker
from pierhead.daemon.gateway_link import GatewayLink
from pierhead.daemon.gateway_process import Spawned, forget
from pierhead.daemon.keys import Keys
from pierhead.daemon.lifecycle import Announcer, Held, reopen_logs
from pierhead.daemon.modelbook import ModelBook
from pierhead.daemon.modelsettings import ModelDesk
from pierhead.daemon.prices import load as load_prices
from pierhead.daemon.routebook import RouteBook
from pierhead.daemon.routefile import RouteTable
from pierhead.daemon.routes import endpoint, routes
from pierhead.daemon.secrets import Secrets
from pierhead.daemon.usage import Usage
from pierhead.daemon.watch import FolderWatch
from pierhead.daemon.wire import GatewayInfo, RouteList, StatusInfo
from pierhead.engines.registry import engines
from pierhead.errors import PierError
from pierhead.events import AnyEvent, Listener, PullDone
from pierhead.fleet.building import Builder
from pierhead.fleet.layers import Layers
from pierhead.fleet.supervisor import Supervisor
from pierhead.gateway.link import Activity, Endpoint, Key, Price, Route, Snapshot
from pierhead.gateway.stderr import LogOfStderr
from pierhead.paths import Paths
from pierhead.refs import Reference
from pierhead.runtimes.environment import Environments
from pierhead.runtimes.process import ProcessRuntime
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord
from pierhead.trust.gate import Gate

log = logging.getLogger(__name__)

ADOPTION_WAIT = 2.0
_FOLD_EVERY = 5.0


class _Server(uvicorn.Server):
    """Serves the control API; signals are the daemon's own business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class Daemon:
    """The daemon of one installation (see ``daemon.parts.Parts`` for what the control API uses)."""

    def __init__(self, paths: Paths, loaded: Loaded, *, idle_exit: float) -> None:
        self.paths = paths
        self.settings = loaded.settings
        self.started = time.time()
        self.store = Store.open(paths.store)
        self.keys = Keys(paths.database, paths.state / "pepper", paths.state / "gateway" / "budgets.db")
        self.book = RouteBook(
            paths.config / "routes.toml", Secrets(paths.state / "secrets"), loaded.settings.sources.ca_file
        )
        self.usage = Usage(paths.state / "usage.db", paths.state / "gateway" / "usage", self.keys.names)
        self._docker = LazyDocker(paths.replicas, loaded.settings.runtime)
        self._environments = Environments(
            Path(loaded.settings.runtime.environments or paths.state / "environments"),
            loaded.settings.sources.pypi_installer,
        )
        self.gate = Gate(paths.config)
        book = ModelBook(paths.config / "models.toml")
        known = engines(loaded.settings)
        self.fleet = Supervisor(
            store=self.store,
            engines=known,
            layers=Layers(known, loaded, lambda: book.current),
            runtimes={
                "process": ProcessRuntime(paths.replicas, loaded.settings.runtime, self._environments),
                "docker": self._docker,
            },
            settings=loaded.settings,
            replicas_dir=paths.replicas,
            changed=self._fleet_changed,
            withdrawn=self._withdrawn,
            trusted=self._trusted,
            peaks=paths.state / "memory-peaks.json",
            build=Builder(self.store, paths.replicas).ensure,
        )
        self.models = ModelDesk(book, self.store, self.fleet, self._fleet_changed)
        self.link = GatewayLink(
            paths=paths,
            settings=loaded.settings.gateway,
            snapshot=self._snapshot,
            ensure=self._ensure,
            activity=self._activity,
            keep=self.fleet.keep_loaded,
            lost=self.fleet.gateway_lost,
        )
        self._origins = dict(loaded.origins)
        self._idle_exit = idle_exit
        self._idle_timer: asyncio.TimerHandle | None = None
        self._models: list[ModelRecord] = []
        self._keys: tuple[Key, ...] = ()
        self._key_names: dict[str, str] = {}
        self._pepper = ""
        self._prices: list[tuple[Price, str]] = []
        self._refresh = asyncio.Event()
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._hurry: asyncio.Task[None] | None = None
        self._log = LogOfStderr()
        self._counting = Counting(application(self), self._touch)

    # --- running --------------------------------------------------------------------------------------------------

    async def run(self, held: Held, announcer: Announcer, early: Spawned | None) -> None:
        """Serve until told to end; raises what kept it from starting."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        server = self._server()
        watch = FolderWatch(self.paths.store)
        loop.add_reader(watch.fd, self._store_event, watch)
        self.models.refresh()
        adoption = asyncio.create_task(self.fleet.adopt())
        background = [adoption, asyncio.create_task(self._refresh_models())]
        try:
            self._read_keys()
            self._read_prices()
            self._models = self.store.models()
            self._read_routes()
            await asyncio.wait({adoption}, timeout=ADOPTION_WAIT)  # so that the first snapshot names what runs
            await self.link.open(early)
            background.append(asyncio.create_task(self.link.run()))
            background.append(asyncio.create_task(self._serve(server, held)))
            background.append(asyncio.create_task(self.book.follow(self.link.push)))
            background.append(asyncio.create_task(self.models.follow()))
            background.append(asyncio.create_task(self._fold_usage()))
            self._touch()
            log.info("daemon %s ready, pid %d, gateway on %s", __version__, os.getpid(), ", ".join(self.link.listeners))
            announcer.ready({"pid": os.getpid(), "listeners": self.link.listeners})
            mode = await self._end
            log.info("ending: %s", mode)
            await self._close(mode)
        finally:
            loop.remove_reader(watch.fd)
            watch.close()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._docker.aclose()

    async def _serve(self, server: _Server, held: Held) -> None:
        """Serve the control API until cancelled; what it is answering then gets a moment to end."""
        serving = asyncio.create_task(server.serve(sockets=[held.socket]))
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            await serving

    def _signalled(self) -> None:
        """The first signal drains; a second one stops waiting for streams."""
        if self._end.done():
            self.fleet.gateway_lost()
            self._hurry = asyncio.create_task(self.link.hurry())
        self.shut_down("stop")

    def _hung_up(self) -> None:
        """SIGHUP: the terminal is gone; or, where there is none, log files were moved away."""
        if sys.stderr.isatty():
            self._signalled()
            return
        reopen_logs()
        self._log.reopen()
        self.link.reopen_logs()

    def _server(self) -> _Server:
        config = uvicorn.Config(
            self._counting,
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        return _Server(config)

    async def _close(self, mode: str) -> None:
        drain = mode == "stop"
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        await self.fleet.close(drain)
        await self.link.close(drain=drain, grace=self.settings.fleet.drain_timeout)
        if drain:
            await asyncio.to_thread(forget, self.paths)

    # --- for the control API --------------------------------------------------------------------------------------

    async def status(self) -> StatusInfo:
        """The state of this host."""
        runtimes = await asyncio.gather(*(r.capabilities() for r in self.fleet.chooser.runtimes.values()))
        hello = self.link.hello
        return StatusInfo(
            version=__version__,
            pid=os.getpid(),
            uptime_s=round(time.time() - self.started, 3),
            listeners=self.link.listeners,
            runtimes=tuple(runtimes),
            replicas=len(self.fleet.all()),
            models=len(self._models),
            gateway=GatewayInfo(
                hello.pid if hello else None, self.link.connected, self.link.connections, self.link.problems
            ),
            settings=msgspec.to_builtins(self.settings),
            origins=self._origins,
            idle_exit_s=self._idle_exit,
            route_problems=(await self.routes()).told(),
        )

    def _trusted(self, record: ModelRecord) -> None:
        """Ask the policy before a start; Untrusted when it refuses."""
        for warning in self.gate.check_start(self.store, record):
            log.warning("%s", warning)

    async def pull(self, reference: str, name: str | None, listener: Listener) -> None:
        """Fetch a model into the store; it is done once the gateway serves it."""
        from pierhead.sources.pull import pull

        done: list[AnyEvent] = []

        def tell(event: AnyEvent) -> None:
            (done.append if isinstance(event, PullDone) else listener)(event)

        await pull(
            reference,
            store=self.store,
            settings=self.settings.sources,
            paths=self.paths,
            listener=tell,
            name=name,
        )
        await self.models_refreshed()
        for event in done:
            listener(event)

    async def push(self, model: str, target: Reference, listener: Listener) -> None:
        """Send a model to a registry."""
        from pierhead.registry.name import image_name
        from pierhead.registry.publish import push_model
        from pierhead.registry.uploads import Uploads

        uploads = Uploads(self.paths.cache / "uploads")
        options: dict[str, Any] = {"settings": self.settings.sources, "env": os.environ, "uploads": uploads}
        await push_model(self.store, model, image_name(target), listener=listener, **options)

    async def models_refreshed(self) -> None:
        """Read the store again; returns once the gateway acts on it."""
        self._models = await asyncio.to_thread(self.store.models)
        self.link.push()
        await self.link.settled()

    def models_changed(self) -> None:
        """Read the store again soon."""
        self._refresh.set()

    async def keys_changed(self) -> None:
        """Read the keys again; returns once the gateway acts on them."""
        self._read_keys()
        self.link.push()
        await self.link.settled()

    async def prices_changed(self) -> list[tuple[Price, str]]:
        """Read the prices again; returns what holds once the gateway counts by it."""
        self._prices = await asyncio.to_thread(load_prices, self.paths.config)
        self.link.push()
        await self.link.settled()
        return self._prices

    async def routes(self) -> RouteList:
        """Every name that clients may send."""
        return self.book.list(self._model_routes(), self._key_names)

    async def check_routes(self, text: str) -> RouteList:
        """What a file with this text would offer."""
        return await asyncio.to_thread(self.book.check, text, self._model_routes(), self._key_names)

    async def change_route(self, name: str, table: RouteTable | None) -> RouteList:
        """Write one route, or take it out; returns once the gateway acts on it."""
        await (self.book.remove(name) if table is None else self.book.put(name, table))
        self.link.push()
        await self.link.settled()
        return await self.routes()

    def shut_down(self, mode: str) -> None:
        """Begin to end: ``stop`` or ``handover``."""
        if not self._end.done():
            self._end.set_result(mode)

    # --- for the gateway ------------------------------------------------------------------------------------------

    def _snapshot(self, version: int) -> Snapshot:
        return Snapshot(
            version=version,
            routes=self.book.routes(self._model_routes(), self._key_names),
            keys=self._keys,
            pepper=self._pepper,
            prices=tuple(price for price, _ in self._prices),
            control_socket=str(self.paths.control_socket),
        )

    def _model_routes(self) -> tuple[Route, ...]:
        return routes(self._known(), self.fleet.replicas(), self.fleet.capabilities, self.fleet.layers.adapters)

    def _known(self) -> list[ModelRecord]:
        """The models as last read from the store, and those that run though they came later."""
        known = {model.digest for model in self._models}
        return [*self._models, *(r.life.model for r in self.fleet.all() if r.life.model.digest not in known)]

    async def _withdrawn(self) -> None:
        await self.link.settled()

    async def _ensure(self, model: str, failed: str, listener: Listener) -> Endpoint:
        base, adapter = await asyncio.to_thread(self.models.parted, model)
        info = await self.fleet.ensure_ready(base, failed=failed, listener=listener, by_request=True)
        return endpoint(info) if not adapter else self.models.adapted(info, adapter)

    def _activity(self, activity: Activity) -> None:
        self.fleet.activity(activity.replica, activity.open, activity.last_used)

    def _read_prices(self) -> None:
        try:
            self._prices = load_prices(self.paths.config)
        except PierError as exc:  # budgets in money are refused then, which is no reason not to start
            log.error("no prices: %s", exc)

    def _read_keys(self) -> None:
        self._keys = self.keys.accepted()
        self._key_names = {name: k.id for k in self.keys.list() for name in (k.name, k.id)}
        self._pepper = self.keys.pepper().hex() if self._keys else ""

    def _read_routes(self) -> None:
        self.paths.config.mkdir(parents=True, exist_ok=True)  # watched, so that a file which comes later is seen
        self.book.secrets.open_folder()
        self.book.refresh()

    # --- changes --------------------------------------------------------------------------------------------------

    def _fleet_changed(self) -> None:
        self.link.push()
        self._touch()

    def _store_event(self, watch: FolderWatch) -> None:
        if "index.json" in watch.names():
            self._refresh.set()

    async def _refresh_models(self) -> None:
        while True:
            await self._refresh.wait()
            self._refresh.clear()
            try:
                self._models = await asyncio.to_thread(self.store.models)
            except (PierError, OSError) as exc:
                log.warning("cannot read the store: %s", exc)
            self.link.push()

    async def _fold_usage(self) -> None:
        """Take in the gateways' journals now and then; whoever asks for usage has them taken in first."""
        while True:
            try:
                await asyncio.to_thread(self.usage.fold)
            except (PierError, OSError) as exc:
                log.warning("cannot sum up the usage: %s", exc)
            await asyncio.sleep(_FOLD_EVERY)

    def _touch(self) -> None:
        """Something happened: the idle exit counts from now, unless there is something to stay up for."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._idle_exit > 0 and not self._end.done():
            self._idle_timer = asyncio.get_running_loop().call_later(self._idle_exit, self._idle)

    def _idle(self) -> None:
        if self.fleet.busy or self._counting.open or self.link.connections:
            self._touch()
        else:
            log.info("nothing to do for %g s", self._idle_exit)
            self.shut_down("stop")


async def run(
    paths: Paths, loaded: Loaded, held: Held, announcer: Announcer, early: Spawned | None, *, idle_exit: float
) -> None:
    """Make the daemon and run it to its end."""
    await Daemon(paths, loaded, idle_exit=idle_exit).run(held, announcer, early)
