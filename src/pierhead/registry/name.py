"""Names of artifacts in registries: which host, which repository, what to ask for; pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pierhead.errors import BadReference
from pierhead.refs import Reference

HUB = "docker.io"
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class ImageName:
    """``host`` as users and credentials know it (``docker.io``), ``repository`` below it, a tag and a digest or one."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def target(self) -> str:
        """What the manifest's address ends in: the digest where one is given."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


def image_name(reference: Reference) -> ImageName:
    """The registry's side of an ``oci:`` reference; BadReference where the standard does not allow the name."""
    first, slash, rest = reference.repo.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host, repository = first.lower(), rest
    else:
        host, repository = HUB, reference.repo
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = HUB
    if host == HUB and "/" not in repository:
        repository = f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository) or (reference.tag and not _TAG.fullmatch(reference.tag)):
        raise BadReference(
            f"not a name that registries know: {str(reference)[:120]!r}",
            hint="Repositories are written in small letters: oci://host/team/model:tag.",
        )
    return ImageName(host, repository, reference.tag, reference.digest)
