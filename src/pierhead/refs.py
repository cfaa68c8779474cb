"""References: what a user types to name an artifact, parsed and printed; fetches nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from pierhead.errors import BadReference

Kind = Literal["short", "hf", "ms", "pypi", "https", "http", "file", "oci", "ollama", "store"]

MAX_LENGTH = 1024
EXAMPLES = (
    "Examples: smollm2, hf:org/repo:Q4_K_M, ollama://qwen3:0.6b, ai/smollm2, https://host/model.gguf, ./model.gguf"
)

_SHORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*(?::[A-Za-z0-9][A-Za-z0-9._-]*)?")
_HF = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?P<file>(?:/[^/:@]+)+)?(?::(?P<tag>[\w.-]+))?(?:@(?P<rev>[\w./-]+))?", re.ASCII
)
_OTHER_REPOSITORIES = ("datasets", "spaces", "buckets", "collections", "papers", "docs", "kernels")
_PYPI = re.compile(r"(?P<repo>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<tag>[A-Za-z0-9.!+_-]+))?")
_OCI = re.compile(
    r"(?P<repo>[\w.-]+(?::\d+)?(?:/[\w.-]+)+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?", re.ASCII
)
_OLLAMA = re.compile(
    r"(?:(?:(?P<host>\w[\w.-]*(?::\d{1,5})?)/)?(?P<space>\w[\w-]*)/)?(?P<model>\w[\w.-]*)(?::(?P<tag>\w[\w.-]*))?",
    re.ASCII,
)
_SERVER = re.compile(r"localhost|[A-Za-z0-9.-]+:\d{1,5}")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]+\.)+[A-Za-z][A-Za-z0-9-]+")
_OLLAMA_HOSTS = ("registry.ollama.ai", "ollama.com", "www.ollama.com")
_DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}")
_FRAGMENT = re.compile(r"sha256=([0-9a-f]{64})")


@dataclass(frozen=True)
class Reference:
    """One parsed reference. ``repo`` is the place (repository, package, host and path), ``tag`` the quantization,
    version or tag, ``revision`` a branch or commit, ``digest`` what to expect, ``path`` a file or URL."""

    kind: Kind
    repo: str = ""
    tag: str = ""
    revision: str = ""
    digest: str = ""
    path: str = ""

    @property
    def text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        tag = f":{self.tag}" if self.tag else ""
        match self.kind:
            case "short":
                return f"{self.repo}{tag}"
            case "hf" | "ms":
                return f"{self.kind}:{self.repo}{f'/{self.path}' if self.path else ''}{tag}{at}"
            case "pypi":
                return f"pypi:{self.repo}" + (f"=={self.tag}" if self.tag else "")
            case "https" | "http":
                return self.path + (f"#sha256={self.digest.removeprefix('sha256:')}" if self.digest else "")
            case "oci":
                return f"oci://{self.repo}{tag}" + (f"@{self.digest}" if self.digest else "")
            case "ollama":
                return f"ollama://{self.repo}{tag}"
            case "store":
                return self.digest
            case "file":
                return self.path


def parse(text: str) -> Reference:
    """Read a reference; BadReference says what is wrong and shows examples."""
    if not text or len(text) > MAX_LENGTH or any(ord(c) < 32 or ord(c) == 127 for c in text) or text != text.strip():
        raise BadReference(f"not a reference: {text[:80]!r}", hint=EXAMPLES)
    scheme, sep, rest = text.partition(":")
    parser = _SCHEMES.get(scheme.lower()) if sep else None
    if parser is not None:
        return parser(rest.removeprefix("//") if scheme.lower() not in ("https", "http", "file") else text)
    if _DIGEST.fullmatch(text):
        return Reference("store", digest=text)
    first, slash, rest = text.partition("/")
    if slash and _SERVER.fullmatch(first):
        return _registry(text)
    if _is_path(text):
        return Reference("file", path=text)
    if slash and _DOMAIN.fullmatch(first):
        return _hosted(first.lower(), rest, text)
    if _SHORT.fullmatch(text):
        repo, _, tag = text.rpartition(":") if ":" in text.rsplit("/", 1)[-1] else (text, "", "")
        return Reference("short", repo=repo, tag=tag)
    raise BadReference(f"not a reference: {text[:80]!r}", hint=EXAMPLES)


def _hosted(host: str, rest: str, text: str) -> Reference:
    """A name that begins with a host: who serves there decides what kind of reference it is."""
    if host in ("hf.co", "huggingface.co"):
        return _hub(rest)
    if host in ("modelscope.cn", "www.modelscope.cn"):
        return _modelscope(rest.removeprefix("models/"))
    if host in _OLLAMA_HOSTS:
        return _ollama(rest)
    return _registry(text)


def default_name(reference: Reference) -> str:
    """The name that a pulled model gets in the store when the user gives none."""
    tag = f":{reference.tag}" if reference.tag else ""
    match reference.kind:
        case "hf" | "ms":
            host = "hf.co" if reference.kind == "hf" else "modelscope.cn"
            return f"{host}/{reference.repo}{f':{_plain(reference.path)}' if reference.path and not tag else tag}"
        case "pypi":
            return f"pypi/{reference.repo}{tag}"
        case "https" | "http":
            return _plain(Path(unquote(urlsplit(reference.path).path)).name)
        case "file":
            return _plain(Path(reference.path).expanduser().resolve().name)
        case "store":
            return reference.digest
        case _:
            return f"{reference.repo.removeprefix('docker.io/')}{tag}"


def _plain(name: str) -> str:
    """A file's name without its ending as a valid store name."""
    stem = re.sub(r"(?i)(?:-00001-of-\d{5})?\.(?:gguf|whl|zip)$", "", name)
    clean = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", stem)).strip("-._").lower()
    return clean[:200] or "model"


