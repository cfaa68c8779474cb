"""The policy file: which references need whose signatures; read strictly, and decided without side effects.

A file that is damaged, or names a key that cannot be read, refuses everything: whoever wrote it wanted protection.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from pierhead.errors import BadReference, ConfigError, PierError, Untrusted
from pierhead.refs import parse
from pierhead.registry.name import image_name
from pierhead.trust.bundle import Certified
from pierhead.trust.evidence import Claim, Evidence, Signer, is_provenance, is_sbom, is_signature, prove
from pierhead.trust.keys import load_public

FILE = "policy.toml"
MAX_FILE = 1 << 20
Action = Literal["enforce", "warn"]
Proof = Callable[[Evidence, str, Signer], Claim]


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may sign: ``key`` (a file beside the policy, or PEM), or an identity with its issuer."""

    key: str = ""
    identity: str = ""
    identity_regexp: str = ""
    issuer: str = ""
    issuer_regexp: str = ""
    trusted_root: str = ""
    expires: datetime.date | None = None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What references that match need: the word of any or of all identities, of nobody, or they are refused."""

    match: list[str]
    require: Literal["any", "all", "nothing", "refuse"] = "any"
    identities: list[Identity] = []
    attestations: list[Literal["sbom", "provenance"]] = []
    action: Action | None = None
    same_repository: bool = True  # a signature that names a repository must name this one


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file as it is written."""

    default: Literal["allow", "deny"]
    action: Action = "enforce"
    rules: list[Rule] = []


@dataclass(frozen=True)
class Policy:
    """A policy whose keys are loaded; ``hash`` is of everything that it was read from, ``files`` are those."""

    source: Path
    content: PolicyFile
    signers: dict[Identity, Signer]
    hash: str
    files: tuple[Path, ...]

    def rules_for(self, references: Sequence[str]) -> list[tuple[int, str]]:
        """The first rule that each reference meets, as (number, reference); a rule is named once."""
        found: dict[int, str] = {}
        for reference in references:
            for number, rule in enumerate(self.content.rules):
                if any(matches(pattern, form) for pattern in rule.match for form in _forms(reference)):
                    found.setdefault(number, reference)
                    break
        return sorted(found.items())


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Policy | None:
    """The policy; None where there is no file. ConfigError for one that cannot be trusted to mean what it says."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            raise _damaged(path, "it is a link to nothing") from None
        return None
    except OSError as exc:
        raise _damaged(path, exc.strerror or str(exc)) from exc
    if len(data) > MAX_FILE:
        raise _damaged(path, f"it is larger than {MAX_FILE} bytes")
    try:
        content = msgspec.convert(tomllib.loads(data.decode()), PolicyFile)
        for number, rule in enumerate(content.rules, 1):
            _sound(number, rule)
    except (UnicodeDecodeError, msgspec.ValidationError, ValueError, RecursionError) as exc:
        raise _damaged(path, str(exc)) from exc
    running = hashlib.sha256(data)
    files = [path]
    signers: dict[Identity, Signer] = {}
    for identity in (i for rule in content.rules for i in rule.identities):
        try:
            signers[identity] = _signer(identity, path.parent, files, running)
        except OSError as exc:
            raise _damaged(path, f"{exc.filename}: {exc.strerror}") from exc
        except PierError as exc:
            raise _damaged(path, f"{identity.key[:80] or identity.trusted_root[:80]}: {exc.message}") from exc
    return Policy(path, content, signers, running.hexdigest(), tuple(files))


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the policy {path} cannot be used, so nothing is allowed: {why}",
        hint="Correct it. docs/how-to/trust.md shows one; without the file nothing is asked for.",
        data={"file": str(path)},
    )


def _sound(number: int, rule: Rule) -> None:
    """ValueError for a rule that would not do what its writer thinks."""
    if not rule.match:
        raise ValueError(f"rule {number} matches nothing: give it `match`")
    wants = rule.require in ("any", "all")
    if wants and not rule.identities:
        raise ValueError(f"rule {number} requires {rule.require} of no identities")
    if not wants and (rule.identities or rule.attestations):
        raise ValueError(f"rule {number} names identities or attestations but requires {rule.require}")
    for one in rule.identities:
        by_name = one.identity or one.identity_regexp
        if bool(one.key) == bool(by_name):
            raise ValueError(f"rule {number} has an identity that is not either a key or a name")
        if by_name and not (one.issuer or one.issuer_regexp):
            raise ValueError(f"rule {number} accepts '{by_name}' from any issuer: give it `issuer`")
        for pattern in (one.identity_regexp, one.issuer_regexp):
            try:
                re.compile(pattern)
            except re.error as exc:
                raise ValueError(f"rule {number} has a regular expression that is none: {exc}") from exc


def _signer(identity: Identity, folder: Path, files: list[Path], running: Any) -> Signer:
    root = (folder / Path(identity.trusted_root).expanduser()) if identity.trusted_root else None
    if root is not None:
        running.update(root.read_bytes())
        files.append(root)
    if not identity.key:
        wanted = Certified(identity.identity, identity.identity_regexp, identity.issuer, identity.issuer_regexp)
        return Signer(certified=wanted, trusted_root=root)
    if identity.key.lstrip().startswith("-----BEGIN"):
        pem = identity.key.encode()
        label = ""
    else:
        path = folder / Path(identity.key).expanduser()
        pem = path.read_bytes()
        files.append(path)
        label = f"key {identity.key}"
    running.update(pem)
    return Signer(key=load_public(pem), label=label)


# --- references -------------------------------------------------------------------------------------------------------


def canonical(text: str) -> str:
    """One spelling for each reference, without its digest: ``oci://ghcr.io/team/model:tag``, ``hf:org/repo:Q4``."""
    try:
        reference = parse(text)
        if reference.kind == "oci":
            name = image_name(reference)
            return f"oci://{_host(name.host)}/{name.repository}" + (f":{name.tag}" if name.tag else "")
        if reference.kind == "ollama":
            host, slash, rest = str(reference).removeprefix("ollama://").partition("/")
            return str(parse(f"ollama://{_host(host)}/{rest}")) if slash else str(reference)
        if reference.kind == "pypi":
            return str(replace(reference, repo=re.sub(r"[-_.]+", "-", reference.repo).lower()))
        if reference.kind in ("https", "http"):
            parts = urlsplit(str(reference))
            return parts._replace(netloc=_host(parts.netloc.rpartition("@")[2])).geturl()
        return str(reference)
    except (BadReference, ValueError):
        return text


