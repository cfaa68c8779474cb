"""A model of the store to a hub: which files go, the card among them, and to which protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, BadReference, UsageError
from pierhead.events import Listener, PushDone, PushProgress
from pierhead.refs import Reference
from pierhead.registry.wire import Retry, is_loopback
from pierhead.sources.card import model_card
from pierhead.sources.http import Http
from pierhead.sources.hub import Hub
from pierhead.sources.hub_push import Choose, HubPush, Place, Pushed, Report
from pierhead.sources.hubfile import HubFiles
from pierhead.sources.modelscope import BRANCH, COOKIE, ModelScope
from pierhead.sources.outgoing import Outgoing, files_of, of_bytes
from pierhead.sources.scope_push import ScopePush
from pierhead.sources.sender import Sender
from pierhead.store.files import os_errors
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord

CARD = "README.md"
_Run = Callable[[Choose, Report], Awaitable[Pushed]]
MAX_CARD = 4 << 20


@dataclass(frozen=True)
class Options:
    """What the user may say about a push to a hub; ``card`` is a file that becomes the model's card."""

    card: Path | None = None
    private: bool = False
    create: bool = True
    message: str = ""


async def push_to_hub(
    store: Store,
    model: str,
    target: Reference,
    options: Options,
    *,
    settings: SourceSettings,
    env: Mapping[str, str],
    listener: Listener,
    retry: Retry | None = None,
) -> PushDone:
    """Send ``model`` to a repository of a hub as one commit; what the hub has is not sent again.

    NotFound, AccessDenied, Conflict, UsageError or SourceUnavailable.
    """
    if target.tag or target.path:
        raise BadReference(
            f"{target} names more than a repository", hint=f"Write {target.kind}:{target.repo}[@BRANCH]."
        )
    record = await asyncio.to_thread(store.get, model)
    files = await asyncio.to_thread(files_of, store, record)
    own = await asyncio.to_thread(_own_card, options.card)
    place = Place(
        target.repo,
        target.revision or ("main" if target.kind == "hf" else BRANCH),
        options.private,
        options.create,
        options.message or f"Upload {record.name}",
    )

    def choose(there: frozenset[str]) -> list[Outgoing]:
        return _with_card(record, files, own, target, there)

    def report(path: str, done: int, total: int) -> None:
        listener(PushProgress(name=model, file=path, done=done, total=total))

    async with _push(target, place, settings, env, retry) as run:
        pushed = await run(choose, report)
    branch = f"@{place.branch}" if target.revision else ""
    done = PushDone(
        name=f"{target.kind}:{target.repo}{branch}",
        digest=record.digest,
        sent=pushed.sent,
        commit=pushed.commit,
        url=pushed.url,
    )
    listener(done)
    return done


@contextlib.asynccontextmanager
async def _push(
    target: Reference, place: Place, settings: SourceSettings, env: Mapping[str, str], retry: Retry | None
) -> AsyncGenerator[_Run]:
    """The protocol of the target's hub, with its connections open."""
    if target.kind == "hf":
        hub = Hub.from_environment(Http(settings, retry=retry), settings.hf_endpoint, env)
        token = _token(hub, "HF_TOKEN")
        async with Sender(settings, hub.address, token, retry=retry) as sender:
            yield lambda choose, report: HubPush(sender, place, choose, report).run()
        return
    async with Http(settings, retry=retry, cookie=COOKIE) as http:
        scope = ModelScope.from_environment(http, settings.ms_endpoint, env)
        token = _token(scope, "MODELSCOPE_API_TOKEN")
        async with Sender(settings, scope.address, token, retry=retry, cookie=COOKIE) as sender:
            yield lambda choose, report: ScopePush(sender, scope, place, choose, report).run()


def _token(hub: HubFiles, variable: str) -> str:
    token = hub.token_for(hub.address)
    if not token and not is_loopback(hub.host):
        raise AccessDenied(
            f"{hub.host} takes models only with a token", hint=f"Set {variable} to a token that may write."
        )
    return token


def _with_card(
    record: ModelRecord, files: list[Outgoing], own: bytes | None, target: Reference, there: frozenset[str]
) -> list[Outgoing]:
    """The user's card, else the model's own, else the repository's; where there is none, one is made."""
    if own is not None:
        return [*(f for f in files if f.path != CARD), of_bytes(CARD, own)]
    if any(f.path == CARD for f in files) or CARD in there:
        return files
    return [*files, of_bytes(CARD, model_card(record, files, target).encode())]


def _own_card(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with os_errors(f"cannot read the card {path}"):
        data = path.read_bytes()
    if len(data) > MAX_CARD:
        raise UsageError(f"{path} is larger than a card may be", hint="Keep it below 4 MB.")
    return data
