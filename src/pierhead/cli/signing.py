"""Verbs that sign and verify models, and list what is attached to them; they need no daemon."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import age, here, print_json, say, settings, size, table
from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, Untrusted, UsageError

PASSWORDS = ("PIERHEAD_KEY_PASSWORD", "COSIGN_PASSWORD")
TOKEN = "SIGSTORE_ID_TOKEN"  # noqa: S105  # the name of a variable
_WHO = "Who may have signed"
_KEYLESS = "Keyless"


@click.command(
    cls=Verb,
    examples=(
        ("pier sign --generate-key team", "Make team.key (encrypted) and team.pub."),
        ("pier sign assistant --key team.key", "A model of the store; the signature goes along with a push."),
        ("pier sign oci://ghcr.io/team/m:1 --key team.key", "A model in a registry."),
        ("pier sign assistant --keyless", "With the identity of this CI job, or a token in SIGSTORE_ID_TOKEN."),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@option("--key", type=click.Path(path_type=Path), metavar="FILE", help="The private key to sign with.")
@option("--keyless", is_flag=True, section=_KEYLESS, help="Sign with a short-lived certificate from Sigstore.")
@option(
    "--trust-config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    section=_KEYLESS,
    help="The client trust configuration of a private Sigstore.",
)
@option("--generate-key", metavar="PREFIX", section="Keys", help="Make PREFIX.key and PREFIX.pub instead of signing.")
@option(
    "--key-type",
    type=click.Choice(["ecdsa-p256", "ecdsa-p384", "ed25519"]),
    default="ecdsa-p256",
    show_default=True,
    section="Keys",
    help="The kind of the new key.",
)
@json_option
def sign(
    model: str | None,
    key: Path | None,
    keyless: bool,
    trust_config: Path | None,
    generate_key: str | None,
    key_type: Any,
    as_json: bool,
) -> None:
    """Sign a model.

    MODEL is one of the store, or oci://… in its registry. The signature is a Sigstore bundle about the digest of the
    manifest, attached as a referrer, which cosign reads. A password is taken from PIERHEAD_KEY_PASSWORD or
    COSIGN_PASSWORD, or asked for.
    """
    if generate_key:
        _generate(generate_key, key_type)
        return
    if model is None or (key is None) == (not keyless):
        raise UsageError(
            "say which model and with what", hint="`pier sign MODEL --key FILE`, or `pier sign MODEL --keyless`"
        )
    from pierhead.trust.dsse import SIGNED
    from pierhead.trust.signing import place_of, signed

    how = signing_with(key, trust_config)
    paths = here()
    sources = settings(paths).settings.sources

    async def run() -> tuple[str, str]:
        async with place_of(model, open_store(paths), sources, os.environ) as place:
            made = await asyncio.to_thread(signed, place.subject, SIGNED, {}, how, place.name)
            await place.attach(made)
            return place.subject.digest, made.digest

    digest, referrer = asyncio.run(run())
    if as_json:
        print_json({"model": model, "digest": digest, "signature": referrer})
        return
    say(f"Signed {model}." + ("" if model.startswith("oci://") else " `pier push` takes the signature along."))
    click.echo(referrer)


def signing_with(key: Path | None, trust_config: Path | None) -> Any:
    """The way to sign that the options ask for; passwords and tokens come from the environment or the terminal."""
    from pierhead.trust.signing import keyless, with_key

    if key is None:
        return keyless(_token(), trust_config)
    from pierhead.trust.keys import load_private, needs_password

    pem = read_key(key)
    return with_key(load_private(pem, _password() if needs_password(pem) else None))


def read_key(path: Path) -> bytes:
    """A key's file, bounded."""
    from pierhead.trust.keys import MAX_KEY_FILE

    try:
        with path.expanduser().open("rb") as file:
            return file.read(MAX_KEY_FILE)
    except FileNotFoundError as exc:
        raise NotFound(f"there is no key {path}", hint="`pier sign --generate-key PREFIX` makes a pair.") from exc


def _password(*, new: bool = False) -> bytes:
    for name in PASSWORDS:
        if name in os.environ:
            return os.environ[name].encode()
    if not os.isatty(0):
        raise AccessDenied(
            "the key is protected by a password, and there is no terminal to ask for it",
            hint="Set PIERHEAD_KEY_PASSWORD.",
        )
    return str(
        click.prompt("Password of the key", hide_input=True, confirmation_prompt=new, default="", err=True)
    ).encode()