def _is_path(text: str) -> bool:
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return True
    return text.lower().endswith(".gguf") or (os.sep in text and os.path.exists(text))


def _hub(rest: str) -> Reference:
    if rest.count("/") > 1:
        _only_models(rest)
    return _repository("hf", rest)


def _only_models(path: str) -> None:
    kind, _, name = path.strip("/").partition("/")
    if kind in _OTHER_REPOSITORIES:
        raise BadReference(
            f"{name[:80]} is one of the hub's {kind}, not a model", hint="Only repositories of models can be used."
        )


def _modelscope(rest: str) -> Reference:
    return _repository("ms", rest)


def _repository(kind: Literal["hf", "ms"], rest: str) -> Reference:
    """``org/repo``, a file in it, a quantization or variant, and a branch, tag or commit."""
    found = _HF.fullmatch(rest)
    if found is None or any(part in (".", "..") for part in re.split("[/@:]", rest)) or ".." in rest.partition("@")[2]:
        raise BadReference(
            f"not a hub repository: {rest[:80]!r}",
            hint=f"Write {kind}:org/repo, {kind}:org/repo:Q4_K_M or {kind}:org/repo@REVISION.",
        )
    file = (found["file"] or "").removeprefix("/")
    return Reference(kind, repo=found["repo"], tag=found["tag"] or "", revision=found["rev"] or "", path=file)


def _page(kind: Literal["hf", "ms"], path: str) -> Reference | None:
    """A page of a hub's web site: a repository, one of its branches, or a file; None for other pages.

    A branch with a slash in its name is written with ``%2F`` there.
    """
    raw = [part for part in path.strip("/").split("/") if part]
    if kind == "ms":
        if raw[:1] != ["models"]:
            return None
        raw = raw[1:]
    parts = [unquote(part) for part in raw]
    repo, view = "/".join(parts[:2]), parts[2:3]
    if len(parts) == 2 or (len(parts) == 3 and view == ["files"]):
        return _repository(kind, repo)
    if parts[2:4] == ["file", "view"]:
        parts = [*parts[:2], "blob", *parts[4:]]
    if len(parts) == 4 and parts[2] == "tree":
        return _repository(kind, f"{repo}@{parts[3]}")
    if len(parts) > 4 and parts[2] in ("blob", "resolve", "raw"):
        return _repository(kind, f"{repo}/{'/'.join(parts[4:])}@{parts[3]}")
    return None


