"""Trying a login before it is kept: the registry itself says whether it is good."""

from __future__ import annotations

from dataclasses import dataclass

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, NotFound, UsageError
from pierhead.registry.credentials import Login
from pierhead.registry.host import Host
from pierhead.registry.name import HUB
from pierhead.registry.places import is_host, own_place
from pierhead.registry.wire import Retry, persist


@dataclass(frozen=True)
class Tried:
    """What to keep: the login, or the token that the registry made in its stead; ``asked`` is whether it wants one."""

    login: Login
    asked: bool


def registry_host(text: str) -> str:
    """The registry that a user means: ``ghcr.io``, ``https://ghcr.io/``, ``docker.io``; UsageError for the rest."""
    bare = text.strip().lower()
    for start in ("oci://", "https://", "http://"):
        bare = bare.removeprefix(start)
    bare = bare.removesuffix("/v1/").removesuffix("/v2/").rstrip("/")
    if bare in ("index.docker.io", "registry-1.docker.io"):
        return HUB
    if not is_host(bare) or not ("." in bare or ":" in bare or bare == "localhost"):
        raise UsageError(
            f"'{text[:100]}' is not the address of a registry", hint="Write its host alone: pier login ghcr.io"
        )
    return bare


def bare_login(user: str, secret: str) -> Login:
    """A user and password; the user ``<token>`` stands for an identity token, as with Docker's helpers."""
    return Login(identity_token=secret) if user == "<token>" else Login(user, secret)


async def try_login(host: str, login: Login, settings: SourceSettings, *, retry: Retry | None = None) -> Tried:
    """Show the login to the registry. AccessDenied where it is refused, SourceUnavailable where nobody answers."""
    server = Host(own_place(host, settings), settings, login, offline=True)

    async def attempt() -> None:
        async with server.request("GET", f"{server.place.base}/v2/", scope=""):
            pass

    try:
        await persist(retry or Retry(attempts=3), attempt)
    except AccessDenied as exc:
        raise AccessDenied(
            f"{host} does not accept this user and password",
            hint="Some registries want an access token in place of the password.",
            data=exc.data,
        ) from exc
    except NotFound as exc:
        raise NotFound(f"{host} is not a registry: {exc.message}", hint="Check the host and its port.") from exc
    finally:
        await server.close()
    asked = bool(server.tokens.header(""))
    if server.tokens.refresh:
        return Tried(Login(login.user, identity_token=server.tokens.refresh), asked)
    return Tried(login, asked)