def _token() -> str:
    if os.environ.get(TOKEN):
        return os.environ[TOKEN]
    from pierhead.trust.extra import extra

    with extra():
        from id import IdentityError, detect_credential
    try:
        found = detect_credential("sigstore")
    except IdentityError as exc:
        raise AccessDenied(f"no identity token from this machine: {str(exc)[:200]}", hint=f"Set {TOKEN}.") from exc
    if not found:
        raise AccessDenied(
            "keyless signing needs an identity token, and this machine offers none",
            hint=f"Set {TOKEN} to an OpenID Connect token made for the audience 'sigstore'.",
        )
    return str(found)


def _generate(prefix: str, kind: Any) -> None:
    from pierhead.trust.keys import encrypted, generate

    private, public = Path(f"{prefix}.key").expanduser(), Path(f"{prefix}.pub").expanduser()
    made = generate(kind)
    sealed = encrypted(made, _password(new=True))
    for path, data, mode in ((private, sealed, 0o600), (public, made.public.pem.encode(), 0o644)):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError as exc:
            raise UsageError(
                f"{path} is there already", hint="Choose another prefix; keys are not overwritten."
            ) from exc
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    say(f"Wrote {private} (keep it) and {public} (give it away).")


# --- verify -----------------------------------------------------------------------------------------------------------


