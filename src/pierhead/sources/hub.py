"""Hugging Face and hubs of its shape: a revision is pinned to a commit, a tag chooses the quantization."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import msgspec

from pierhead.errors import AccessDenied, NotFound, SourceUnavailable
from pierhead.refs import Reference, default_name
from pierhead.sources.base import PullPlan, RemoteFile
from pierhead.sources.choose import Entry
from pierhead.sources.http import Http, Remote
from pierhead.sources.hubfile import COMMIT, SHA256, HubFiles, planned
from pierhead.sources.select import Part, select
from pierhead.store.media import REVISION


class _Lfs(msgspec.Struct):
    sha256: str = ""
    size: int = 0


class _Sibling(msgspec.Struct, rename="camel"):
    rfilename: str
    size: int | None = None
    blob_id: str = ""
    lfs: _Lfs | None = None


class _Info(msgspec.Struct):
    sha: str
    siblings: list[_Sibling] = []
    gated: bool | str = False


def endpoint(setting: str, env: Mapping[str, str]) -> str:
    """The hub's address: the setting, unless it is the default and ``HF_ENDPOINT`` says otherwise."""
    other = env.get("HF_ENDPOINT", "").strip()
    return (other if other and setting == "https://huggingface.co" else setting).rstrip("/")


def find_token(env: Mapping[str, str]) -> str:
    """The user's token: ``HF_TOKEN``, else the file that ``hf auth login`` wrote; empty without one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if env.get(name, "").strip():
            return env[name].strip()
    home = Path(env.get("HOME") or "~").expanduser()
    hf_home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    path = Path(env.get("HF_TOKEN_PATH") or hf_home / "token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


class Hub(HubFiles):
    """One hub; ``token`` goes to it alone, never to where it redirects."""

    @classmethod
    def from_environment(cls, http: Http, setting: str, env: Mapping[str, str] | None = None) -> Hub:
        env = os.environ if env is None else env
        return cls(http, endpoint(setting, env), find_token(env))

    async def plan(self, reference: Reference) -> PullPlan:
        info = await self._info(reference)
        siblings = {s.rfilename: s for s in info.siblings}
        entries = [Entry(name, (s.lfs.size if s.lfs else s.size) or 0) for name, s in siblings.items()]
        found = select(entries, reference.tag, f"{reference.repo} on {self.host}", reference.path)
        files = [await self._file(reference.repo, info.sha, siblings[p.entry.path], p) for p in found.parts]
        pinned = Reference("hf", reference.repo, revision=info.sha, path=reference.path)
        if not reference.path:
            pinned = replace(pinned, tag=reference.tag or found.label)
        annotations = {
            "org.opencontainers.image.revision": info.sha,
            "org.opencontainers.image.source": f"{self.address}/{reference.repo}",
        }
        if reference.revision:
            annotations[REVISION] = reference.revision
        return PullPlan(default_name(reference), str(pinned), tuple(files), annotations)

    async def current(self, reference: Reference) -> str:
        """The commit of the revision now."""
        return (await self._info(reference)).sha

    async def _info(self, reference: Reference) -> _Info:
        revision = reference.revision or "main"
        url = f"{self.address}/api/models/{reference.repo}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            raw = await self.http.json(url, token=self.token_for(url))
            info = msgspec.convert(raw, _Info)
        except msgspec.ValidationError as exc:
            raise SourceUnavailable(f"{self.host} does not answer like a model hub: {exc}") from exc
        except (AccessDenied, NotFound) as exc:
            raise self._refused(reference, exc) from exc
        if not COMMIT.fullmatch(info.sha):
            raise SourceUnavailable(f"{self.host} names no commit for {reference.repo}")
        return info

    def _refused(self, reference: Reference, exc: AccessDenied | NotFound) -> AccessDenied | NotFound:
        """The hub's 401, 403 and 404 in the user's words; it answers 401 for repositories that do not exist, too."""
        code = str(exc.data.get("error_code", ""))
        repo = reference.repo
        page = f"{self.address}/{repo}"
        if code == "GatedRepo" or (isinstance(exc, AccessDenied) and exc.data.get("status") == 403):
            hint = f"Accept its terms on {page}, then set HF_TOKEN to a token of your account."
            return AccessDenied(f"{repo} on {self.host} is gated: it is given only to those it admits", hint=hint)
        if code == "RevisionNotFound":
            return NotFound(f"{repo} on {self.host} has no revision '{reference.revision}'", hint=f"See {page}.")
        if isinstance(exc, AccessDenied):
            hint = (
                "Check the name; your token does not reach it."
                if self.token
                else "Check the name; for a private repository set HF_TOKEN to a token of your account."
            )
            return AccessDenied(f"{repo} on {self.host} does not exist or is private", hint=hint)
        return NotFound(f"{self.host} has no repository {repo}", hint="Check the name, upper and lower case too.")

    async def _file(self, repo: str, commit: str, sibling: _Sibling, part: Part) -> RemoteFile:
        url = f"{self.address}/{repo}/resolve/{commit}/{quote(sibling.rfilename)}"
        sha256 = sibling.lfs.sha256 if sibling.lfs else ""
        size = sibling.lfs.size if sibling.lfs else sibling.size
        git = sibling.blob_id if not sibling.lfs and COMMIT.fullmatch(sibling.blob_id) else ""
        if not git and not SHA256.fullmatch(sha256):  # a mirror whose list tells less
            linked = await self.http.linked(url, token=self.token_for(url))
            sha256, git = (linked.etag, "") if SHA256.fullmatch(linked.etag) else ("", linked.etag)
            size = size if linked.size is None else linked.size
        digest = f"sha256:{sha256}" if SHA256.fullmatch(sha256) else ""
        remote = Remote(url, size, ranges=True, token=self.token_for(url), digest=digest)
        key = f"{self.address}/{repo}@{commit}/{sibling.rfilename}"
        return planned(part, key, remote, git if COMMIT.fullmatch(git) else "")

    def denied(self, file: RemoteFile, exc: AccessDenied) -> AccessDenied:
        if exc.data.get("error_code") == "GatedRepo" or not self.token:
            repo = file.key.removeprefix(f"{self.address}/").partition("@")[0]
            hint = f"Accept the terms on {self.address}/{repo}, then set HF_TOKEN to a token of your account."
            return AccessDenied(f"{repo} on {self.host} is gated: its files need a token", hint=hint)
        return exc
