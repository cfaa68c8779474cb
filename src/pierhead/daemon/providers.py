"""Providers and configured routes as the gateway gets them: addresses, keys filled in, plans; reads nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from pierhead.daemon.baseurl import address
from pierhead.daemon.routefile import Fallback, Mirror, Provider, RouteFile, RouteTable, To, When
from pierhead.errors import PierError
from pierhead.gateway import link

_SERVES = {"openai": ("chat", "completions", "embeddings"), "anthropic": ("messages", "count-tokens")}
_AUTH = {
    "bearer": ("authorization", "Bearer "),
    "x-api-key": ("x-api-key", ""),
    "api-key": ("api-key", ""),
}


def remote(name: str, provider: Provider, secret: str) -> link.Remote:
    """The provider with its key."""
    where = address(provider.base_url, allow_http=provider.allow_http, at=f"providers.{name}.base_url")
    path = where.path
    if provider.dialect == "anthropic" and not path.endswith("/v1"):
        path += "/v1"  # Anthropic's clients add it themselves, OpenAI's do not
    auth = provider.auth
    if auth == "auto":
        auth = "x-api-key" if provider.dialect == "anthropic" else "bearer"
    header, before = _AUTH[auth]
    return link.Remote(
        provider=name,
        host=where.host,
        port=where.port,
        tls=where.tls,
        path=path,
        dialect=provider.dialect,
        credential=link.Credential(header, before + secret) if secret else None,
        headers=tuple(sorted((header.lower(), value) for header, value in provider.headers.items())),
        ca_file=provider.ca_file,
        timeout=provider.timeout,
    )


@dataclass(frozen=True)
class Made:
    """What the gateway gets of a file; ``problems`` are (route or provider, what keeps it from working as written)."""

    routes: tuple[link.Route, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()


@dataclass
class _Making:
    file: RouteFile
    models: Mapping[str, str]  # every spelling of a model in the store → its route's name
    keys: Mapping[str, str]  # name and id of every key → its id
    read: Callable[[str], str]
    endpoints: dict[str, link.Remote] = field(default_factory=dict[str, link.Remote])
    hidden: dict[str, link.Route] = field(default_factory=dict[str, link.Route])
    problems: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def providers(self) -> None:
        """Reach for every secret once; a provider without its own is left out and told of."""
        for name, provider in self.file.providers.items():
            try:
                secret = self.read(provider.secret) if provider.secret else ""
            except PierError as exc:
                self.problems.append((name, f"{exc.message}. {exc.hint or ''}".strip()))
                continue
            self.endpoints[name] = remote(name, provider, secret)
            for model in provider.models:
                self.offer(name, model, hidden=False)

    def offer(self, provider: str, model: str, *, hidden: bool) -> str:
        """The name of the gateway's route to a provider's model; "" when the provider cannot be used."""
        name = f"{provider}/{model}"
        known = self.hidden.get(name)
        if known is not None:
            return name
        where, settings = self.endpoints.get(provider), self.file.providers[provider]
        if where is None:
            return ""
        if name in self.models:
            self.problems.append((name, "a model of the store has this name; call the provider otherwise"))
            return ""
        endpoint = link.Endpoint(
            replica=name,
            socket=settings.base_url,
            serves=settings.serves or _SERVES[settings.dialect],
            slots=settings.slots,
            context=settings.context,
            model=model,
            remote=where,
        )
        card = {"id": name, "object": "model", "created": 0, "owned_by": provider}
        # A plan that leads to itself: its time to the first byte holds without a configured route, too.
        plan = link.Plan(to=(link.Share(name),)) if where.timeout else None
        self.hidden[name] = link.Route(name=name, endpoints=(endpoint,), card=card, hidden=hidden, plan=plan)
        return name

    def destination(self, route: str, to: To | Fallback | Mirror) -> str:
        """The name of the route that ``to`` means; a model here before a provider's; "" when there is neither."""
        if to.provider:
            found = self.offer(to.provider, to.model, hidden=True)
        else:
            found = self.models.get(to.model, "")
            provider, slash, model = to.model.partition("/")
            if not found and slash and model and provider in self.file.providers:
                found = self.offer(provider, model, hidden=True)
        if not found:
            first, slash, _ = to.model.partition("/")
            provider = to.provider or first
            meant = f", or describe its provider: [providers.{first}]" if slash and not to.provider else ""
            why = (
                f"the provider '{provider}' cannot be used"
                if provider in self.file.providers
                else f"the model '{to.model}' is not in the store. Type: pier pull {to.model}{meant}"
            )
            self.problems.append((route, why))
        return found

    def route(self, name: str, table: RouteTable) -> link.Route | None:
        """One configured route; None when nobody could answer for it, or a model has its name."""
        if name in self.models and not table.replaces:
            self.problems.append((name, "a model has this name and answers. To put the route first: replaces = true"))
            return None
        groups: dict[str, tuple[When, list[link.Share]]] = {}
        for to in table.to:
            found = self.destination(name, to)
            if found:
                groups.setdefault(repr(to.when), (to.when, []))[1].append(link.Share(found, to.weight))
        everybody = tuple(groups.pop(repr(When()), (When(), []))[1])
        fallbacks = tuple(
            link.Fallback(found, fallback.on)
            for fallback in table.fallback
            if (found := self.destination(name, fallback))
        )
        if not everybody and not fallbacks:
            return None
        plan = link.Plan(
            to=everybody,
            rules=tuple(rule for when, to in groups.values() if (rule := self.rule(name, when, tuple(to))) is not None),
            fallbacks=fallbacks,
            sticky=table.sticky.lower() if table.sticky.startswith("header:") else table.sticky,
            timeout=table.timeout,
            mirror=self.mirror(name, table.mirror),
        )
        aliases = (f"{name}:latest",) if ":" not in name.rpartition("/")[2] else ()
        card = {"id": name, "object": "model", "created": 0, "owned_by": "pierhead"}
        return link.Route(name=name, aliases=aliases, card=card, plan=plan)

    def rule(self, route: str, when: When, to: tuple[link.Share, ...]) -> link.Rule | None:
        """The conditions of a group; None when its key is gone: nobody fulfils it."""
        matches: list[link.Match] = []
        if when.key:
            known = self.keys.get(when.key, "")
            if not known:
                self.problems.append((route, f"there is no key '{when.key}'. `pier key list` shows those that hold"))
                return None
            matches.append(link.Match(known))
        for header, value in when.header.items():
            prefix = value.endswith("*")
            matches.append(link.Match(value[:-1] if prefix else value, header.lower(), prefix))
        return link.Rule(tuple(matches), to)

    def mirror(self, route: str, table: Mirror | None) -> link.Mirror | None:
        """The shadow, if its destination is there."""
        if table is None or not (found := self.destination(route, table)):
            return None
        return link.Mirror(found, table.share, table.tokens_per_day, table.requests_per_minute, table.concurrent)


def make(
    file: RouteFile,
    models: Collection[link.Route],
    keys: Mapping[str, str],
    read: Callable[[str], str],
) -> Made:
    """The routes of ``file`` beside those of the models in the store; ``read`` gives a secret's text or PierError."""
    spellings = {spelling: m.name for m in models for spelling in (*m.aliases, m.name)}
    making = _Making(file, spellings, keys, read)
    making.providers()
    routes = [made for name, table in file.routes.items() if (made := making.route(name, table)) is not None]
    return Made((*routes, *making.hidden.values()), tuple(dict.fromkeys(making.problems)))