@click.command(
    cls=Verb,
    examples=(
        ("pier verify assistant --key team.pub", "A model of the store."),
        (
            "pier verify oci://ghcr.io/team/m:1 --certificate-identity ci@team.example "
            "--certificate-oidc-issuer https://accounts.google.com",
            "A keyless signature, in the registry.",
        ),
    ),
)
@click.argument("model", shell_complete=complete_model)
@option("--key", type=click.Path(path_type=Path), metavar="FILE", section=_WHO, help="The holder of this public key.")
@option("--certificate-identity", metavar="NAME", section=_WHO, help="The identity in the certificate.")
@option("--certificate-identity-regexp", metavar="PATTERN", section=_WHO, help="One that matches as a whole.")
@option("--certificate-oidc-issuer", metavar="URL", section=_WHO, help="Who vouches for the identity.")
@option("--certificate-oidc-issuer-regexp", metavar="PATTERN", section=_WHO, help="One that matches as a whole.")
@option(
    "--trusted-root",
    type=click.Path(path_type=Path),
    metavar="FILE",
    section=_KEYLESS,
    help="trusted_root.json of a private Sigstore, or for work without a network.",
)
@option("--offline", is_flag=True, section=_KEYLESS, help="Do not refresh Sigstore's public root.")
@json_option
def verify(
    model: str,
    key: Path | None,
    certificate_identity: str | None,
    certificate_identity_regexp: str | None,
    certificate_oidc_issuer: str | None,
    certificate_oidc_issuer_regexp: str | None,
    trusted_root: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Check that a model is signed by who you say.

    MODEL is one of the store, or oci://… in its registry. Ends with status 15 when no signature holds. What is checked:
    the signature, and that it is about this very manifest; for keyless ones also certificate, time and log entry.
    """
    from pierhead.trust.bundle import Certified
    from pierhead.trust.evidence import Signer
    from pierhead.trust.keys import load_public

    wanted = Certified(
        certificate_identity or "",
        certificate_identity_regexp or "",
        certificate_oidc_issuer or "",
        certificate_oidc_issuer_regexp or "",
    )
    named = wanted.identity or wanted.identity_regexp
    if (key is None) == (not named) or (named and not (wanted.issuer or wanted.issuer_regexp)):
        raise UsageError(
            "say whose signature is meant",
            hint="--key FILE, or --certificate-identity NAME with --certificate-oidc-issuer URL.",
        )
    check_patterns(wanted.identity_regexp, wanted.issuer_regexp)
    if key is not None:
        signer = Signer(key=load_public(read_key(key)), label=f"key {key}")
    else:
        signer = Signer(certified=wanted, trusted_root=trusted_root, offline=offline or trusted_root is not None)
    digest, claims, reasons = asyncio.run(_claims(model, signer))
    if not any(c["kind"] == "signature" for c in claims):
        why = "; ".join(dict.fromkeys(reasons)) or "nothing is attached"
        raise Untrusted(
            f"{model} is not signed by {signer}: {why}",
            hint=f"`pier referrers {model}` shows what is attached.",
            data={"digest": digest, "reasons": reasons},
        )
    if as_json:
        print_json({"model": model, "digest": digest, "signer": str(signer), "verified": claims})
        return
    for claim in claims:
        say(
            f"Verified {_plainly(claim['kind'])} by {signer}"
            + (f" for {', '.join(claim['names'])}." if claim["names"] else ".")
        )
    click.echo(digest)


def _plainly(kind: str) -> str:
    """A statement's kind in a word, where there is one for it."""
    from pierhead.trust.evidence import is_provenance, is_sbom, is_signature

    names = ((is_signature, "signature"), (is_sbom, "SBOM"), (is_provenance, "provenance"))
    return next((name for test, name in names if test(kind)), kind)


def check_patterns(*patterns: str) -> None:
    """UsageError for a regular expression that is none."""
    import re

    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as exc:
            raise UsageError(f"not a regular expression: {pattern[:80]!r} ({exc})") from exc


async def _claims(model: str, signer: Any) -> tuple[str, list[dict[str, Any]], list[str]]:
    """The digest, what holds, and why the rest does not."""
    from pierhead.trust.evidence import evidence_of, is_signature, prove
    from pierhead.trust.signing import place_of

    paths = here()
    sources = settings(paths).settings.sources
    claims: list[dict[str, Any]] = []
    reasons: list[str] = []
    async with place_of(model, open_store(paths), sources, os.environ) as place:
        for one in evidence_of(await place.said()):
            try:
                claim = await asyncio.to_thread(prove, one, place.subject.digest, signer)
            except CorruptData as exc:
                reasons.append(exc.message)
                continue
            kind = "signature" if is_signature(claim.kind) else claim.kind
            claims.append({"kind": kind, "names": list(claim.names), "referrer": claim.referrer})
        return place.subject.digest, claims, reasons


# --- referrers --------------------------------------------------------------------------------------------------------


@click.command(
    cls=Verb,
    examples=(
        ("pier referrers assistant", "What is attached to a model of the store."),
        ("pier referrers oci://ghcr.io/team/m:1 --json", "To one in a registry."),
    ),
)
@click.argument("model", shell_complete=complete_model)
@json_option
def referrers(model: str, as_json: bool) -> None:
    """List what is attached to a model: signatures, SBOMs, provenance.

    What a document says it is, is shown; only `pier verify` tells whether its signature holds.
    """
    rows = asyncio.run(attached(model))
    if as_json:
        print_json(rows)
        return
    cells = [
        (r["what"], "yes" if r["signed"] else "no", size(r["size"]), _when(r["created"]), r["digest"][7:19])
        for r in rows
    ]
    table(("WHAT", "SIGNED", "SIZE", "CREATED", "DIGEST"), cells, right=(2,), fold=(0,), spare=(3, 2))
    if not rows:
        say(f"Nothing is attached to {model}. `pier sign` and `pier attest` attach.")


async def attached(model: str) -> list[dict[str, Any]]:
    """One row for each referrer of a model."""
    from pierhead.trust.signing import place_of

    paths = here()
    async with place_of(model, open_store(paths), settings(paths).settings.sources, os.environ) as place:
        return rows_of(await place.said())


def _when(stamp: str) -> str:
    """How long ago; a statement that is not ours may say nothing, or no time at all."""
    try:
        return age(stamp) if stamp else ""
    except ValueError:
        return stamp


def rows_of(said: Sequence[Any]) -> list[dict[str, Any]]:
    """What referrers say they are."""
    from pierhead.trust.evidence import evidence_of

    rows: list[dict[str, Any]] = []
    for one in said:
        try:
            kind = one.kind
        except PierError:
            continue
        found = evidence_of([one])
        named = found[0].kind if found and found[0].kind else kind
        rows.append(
            {
                "what": _plainly(named),
                "kind": named,
                "form": found[0].form if found else "",
                "signed": bool(found) and found[0].form != "document",
                "size": sum(map(len, one.blobs.values())),
                "created": found[0].created if found else "",
                "digest": one.digest,
            }
        )
    return rows
