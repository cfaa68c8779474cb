"""The shape of ``routes.toml`` and its reading: providers, and routes split among models; looks at no store."""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, cast, get_args, get_origin

import msgspec

from pierhead.daemon.baseurl import address
from pierhead.errors import ConfigError
from pierhead.gateway.link import Trouble
from pierhead.gateway.operations import OPERATIONS, OWN

_PROVIDER = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}\Z")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}\Z")
_ROUTE = re.compile(r"[^\s\x00-\x1f\x7f\"\\]{1,200}\Z")
_OURS = ("host", "authorization", "x-api-key", "api-key", "cookie", "content-length", "transfer-encoding", "connection")
_STICKY = ("user", "conversation", "key")


class Provider(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A remote API. ``base_url`` and ``secret`` are what its official client calls base URL and API key.

    Its ``models`` are offered as ``NAME/MODEL``; routes may name others, too. ``timeout`` are seconds to the first byte
    of an answer. ``auth`` says which header carries the secret; ``auto`` is what the dialect uses.
    """

    base_url: str
    dialect: Literal["openai", "anthropic"] = "openai"
    secret: str = ""
    auth: Literal["auto", "bearer", "x-api-key", "api-key"] = "auto"
    models: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()
    timeout: float = 0.0
    headers: dict[str, str] = {}
    ca_file: str = ""
    allow_http: bool = False
    context: int = 0
    slots: int = 0


class When(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who a destination is for: the holder of a key (name or id), senders of headers (a ``*`` ends a prefix)."""

    key: str = ""
    header: dict[str, str] = {}


class To(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A destination: a model here, or a provider's; those without ``when`` share what no condition took."""

    model: str
    provider: str = ""
    weight: float = 1.0
    when: When = When()


class Fallback(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who is asked next; ``on`` names the kinds of trouble."""

    model: str
    provider: str = ""
    on: tuple[Trouble, ...] = ("error", "overload", "timeout")


class Mirror(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who gets a copy of a ``share`` (0 to 1) of the requests; 0 tokens a day mean no bound."""

    model: str
    provider: str = ""
    share: float = 1.0
    tokens_per_day: int = 0
    requests_per_minute: int = 60
    concurrent: int = 4


class RouteTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A name for clients. ``replaces`` lets it stand in front of a model with the same name.

    ``sticky`` is ``user``, ``conversation``, ``key`` or ``header:NAME``; ``timeout`` are seconds to an attempt's first
    byte.
    """

    to: tuple[To, ...]
    sticky: str = ""
    timeout: float = 0.0
    fallback: tuple[Fallback, ...] = ()
    mirror: Mirror | None = None
    replaces: bool = False


class RouteFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of ``routes.toml``."""

    providers: dict[str, Provider] = {}
    routes: dict[str, RouteTable] = {}


def read(text: str, origin: str = "routes.toml") -> RouteFile:
    """The file's contents; ConfigError for what is not understood, with the place and the closest known word."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(
            f"{origin} is no TOML: {exc}", hint="Correct it; until then the last good one holds."
        ) from exc
    return checked(raw, origin)


def checked(raw: Mapping[str, Any], origin: str = "routes.toml") -> RouteFile:
    """The same of a document that is parsed already."""
    _known(raw, RouteFile, origin, "")
    try:
        file = msgspec.convert(raw, RouteFile)
    except msgspec.ValidationError as exc:
        what, _, where = str(exc).partition(" - at ")
        place = where.replace("`$.", "").replace("`", "") or "the top"
        raise ConfigError(f"{origin}: {what[0].lower()}{what[1:]}, at {place}", hint=_HINT) from exc
    for name, provider in file.providers.items():
        _check_provider(name, provider, f"{origin}: providers.{name}")
    for name, route in file.routes.items():
        _check_route(name, route, file, f"{origin}: routes.{name}")
    return file


_HINT = "docs/how-to/routes.md shows the whole shape."


def _known(value: Any, kind: Any, origin: str, at: str) -> None:
    """Refuse keys that the shape does not have, wherever they are."""
    origin_kind = get_origin(kind)
    if origin_kind in (Union, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
        origin_kind = get_origin(kind)
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        if origin_kind is dict:
            for name, inner in table.items():
                _known(inner, get_args(kind)[1], origin, f"{at}.{name}" if at else name)
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            fields = {f.name: f.type for f in msgspec.structs.fields(kind)}
            for name, inner in table.items():
                if name not in fields:
                    raise _unknown(name, tuple(fields), origin, at)
                _known(inner, fields[name], origin, f"{at}.{name}" if at else name)
    elif isinstance(value, list) and origin_kind is tuple:
        for number, inner in enumerate(cast("list[Any]", value)):
            _known(inner, get_args(kind)[0], origin, f"{at}[{number}]")


def _unknown(name: str, choices: tuple[str, ...], origin: str, at: str) -> ConfigError:
    close = difflib.get_close_matches(name, choices, 1)
    hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(choices)}."
    return ConfigError(f"{origin}: unknown key '{name}'{f' in {at}' if at else ''}", hint=hint)


def _refuse(message: str, hint: str = _HINT) -> ConfigError:
    return ConfigError(message, hint=hint)


def _check_provider(name: str, provider: Provider, at: str) -> None:
    if not _PROVIDER.match(name):
        raise _refuse(f"{at}: a provider's name has lower case letters, digits, '.', '-' and '_'")
    address(provider.base_url, allow_http=provider.allow_http, at=f"{at}.base_url")
    for header, value in provider.headers.items():
        if not _TOKEN.match(header) or not value.isprintable() or not value.isascii():
            raise _refuse(f"{at}.headers: '{header}' is not a header of printable ASCII")
        if header.lower() in _OURS:
            raise _refuse(
                f"{at}.headers: '{header}' is the gateway's to set",
                "A key belongs into `secret`, and `auth` says which header carries it.",
            )
    for model in provider.models:
        if not _ROUTE.match(model):
            raise _refuse(f"{at}.models: '{model[:60]!r}' is no name of a model")
    for operation in provider.serves:
        if operation not in OPERATIONS or operation.startswith(OWN):
            raise _unknown_operation(operation, at)
    _amounts(at, timeout=provider.timeout, context=provider.context, slots=provider.slots)


def _unknown_operation(operation: str, at: str) -> ConfigError:
    close = difflib.get_close_matches(operation, OPERATIONS, 1)
    known = ", ".join(o for o in OPERATIONS if not o.startswith(OWN))
    return _refuse(
        f"{at}.serves: there is no operation '{operation}'",
        f"Did you mean '{close[0]}'?" if close else f"Known: {known}.",
    )


def _check_route(name: str, route: RouteTable, file: RouteFile, at: str) -> None:
    if not _ROUTE.match(name):
        raise _refuse(f"{at}: a route's name has no blanks, quotes or control signs, and at most 200 signs")
    if not any(to.weight > 0 and to.when == When() for to in route.to):
        raise _refuse(
            f"{at}: no destination is for everybody",
            "At least one [[routes.NAME.to]] needs a weight above 0 and no `when`.",
        )
    for to in route.to:
        _amounts(f"{at}.to", weight=to.weight)
        for header, value in to.when.header.items():
            if not _TOKEN.match(header) or not value:
                raise _refuse(f"{at}.to.when: '{header}' needs a header's name and a value")
            if header.lower() in ("authorization", "x-api-key", "cookie"):
                raise _refuse(f"{at}.to.when: '{header}' is secret", 'Name the key: when = { key = "NAME" }.')
    if route.sticky not in ("", *_STICKY) and not _TOKEN.match(route.sticky.partition("header:")[2]):
        raise _refuse(f"{at}.sticky: '{route.sticky[:60]}' is none of {', '.join(_STICKY)}, header:NAME")
    _amounts(at, timeout=route.timeout)
    mirror = route.mirror
    if mirror is not None:
        if not 0 <= mirror.share <= 1:
            raise _refuse(f"{at}.mirror.share must be from 0 to 1")
        _amounts(
            f"{at}.mirror",
            tokens_per_day=mirror.tokens_per_day,
            requests_per_minute=mirror.requests_per_minute,
            concurrent=mirror.concurrent,
        )
    _check_names(route, file, at)


def _check_names(route: RouteTable, file: RouteFile, at: str) -> None:
    """Destinations are models, never other routes: so no request can go round."""
    mirror = (route.mirror,) if route.mirror is not None else ()
    for to in (*route.to, *route.fallback, *mirror):
        if to.provider and to.provider not in file.providers:
            close = difflib.get_close_matches(to.provider, file.providers, 1)
            hint = f"Did you mean '{close[0]}'?" if close else f"Add [providers.{to.provider}]."
            raise _refuse(f"{at}: there is no provider '{to.provider}'", hint)
        if not _ROUTE.match(to.model):
            raise _refuse(f"{at}: a destination needs a model, whose name has no blanks, quotes or control signs")
        if not to.provider and to.model in file.routes and not file.routes[to.model].replaces:
            raise _refuse(
                f"{at}: '{to.model}' is a route, and a route cannot lead to another",
                "Name the models that it leads to.",
            )


def _amounts(at: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1e15:  # also refuses NaN
            raise _refuse(f"{at}.{name} must be a number of at least 0")
