"""Verbs about registries: push, login, logout; none needs a daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import click

from pierhead import events
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import known, open_store
from pierhead.cli.output import here, print_json, say, settings, size
from pierhead.cli.progress import bars
from pierhead.errors import BadReference, UsageError
from pierhead.refs import parse

if TYPE_CHECKING:
    from pierhead.registry.credentials import Login

_LIMIT = 1 << 20  # bytes of a password


@click.command(
    cls=Verb,
    examples=(
        ("pier push smollm2 localhost:5000/team/smollm2:1.0", "To a registry of your own."),
        ("pier push smollm2 oci://ghcr.io/team/smollm2:1.0", "With the login of `pier login` or `docker login`."),
        ("pier push smollm2 hf:me/smollm2-gguf --private", "To Hugging Face, with a card, as one commit."),
    ),
)
@click.argument("model", shell_complete=complete_model)
@click.argument("target", required=False)
@option("--card", metavar="FILE", help="Hubs: the model's card; without one the model's own, else one is written.")
@option("--private", is_flag=True, help="Hubs: make a repository that does not exist a private one.")
@option("--create/--no-create", default=True, help="Hubs: make a repository or branch that does not exist.")
@option("--message", metavar="TEXT", help="Hubs: the message of the commit.")
@json_option
def push(
    model: str, target: str | None, card: str | None, private: bool, create: bool, message: str | None, as_json: bool
) -> None:
    """Send a model to a registry or a hub.

    TARGET is oci://host/repository:tag; without it MODEL's own name must be one. What the registry has already is not
    sent again. Logins are those of Docker's config.json. With --json each line is one event.

    To a hub (hf:org/repo, ms:org/repo, with @BRANCH for another branch) go the model's files and a card, as one commit.
    The token is HF_TOKEN or what `hf auth login` kept, or MODELSCOPE_API_TOKEN.
    """
    from pierhead.registry.name import image_name
    from pierhead.registry.publish import push_model
    from pierhead.registry.uploads import Uploads

    paths = here()
    store = open_store(paths)
    known(store, model)
    reference = parse(target or model)
    if target and reference.kind in ("hf", "ms"):
        from pierhead.cli.hub import push_model_to_hub

        push_model_to_hub(store, model, reference, card=card, private=private, create=create, message=message or "",
                          as_json=as_json)  # fmt: skip
        return
    if card or private or message or not create:
        raise UsageError(
            "--card, --private, --no-create and --message are for hubs", hint=f"Type `pier push {model} hf:ORG/REPO`."
        )
    if reference.kind not in ("oci", "short") or (reference.kind == "short" and "/" not in reference.repo):
        raise BadReference(
            f"'{target or model}' does not name a place in a registry",
            hint=f"Type `pier push {model} oci://HOST/REPO:TAG`.",
        )
    if reference.kind == "short":
        reference = parse(f"oci://{reference}")
    wanted = settings(paths).settings.sources
    place, uploads = image_name(reference), Uploads(paths.cache / "uploads")

    def send(listener: events.Listener) -> Coroutine[Any, Any, events.PushDone]:
        options: dict[str, Any] = {"settings": wanted, "env": os.environ, "uploads": uploads}
        return push_model(store, model, place, listener=listener, **options)

    if as_json:

        def emit(event: events.AnyEvent) -> None:
            sys.stdout.write(events.encode(event).decode() + "\n")
            sys.stdout.flush()

        asyncio.run(send(emit))
        return
    with bars() as listener:
        done = asyncio.run(send(listener))
    say(f"Pushed {done.name}, {size(done.sent)} sent." + ("" if done.sent else " The registry had everything."))
    click.echo(done.digest)


@click.command(
    cls=Verb,
    examples=(
        ("pier login ghcr.io", "Ask for user and password, or access token."),
        ("pier login ghcr.io -u me --password-stdin < token.txt", "For scripts: the password never is an argument."),
    ),
)
@click.argument("host")
@option("-u", "--username", metavar="USER", help="User; `<token>` when the password is an identity token.")
@option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@json_option
def login(host: str, username: str | None, password_stdin: bool, as_json: bool) -> None:
    """Keep a login for a registry.

    HOST is asked whether the login is good before it is kept: in the credential helper that Docker's config.json names
    (credsStore, credHelpers), else in config.json itself, readable by you alone. Docker and Podman find it there too.
    DOCKER_CONFIG and REGISTRY_AUTH_FILE say where else that file is.
    """
    from pierhead.registry.keeping import keep_login
    from pierhead.registry.login import registry_host, try_login

    place = registry_host(host)
    given = _given(place, username, password_stdin)
    tried = asyncio.run(try_login(place, given, settings(here()).settings.sources))
    kept = keep_login(place, tried.login, os.environ)
    user = tried.login.user or "<token>"
    if as_json:
        token = bool(tried.login.identity_token)
        print_json({"host": place, "user": user, "kept_in": kept, "identity_token": token, "asked": tried.asked})
        return
    if not tried.asked:
        say(f"{place} wants no login to begin with, so this one could not be tried.")
    say(f"Logged in to {place} as {user}; kept in {kept}.")


def _given(place: str, username: str | None, password_stdin: bool) -> Login:
    """The login that the user types, or pipes in."""
    from pierhead.registry.login import bare_login

    if password_stdin:
        if not username:
            raise UsageError(
                "--password-stdin needs the user beside it",
                hint=f"Type `pier login {place} -u USER --password-stdin < FILE`.",
            )
        secret = sys.stdin.buffer.read(_LIMIT).decode(errors="strict").rstrip("\r\n")
    elif not sys.stdin.isatty():
        raise UsageError(
            "a password can only be asked for on a terminal",
            hint=f"Type `pier login {place} -u USER --password-stdin < FILE`.",
        )
    else:
        username = username or click.prompt("User", err=True)
        secret = click.prompt("Password or token", hide_input=True, err=True)
    if not secret:
        raise UsageError("the password is empty", hint=f"Type `pier login {place}`.")
    if not username or ":" in username:
        raise UsageError("a user has a name without a colon", hint=f"Type `pier login {place}`.")
    return bare_login(username, secret)


@click.command(cls=Verb, examples=(("pier logout ghcr.io", "Forget the login everywhere it is kept."),))
@click.argument("host")
@json_option
def logout(host: str, as_json: bool) -> None:
    """Forget the login for a registry.

    It is removed from Docker's config.json, from Podman's auth.json, and from their credential helpers.
    """
    from pierhead.registry.keeping import forget_login
    from pierhead.registry.login import registry_host

    place = registry_host(host)
    found = forget_login(place, os.environ)
    if as_json:
        print_json({"host": place, "removed_from": found})
    else:
        say(f"Removed the login for {place} from {', '.join(found)}." if found else f"There is no login for {place}.")