def _host(text: str) -> str:
    """A host as it is written without what goes without saying."""
    return text.lower().removesuffix(":443").removesuffix(".")


def _forms(reference: str) -> tuple[str, ...]:
    """A reference, and the hub's repository where it is a file of one: a rule for the one holds for the other."""
    try:
        found = parse(reference)
    except BadReference:
        return (reference,)
    return (reference, str(replace(found, path=""))) if found.kind in ("hf", "ms") and found.path else (reference,)


def _is_elsewhere(reference: str) -> bool:
    """Whether a place is another than this machine."""
    try:
        return parse(reference).kind not in ("short", "file", "store")
    except BadReference:
        return False


def matches(pattern: str, reference: str) -> bool:
    """``*`` stands for anything but a slash, ``**`` for anything; a pattern without a tag means every tag.

    Hubs and hosts do not tell small letters from capital ones, so neither do patterns.
    """
    parts = re.split(r"(\*\*|\*)", pattern)
    made = "".join({"**": ".*", "*": "[^/]*"}.get(p, re.escape(p)) for p in parts)
    return (
        re.fullmatch(f"(?:{made})(?::[^/:@]+|==[^/@]+)?(?:@[^/@]+)?", reference, re.DOTALL | re.IGNORECASE) is not None
    )


def repository_of(reference: str) -> str:
    """``host/repository`` of a reference to a registry; empty for others."""
    found = canonical(reference)
    rest = found.removeprefix("oci://")
    if rest == found:
        return ""
    head, slash, last = rest.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"


# --- deciding ---------------------------------------------------------------------------------------------------------


