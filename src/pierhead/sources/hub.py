"""Hugging Face and hubs of its shape: a revision is pinned to a commit, a tag chooses the quantization."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import msgspec

from pierhead.errors import AccessDenied, CorruptData, NotFound, SourceUnavailable
from pierhead.refs import Reference, default_name
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.choose import Entry, choose, projector
from pierhead.sources.http import Http, Remote, is_loopback
from pierhead.store.model import Role

MAX_SMALL = 4 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


@dataclass(frozen=True)
class _At:
    remote: Remote
    git_sha1: str = ""  # of a small file that is kept in git itself


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


class Hub:
    """One hub; ``token`` goes to it alone, never to where it redirects."""

    def __init__(self, http: Http, address: str, token: str = "") -> None:
        self._http = http
        self._address = address
        self._token = token

    @classmethod
    def from_environment(cls, http: Http, setting: str, env: Mapping[str, str] | None = None) -> Hub:
        env = os.environ if env is None else env
        return cls(http, endpoint(setting, env), find_token(env))

    async def plan(self, reference: Reference) -> PullPlan:
        info = await self._info(reference)
        where = f"{reference.repo} on {self._host}"
        siblings = {s.rfilename: s for s in info.siblings}
        entries = [Entry(name, (s.lfs.size if s.lfs else s.size) or 0) for name, s in siblings.items()]
        model = choose(entries, reference.tag, where)
        chosen: list[tuple[str, Role]] = [(e.path, "weights") for e in model.entries]
        if (eye := projector(entries, model)) is not None:
            chosen.append((eye.path, "mmproj"))
        if (license_file := next((e for e in entries if _is_license(e)), None)) is not None:
            chosen.append((license_file.path, "license"))
        files = tuple(self._file(reference.repo, info.sha, siblings[path], role) for path, role in chosen)
        tag = f":{reference.tag or model.label}"
        annotations = {
            "org.opencontainers.image.revision": info.sha,
            "org.opencontainers.image.source": f"{self._address}/{reference.repo}",
        }
        return PullPlan(default_name(reference), f"hf:{reference.repo}{tag}@{info.sha}", files, annotations)

    @property
    def _host(self) -> str:
        return urlsplit(self._address).hostname or self._address

    async def _info(self, reference: Reference) -> _Info:
        revision = reference.revision or "main"
        url = f"{self._address}/api/models/{reference.repo}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            raw = await self._http.json(url, token=self._token_for(url))
            info = msgspec.convert(raw, _Info)
        except msgspec.ValidationError as exc:
            raise SourceUnavailable(f"{self._host} does not answer like a model hub: {exc}") from exc
        except (AccessDenied, NotFound) as exc:
            raise self._refused(reference, exc) from exc
        if not _COMMIT.fullmatch(info.sha):
            raise SourceUnavailable(f"{self._host} names no commit for {reference.repo}")
        return info

    def _refused(self, reference: Reference, exc: AccessDenied | NotFound) -> AccessDenied | NotFound:
        """The hub's 401, 403 and 404 in the user's words; it answers 401 for repositories that do not exist, too."""
        code = str(exc.data.get("error_code", ""))
        repo = reference.repo
        page = f"{self._address}/{repo}"
        if code == "GatedRepo" or (isinstance(exc, AccessDenied) and exc.data.get("status") == 403):
            hint = f"Accept its terms on {page}, then set HF_TOKEN to a token of your account."
            return AccessDenied(f"{repo} on {self._host} is gated: it is given only to those it admits", hint=hint)
        if code == "RevisionNotFound":
            return NotFound(f"{repo} on {self._host} has no revision '{reference.revision}'", hint=f"See {page}.")
        if isinstance(exc, AccessDenied):
            hint = (
                "Check the name; your token does not reach it."
                if self._token
                else "Check the name; for a private repository set HF_TOKEN to a token of your account."
            )
            return AccessDenied(f"{repo} on {self._host} does not exist or is private", hint=hint)
        return NotFound(f"{self._host} has no repository {repo}", hint="Check the name, upper and lower case too.")

    def _token_for(self, url: str) -> str:
        """The token, except over plain http to another machine."""
        parts = urlsplit(url)
        return self._token if parts.scheme == "https" or is_loopback(parts.hostname or "") else ""

    def _file(self, repo: str, commit: str, sibling: _Sibling, role: Role) -> RemoteFile:
        url = f"{self._address}/{repo}/resolve/{commit}/{quote(sibling.rfilename)}"
        sha256 = sibling.lfs.sha256 if sibling.lfs else ""
        digest = f"sha256:{sha256}" if _SHA256.fullmatch(sha256) else ""
        size = sibling.lfs.size if sibling.lfs else sibling.size
        git = sibling.blob_id if not sibling.lfs and _COMMIT.fullmatch(sibling.blob_id) else ""
        remote = Remote(url, size, ranges=True, token=self._token_for(url), digest=digest)
        return RemoteFile(
            name=sibling.rfilename.rsplit("/", 1)[-1],
            key=f"{self._address}/{repo}@{commit}/{sibling.rfilename}",
            size=size,
            digest=digest,
            role=role,
            opaque=_At(remote, git),
        )

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        at: _At = file.opaque
        try:
            return await self._http.read(at.remote, offset, length)
        except AccessDenied as exc:
            raise self._denied(file, exc) from exc

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        at: _At = file.opaque
        try:
            if at.git_sha1 and (file.size or 0) <= MAX_SMALL:
                await self._small(file, at, sink)
            else:
                await self._http.download(at.remote, sink)
        except AccessDenied as exc:
            raise self._denied(file, exc) from exc

    def _denied(self, file: RemoteFile, exc: AccessDenied) -> AccessDenied:
        if exc.data.get("error_code") == "GatedRepo" or not self._token:
            repo = file.key.removeprefix(f"{self._address}/").partition("@")[0]
            hint = f"Accept the terms on {self._address}/{repo}, then set HF_TOKEN to a token of your account."
            return AccessDenied(f"{repo} on {self._host} is gated: its files need a token", hint=hint)
        return exc

    async def _small(self, file: RemoteFile, at: _At, sink: Sink) -> None:
        """A file that git keeps itself: checked against its git object id."""
        data = await self._http.whole(at.remote.url, token=at.remote.token, limit=MAX_SMALL)
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if found != at.git_sha1:
            raise CorruptData(f"{file.name} does not match the id that {self._host} gives", hint="Try again.")
        if sink.offset:
            await sink.restart()
        await sink.write(data)


def _is_license(entry: Entry) -> bool:
    return re.fullmatch(r"(?i)licen[sc]e(\.(txt|md))?", entry.path) is not None and entry.size <= MAX_SMALL
