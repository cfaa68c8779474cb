"""The verb attest: say what a model is made of and where it came from, and attach that."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import here, print_json, say, settings
from pierhead.cli.signing import signing_with
from pierhead.errors import NotFound, UsageError
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord

_SIGNING = "Signing"
Said = tuple[str, str, Any]  # media type of the bare document, predicate type, content


@click.command(
    cls=Verb,
    examples=(
        ("pier attest assistant --generate --key team.key", "Attach a signed bill of materials."),
        ("pier attest assistant --provenance --key team.key", "Say where it came from and what it was made of."),
        ("pier attest oci://ghcr.io/team/m:1 --sbom sbom.spdx.json", "Attach a document of yours, unsigned."),
    ),
)
@click.argument("model", shell_complete=complete_model)
@option("--sbom", type=click.Path(path_type=Path), metavar="FILE", help="Attach this SPDX 2 or CycloneDX document.")
@option("--generate", is_flag=True, help="Make a CycloneDX ML-BOM of the model and attach it.")
@option("--provenance", is_flag=True, help="Attach SLSA provenance: source, base and files by digest.")
@option("--builder-id", metavar="URI", default="", help="Who built it, for the provenance.")
@option(
    "--key", type=click.Path(path_type=Path), metavar="FILE", section=_SIGNING, help="The private key to sign with."
)
@option("--keyless", is_flag=True, section=_SIGNING, help="Sign with a short-lived certificate from Sigstore.")
@option(
    "--trust-config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    section=_SIGNING,
    help="The client trust configuration of a private Sigstore.",
)
@option("--print", "show", is_flag=True, help="Print what --generate or --provenance makes, and attach nothing.")
@json_option
def attest(
    model: str,
    sbom: Path | None,
    generate: bool,
    provenance: bool,
    builder_id: str,
    key: Path | None,
    keyless: bool,
    trust_config: Path | None,
    show: bool,
    as_json: bool,
) -> None:
    """Attach what a model is made of and where it came from.

    MODEL is one of the store, or oci://… in its registry (for documents of your own). With a key or keyless it becomes
    a signed statement, which a policy may ask for; without, a bare document. `pier referrers` lists what is attached.
    """
    if not (sbom or generate or provenance) or (sbom and generate) or (key and keyless):
        raise UsageError("say what to attach", hint="--sbom FILE or --generate, --provenance, or both kinds.")
    paths = here()
    store = open_store(paths)
    said = _said(store, model, sbom, generate, provenance, builder_id)
    if show:
        print_json([content for _, _, content in said] if len(said) > 1 else said[0][2])
        return
    how = signing_with(key, trust_config) if key or keyless else None
    made = asyncio.run(_attach(store, model, said, how, settings(paths).settings.sources))
    if as_json:
        print_json({"model": model, "attached": made, "signed": how is not None})
        return
    say(f"Attached to {model}{'' if how else ', unsigned'}.")
    for digest in made:
        click.echo(digest)


def _said(store: Store, model: str, sbom: Path | None, generate: bool, provenance: bool, builder: str) -> list[Said]:
    """The documents to attach."""
    from pierhead.trust import sbom as bills
    from pierhead.trust.dsse import PAYLOAD, PROVENANCE
    from pierhead.trust.provenance import provenance as made_from

    said: list[Said] = []
    if sbom is not None:
        said.append(bills.read(_document(sbom)))
    if generate:
        said.append(bills.read(bills.generate(_record(store, model))))
    if provenance:
        said.append((PAYLOAD, PROVENANCE, made_from(_record(store, model), builder)))
    return said


def _document(path: Path) -> bytes:
    from pierhead.trust.sbom import MAX_SBOM

    try:
        with path.expanduser().open("rb") as file:
            return file.read(MAX_SBOM + 1)
    except FileNotFoundError as exc:
        raise NotFound(f"there is no file {path}") from exc


def _record(store: Store, model: str) -> ModelRecord:
    if model.lower().startswith("oci://"):
        raise UsageError(
            "what a model in a registry is made of is told by its files, which are not here",
            hint=f"`pier pull {model}`, then attest the model of the store and push it.",
        )
    return store.get(model)


async def _attach(store: Store, model: str, said: list[Said], how: Any, sources: Any) -> list[str]:
    import msgspec

    from pierhead.trust.dsse import PAYLOAD, statement
    from pierhead.trust.signing import bare, place_of, signed

    made: list[str] = []
    async with place_of(model, store, sources, os.environ) as place:
        for media_type, kind, content in said:
            if how is not None:
                one = await asyncio.to_thread(signed, place.subject, kind, content, how, place.name)
            elif media_type == PAYLOAD:
                one = bare(place.subject, PAYLOAD, statement(place.subject.digest, kind, content))
            else:
                one = bare(place.subject, media_type, msgspec.json.encode(content))
            await place.attach(one)
            made.append(one.digest)
    return made
