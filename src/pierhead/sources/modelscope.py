"""ModelScope: its list of files tells sizes and hashes; a branch is pinned to the commit that touched it last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from urllib.parse import quote, urlencode

import msgspec

from pierhead.errors import AccessDenied, NotFound, SourceUnavailable
from pierhead.refs import Reference, default_name
from pierhead.sources.base import PullPlan, RemoteFile
from pierhead.sources.choose import Entry
from pierhead.sources.http import Http, Remote
from pierhead.sources.hubfile import COMMIT, SHA256, HubFiles, planned
from pierhead.sources.select import Part, select

DEFAULT = "https://www.modelscope.cn"
COOKIE = "m_session_id"  # older parts of its API look for the token here
BRANCH = "master"
CUT = 3000  # entries at which the service ends a list without saying so
MAX_LISTS = 200


class ScopeFile(msgspec.Struct, rename="pascal"):
    path: str
    size: int = 0
    sha256: str = ""
    type: str = "blob"
    revision: str = ""
    committed_date: int = 0


class _Files(msgspec.Struct, rename="pascal"):
    files: list[ScopeFile] | None = None


class _Answer(msgspec.Struct, rename="pascal"):
    data: _Files | None = None
    success: bool = True
    message: str = ""


def endpoint(setting: str, env: Mapping[str, str]) -> str:
    """The service's address: the setting, unless it is the default and ``MODELSCOPE_ENDPOINT`` says otherwise."""
    other = env.get("MODELSCOPE_ENDPOINT", "").strip()
    if setting != DEFAULT or not other:
        return setting.rstrip("/")
    return (other if "://" in other else f"https://{other}").rstrip("/")


class ModelScope(HubFiles):
    """One site of ModelScope; ``token`` goes to it alone."""

    @classmethod
    def from_environment(cls, http: Http, setting: str, env: Mapping[str, str] | None = None) -> ModelScope:
        env = os.environ if env is None else env
        return cls(http, endpoint(setting, env), env.get("MODELSCOPE_API_TOKEN", "").strip())

    async def plan(self, reference: Reference) -> PullPlan:
        asked = reference.revision or BRANCH
        files = {f.path: f for f in await self.files(reference, asked) if f.type != "tree"}
        commit = asked if COMMIT.fullmatch(asked) else _newest(files.values()) or asked
        entries = [Entry(path, f.size) for path, f in files.items()]
        found = select(entries, reference.tag, f"{reference.repo} on {self.host}", reference.path)
        chosen = tuple(self._file(reference.repo, commit, files[part.entry.path], part) for part in found.parts)
        pinned = Reference("ms", reference.repo, revision=commit, path=reference.path)
        if not reference.path:
            pinned = replace(pinned, tag=reference.tag or found.label)
        annotations = {"org.opencontainers.image.source": f"{self.address}/models/{reference.repo}"}
        if COMMIT.fullmatch(commit):
            annotations["org.opencontainers.image.revision"] = commit
        return PullPlan(default_name(reference), str(pinned), chosen, annotations)

    async def files(self, reference: Reference, revision: str) -> list[ScopeFile]:
        """All files of the repository; where the service cuts the list off, each folder is asked for by itself."""
        whole = await self._list(reference, revision, "", recursive=True)
        if len(whole) < CUT:
            return whole
        found, folders, lists = dict[str, ScopeFile](), [""], 0
        while folders:
            root = folders.pop()
            part = await self._list(reference, revision, root, recursive=bool(root))
            if root and len(part) >= CUT:
                part = await self._list(reference, revision, root, recursive=False)
                folders += [f.path for f in part if f.type == "tree"]
            elif not root:
                folders += [f.path for f in part if f.type == "tree"]
            found |= {f.path: f for f in part}
            lists += 1
            if lists > MAX_LISTS:
                raise SourceUnavailable(f"{reference.repo} on {self.host} holds too many files to list")
        return list(found.values())

    async def _list(self, reference: Reference, revision: str, root: str, *, recursive: bool) -> list[ScopeFile]:
        query = {"Revision": revision, "Recursive": str(recursive)} | ({"Root": root} if root else {})
        url = f"{self.address}/api/v1/models/{reference.repo}/repo/files?{urlencode(query)}"
        try:
            answer = msgspec.convert(await self.http.json(url, token=self.token_for(url)), _Answer)
        except msgspec.ValidationError as exc:
            raise SourceUnavailable(f"{self.host} does not answer like ModelScope: {exc}") from exc
        except (AccessDenied, NotFound) as exc:
            raise self._refused(reference, exc) from exc
        if not answer.success or answer.data is None:
            raise SourceUnavailable(f"{self.host} does not list {reference.repo}: {answer.message[:200]}")
        return answer.data.files or []

    def _refused(self, reference: Reference, exc: AccessDenied | NotFound) -> AccessDenied | NotFound:
        repo, page = reference.repo, f"{self.address}/models/{reference.repo}"
        if isinstance(exc, AccessDenied):
            hint = (
                "Your token does not reach it; check the name."
                if self.token
                else "Check the name; for a private repository set MODELSCOPE_API_TOKEN to a token of your account."
            )
            return AccessDenied(f"{repo} on {self.host} is private or is not given to everybody", hint=hint)
        at = f" with a revision '{reference.revision}'" if reference.revision else ""
        return NotFound(f"{self.host} has no repository {repo}{at}", hint=f"Check the name; see {page}.")

    def _file(self, repo: str, commit: str, file: ScopeFile, part: Part) -> RemoteFile:
        query = urlencode({"Revision": commit, "FilePath": file.path}, quote_via=quote)
        url = f"{self.address}/api/v1/models/{repo}/repo?{query}"
        digest = f"sha256:{file.sha256}" if SHA256.fullmatch(file.sha256) else ""
        remote = Remote(url, file.size, ranges=True, token=self.token_for(url), digest=digest)
        return planned(part, f"{self.address}/{repo}@{commit}/{file.path}", remote)

    def denied(self, file: RemoteFile, exc: AccessDenied) -> AccessDenied:
        if self.token:
            return exc
        hint = "Ask for access on its page, then set MODELSCOPE_API_TOKEN to a token of your account."
        return AccessDenied(f"{self.host} gives {file.name} only to those it admits", hint=hint)


def _newest(files: Iterable[ScopeFile]) -> str:
    """The commit that touched the repository last, as far as its files tell."""
    known = [f for f in files if COMMIT.fullmatch(f.revision)]
    return max(known, key=lambda f: f.committed_date).revision if known else ""