def decide(
    policy: Policy,
    references: Sequence[str],
    digest: str,
    evidence: Sequence[Evidence],
    today: datetime.date,
    proof: Proof = prove,
    *,
    origins: Sequence[str] = (),
) -> list[str]:
    """Nothing, or what is only warned of, when the policy allows the model; Untrusted names rule, finding and way on.

    Every reference counts by the first rule that it meets. The default is for a model of which none meets a rule, and
    for one from elsewhere none of whose ``origins`` does: whoever pulls it chooses its name.
    """
    names = list(dict.fromkeys(canonical(r) for r in (*origins, *references)))
    chosen = policy.rules_for(names)
    deciding = [c for c in map(canonical, origins) if _is_elsewhere(c)] or names
    warnings: list[str] = []
    if policy.content.default == "deny" and not policy.rules_for(deciding):
        warnings += _end(policy.content.action, "no rule matches it", policy, deciding, "its default is deny")
    for number, reference in chosen:
        rule = policy.content.rules[number]
        problem = _judge(policy, rule, reference, digest, evidence, today, proof)
        if problem:
            where = f"rule {number + 1} ({', '.join(rule.match)[:120]})"
            warnings += _end(rule.action or policy.content.action, problem, policy, [reference], where)
    return warnings


def _end(action: Action, problem: str, policy: Policy, names: Sequence[str], where: str) -> list[str]:
    shown = names[0] if names else "this model"
    text = f"the policy does not allow {shown}: {where}: {problem}"
    if action == "warn":
        return [text]
    raise Untrusted(
        text,
        hint=f"`pier referrers {names[-1] if names else 'MODEL'}` shows what is attached, `pier sign` signs what is "
        f"yours; the policy is {policy.source}.",
        data={"rule": where, "found": problem, "references": list(names), "policy": str(policy.source)},
    )


def _judge(
    policy: Policy,
    rule: Rule,
    reference: str,
    digest: str,
    evidence: Sequence[Evidence],
    today: datetime.date,
    proof: Proof,
) -> str:
    """What is wrong; empty when the rule is met."""
    if rule.require == "nothing":
        return ""
    if rule.require == "refuse":
        return "it is refused"
    reasons: list[str] = []
    claims: dict[Identity, list[Claim]] = {}
    for identity in rule.identities:
        signer = policy.signers[identity]
        if identity.expires is not None and today > identity.expires:
            reasons.append(f"{signer} is accepted only until {identity.expires}")
            continue
        claims[identity], why = _claims(rule, signer, reference, digest, evidence, proof)
        reasons += why
    good = [i for i, found in claims.items() if any(is_signature(c.kind) for c in found)]
    enough = bool(good) if rule.require == "any" else len(good) == len(rule.identities)
    if not enough:
        missing = [str(policy.signers[i]) for i in rule.identities if i not in good]
        return f"needs a signature by {' or '.join(missing[:5])}; {_found(evidence, reasons)}"
    made = [c.kind for i in good for c in claims[i]]
    for wanted in rule.attestations:
        if not any(map(is_sbom if wanted == "sbom" else is_provenance, made)):
            return f"needs a signed attestation of kind {wanted}; {_found(evidence, reasons)}"
    return ""


def _claims(
    rule: Rule, signer: Signer, reference: str, digest: str, evidence: Sequence[Evidence], proof: Proof
) -> tuple[list[Claim], list[str]]:
    """What a signer claims about the model, and why the rest does not count."""
    found: list[Claim] = []
    reasons: list[str] = []
    here = repository_of(reference)
    for one in evidence:
        try:
            claim = proof(one, digest, signer)
        except PierError as exc:  # also a root or a library that is not there: another identity may still do
            reasons.append(exc.message)
            continue
        others = [n for n in claim.names if here and repository_of(f"oci://{n.removeprefix('oci://')}") != here]
        if rule.same_repository and others and len(others) == len(claim.names):
            reasons.append(f"a signature was made for {others[0][:120]}, not for {here}")
        else:
            found.append(claim)
    return found, reasons


def _found(evidence: Sequence[Evidence], reasons: Sequence[str]) -> str:
    if not evidence:
        return "it is not signed"
    unique = list(dict.fromkeys(reasons))
    return f"of {len(evidence)} attached: {'; '.join(unique[:3]) or 'none counts'}"