def _package(rest: str) -> Reference:
    found = _PYPI.fullmatch(rest)
    if found is None:
        raise BadReference(f"not a Python package: {rest[:80]!r}", hint="Write pypi:NAME or pypi:NAME==VERSION.")
    return Reference("pypi", repo=found["repo"], tag=found["tag"] or "")


def _registry(rest: str) -> Reference:
    found = _OCI.fullmatch(rest)
    if found is None:
        raise BadReference(
            f"not an OCI reference: {rest[:80]!r}", hint="Write oci://host/repo:tag or oci://host/repo@sha256:…."
        )
    return Reference("oci", repo=found["repo"], tag=found["tag"] or "", digest=found["digest"] or "")


def _ollama(rest: str) -> Reference:
    found = _OLLAMA.fullmatch(rest)
    if found is None:
        raise BadReference(
            f"not an Ollama reference: {rest[:80]!r}",
            hint="Write ollama://name:tag, ollama://user/name:tag or ollama://host/user/name:tag.",
        )
    host, space = found["host"] or "", found["space"] or ""
    if host.lower() in _OLLAMA_HOSTS:
        host = ""
    if not host and space == "library":
        space = ""
    repo = "/".join(part for part in (host, space, found["model"]) if part)
    return Reference("ollama", repo=repo, tag=found["tag"] or "")


def _url(text: str) -> Reference:
    address, _, fragment = text.partition("#")
    digest = _FRAGMENT.fullmatch(fragment)
    if fragment and digest is None:
        raise BadReference(
            f"unknown fragment '#{fragment[:40]}'", hint="Only #sha256=<64 hex digits> may follow an address."
        )
    try:
        parts = urlsplit(address)
        valid = bool(parts.hostname) and " " not in address and (parts.port or True)
    except ValueError:
        valid = False
    if not valid:
        raise BadReference("not an address", hint="Write https://host/path/model.gguf.")
    parts = urlsplit(address)
    if parts.scheme.lower() == "https" and not digest and (found := _on_hub(parts.hostname or "", parts.path)):
        return found
    path = parts.path.strip("/").split("/")
    if parts.hostname in _OLLAMA_HOSTS and len(path) in (1, 2) and path[0] and not digest and parts.scheme == "https":
        return _ollama("/".join(path))
    kind: Kind = "https" if parts.scheme.lower() == "https" else "http"
    return Reference(kind, path=address, digest=f"sha256:{digest[1]}" if digest else "")


def _on_hub(host: str, path: str) -> Reference | None:
    """What an address on a hub's web site means; None for addresses elsewhere."""
    if host in ("huggingface.co", "hf.co", "www.huggingface.co"):
        _only_models(path)
        return _page("hf", path)
    return _page("ms", path) if host in ("modelscope.cn", "www.modelscope.cn") else None


def _file(text: str) -> Reference:
    path = unquote(urlsplit(text).path) if text.lower().startswith("file://") else text.partition(":")[2]
    if not path:
        raise BadReference(f"no path in {text[:80]!r}", hint="Write file:///path/model.gguf or ./model.gguf.")
    return Reference("file", path=path if path.startswith(("/", ".", "~")) else f"./{path}")


_SCHEMES = {
    "hf": _hub,
    "huggingface": _hub,
    "ms": _modelscope,
    "modelscope": _modelscope,
    "pypi": _package,
    "https": _url,
    "http": _url,
    "file": _file,
    "oci": _registry,
    "ollama": _ollama,
}
