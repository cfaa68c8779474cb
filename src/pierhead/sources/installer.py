"""Ask uv or pip which wheel a requirement means, so that the user's own index settings hold; installs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote, urlsplit

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pierhead.errors import NotFound, PierError, SourceUnavailable
from pierhead.sources.http import redact

DEADLINE = 300.0
INSTALL = "Install uv (https://docs.astral.sh/uv/) or pip."
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_ABSENT = (
    "was not found in the package registry",
    "no matching distribution found",
    "there is no version of",
    "there are no versions of",
    "has no wheels",
    "no usable wheels",
    "has no usable wheels",
)


@dataclass(frozen=True)
class Found:
    """A wheel that the tool chose: an address or a local file, and the hash that the index promises."""

    name: str
    version: str
    url: str = ""
    path: Path | None = None
    sha256: str = ""
    size: int | None = None

    @property
    def filename(self) -> str:
        return self.path.name if self.path else unquote(urlsplit(self.url).path.rsplit("/", 1)[-1])


@dataclass(frozen=True)
class Tool:
    """An installer that is here: its kind and how to call it."""

    kind: Literal["uv", "pip"]
    argv: tuple[str, ...]


def tools(choice: str, env: Mapping[str, str]) -> list[Tool]:
    """The installers of this machine, the one that knows the user's index first; ``choice`` is auto, uv or pip."""
    found: dict[str, Tool] = {}
    uv = _program("uv", env)
    if uv:
        found["uv"] = Tool("uv", (uv,))
    elif _module("uv"):
        found["uv"] = Tool("uv", (sys.executable, "-m", "uv"))
    pip = _program("pip3", env) or _program("pip", env)
    if _module("pip"):
        found["pip"] = Tool("pip", (sys.executable, "-m", "pip"))
    elif pip:
        found["pip"] = Tool("pip", (pip,))
    if choice in ("uv", "pip"):
        return [found[choice]] if choice in found else []
    order = ["pip", "uv"] if _configured_pip(env) and not _configured_uv(env) else ["uv", "pip"]
    return [found[kind] for kind in order if kind in found]


def _module(name: str) -> bool:
    """Whether ``python -m name`` works: a package, not a folder that happens to have the name."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _program(name: str, env: Mapping[str, str]) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name, path=env.get("PATH"))


def _configured_uv(env: Mapping[str, str]) -> bool:
    names = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONFIG_FILE")
    if any(env.get(name) for name in names):
        return True
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME") or "~").expanduser() / ".config")
    return any(p.is_file() for p in (home / "uv" / "uv.toml", Path("/etc/uv/uv.toml")))


def _configured_pip(env: Mapping[str, str]) -> bool:
    if any(env.get(name) for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS")):
        return True
    home = Path(env.get("HOME") or "~").expanduser()
    config = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path(env["PIP_CONFIG_FILE"])] if env.get("PIP_CONFIG_FILE") else []
    files += [config / "pip" / "pip.conf", home / ".pip" / "pip.conf", Path("/etc/pip.conf")]
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.search(r"^\s*(index-url|find-links)\s*=", file.read_text(encoding="utf-8"), re.MULTILINE):
                return True
    return False


class Installer:
    """uv or pip of this machine, asked for wheels."""

    def __init__(self, choice: str = "auto", env: Mapping[str, str] | None = None) -> None:
        self._env = dict(os.environ if env is None else env)
        self._choice = choice

    async def resolve(self, requirements: Sequence[str]) -> list[Found]:
        """The wheel of each requirement, in that order, dependencies left out.

        NotFound when no index has it; SourceUnavailable when no index answers or neither tool is here.
        """
        for text in requirements:
            _check(text)
        problems: list[PierError] = []
        for tool in self._tools():
            try:
                found = await (self._uv(tool, requirements) if tool.kind == "uv" else self._pip(tool, requirements))
                return _ordered(found, requirements)
            except (NotFound, SourceUnavailable) as exc:
                problems.append(exc)
        raise next((p for p in problems if not isinstance(p, NotFound)), problems[0])

    async def lock(self, requirements: Sequence[str]) -> list[str]:
        """Exact versions of all packages that these lead to on this machine, as ``name==version``, sorted.

        NotFound when no index has one of them or they exclude each other; SourceUnavailable as in ``resolve``.
        """
        for text in requirements:
            _check(text)
        what = ", ".join(requirements)
        tool = self._tools()[0]
        if tool.kind == "uv":
            args = ("pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-emit-index-url")
            argv = (*tool.argv, *args, "--python", sys.executable, "-")
            lines = (await self._run(argv, what, "\n".join(requirements))).splitlines()
            return sorted(line.strip() for line in lines if "==" in line and not line.startswith((" ", "#", "-")))
        args = ("install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-")
        found = _report(await self._run((*tool.argv, *args, *requirements), what))
        return sorted(f"{canonicalize_name(wheel.name)}=={wheel.version}" for wheel in found)

    async def download(self, requirement: str, folder: Path) -> Path:
        """Let the tool itself download the wheel into ``folder``: it has the user's logins. The wheel's path."""
        _check(requirement)
        pips = [t for t in tools("auto", self._env) if t.kind == "pip"]
        if not pips:
            raise SourceUnavailable(
                f"the index wants a login to download {requirement}, and only pip can do that",
                hint="Install pip, or put the login into ~/.netrc.",
            )
        args = ("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement)
        await self._run((*pips[0].argv, *args), requirement)
        wheels = await asyncio.to_thread(lambda: sorted(folder.glob("*.whl")))
        if len(wheels) != 1:
            raise SourceUnavailable(f"pip brought no wheel for {requirement}")
        return wheels[0]

    def _tools(self) -> list[Tool]:
        found = tools(self._choice, self._env)
        if not found:
            wanted = "neither uv nor pip is" if self._choice == "auto" else f"{self._choice} is not"
            raise SourceUnavailable(f"{wanted} on this machine; Python packages are found through them", hint=INSTALL)
        return found

    async def _uv(self, tool: Tool, requirements: Sequence[str]) -> list[Found]:
        args = ("pip", "compile", "--quiet", "--format", "pylock.toml", "--no-deps", "--only-binary", ":all:")
        argv = (*tool.argv, *args, "--no-header", "--python", sys.executable, "-")
        text = await self._run(argv, ", ".join(requirements), "\n".join(requirements))
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as exc:
            raise SourceUnavailable("uv's answer cannot be read", hint="Update uv.") from exc
        return [w for package in _tables(document.get("packages")) for w in _from_lock(package)]

    async def _pip(self, tool: Tool, requirements: Sequence[str]) -> list[Found]:
        args = ("install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:")
        argv = (*tool.argv, *args, "--report", "-", *requirements)
        return _report(await self._run(argv, ", ".join(requirements)))

    async def _run(self, argv: Sequence[str], what: str, stdin: str = "") -> str:
        env = {**self._env, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "NO_COLOR": "1"}
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=env,
            )
        except OSError as exc:
            raise SourceUnavailable(f"cannot start {argv[0]}: {exc.strerror}", hint=INSTALL) from exc
        try:
            async with asyncio.timeout(DEADLINE):
                out, err = await process.communicate(stdin.encode())
        except TimeoutError as exc:
            raise SourceUnavailable(f"{Path(argv[0]).name} did not find {what} in {DEADLINE:.0f} s") from exc
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise _failure(Path(argv[0]).name, what, err.decode("utf-8", "replace"))
        return out.decode("utf-8", "replace")


def _check(text: str) -> None:
    try:
        valid = not text.startswith("-") and Requirement(text).url is None
    except InvalidRequirement:
        valid = False
    if not valid:
        raise NotFound(f"{text!r} does not name a package")


def _failure(tool: str, what: str, err: str) -> PierError:
    clean = _USERINFO.sub("", err)
    flat = re.sub(r"[\s│├─▶╰×╭]+", " ", clean)
    lines = [line.strip(" │├─▶╰×╭") for line in clean.splitlines() if line.strip(" │├─▶╰×╭")]
    telling = [line for line in lines if not line.upper().startswith(("WARNING", "[NOTICE]", "HINT"))]
    said = " ".join((telling or lines)[-3:])[:500]
    if any(words in flat.lower() for words in _ABSENT) and "connection" not in flat.lower():
        return NotFound(
            f"no wheel of {what} on the configured package index",
            hint="Check the name and the index settings of uv or pip.",
            data={"said": said},
        )
    return SourceUnavailable(
        f"{tool} could not look up {what}: {said}", hint="Check the package index and the network."
    )


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        return []
    return [cast("dict[str, Any]", v) for v in cast("list[Any]", value) if isinstance(v, dict)]


def _from_lock(package: dict[str, Any]) -> list[Found]:
    """The wheel of one package of a pylock.toml; a pure wheel where there are several."""
    wheels = _tables(package.get("wheels"))
    wheels.sort(key=lambda w: not str(w.get("url") or w.get("path") or w.get("name")).endswith("-none-any.whl"))
    for wheel in wheels[:1]:
        hashes = wheel.get("hashes")
        sha256 = str(cast("dict[str, Any]", hashes).get("sha256", "")) if isinstance(hashes, dict) else ""
        size = wheel.get("size")
        place = str(wheel.get("url") or "")
        local = Path(str(wheel["path"])) if wheel.get("path") else None
        return [_place(package, place, local, sha256, size if isinstance(size, int) else None)]
    return []


def _report(text: str) -> list[Found]:
    """What pip says that it would install."""
    try:
        report = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise SourceUnavailable("pip's answer cannot be read: pip 22.2 or newer is needed", hint=INSTALL) from exc
    return [_from_report(item) for item in _tables(report.get("install"))]


def _from_report(item: dict[str, Any]) -> Found:
    download = cast("dict[str, Any]", item.get("download_info") or {})
    archive = cast("dict[str, Any]", download.get("archive_info") or {})
    hashes = cast("dict[str, Any]", archive.get("hashes") or {})
    sha256 = str(hashes.get("sha256") or str(archive.get("hash") or "").removeprefix("sha256="))
    metadata = cast("dict[str, Any]", item.get("metadata") or {})
    return _place(metadata, str(download.get("url") or ""), None, sha256, None)


def _place(about: dict[str, Any], url: str, path: Path | None, sha256: str, size: int | None) -> Found:
    url = url.partition("#")[0]
    if url.startswith("file:"):
        path, url = Path(unquote(urlsplit(url).path)), ""
    valid = sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else ""
    return Found(str(about.get("name") or ""), str(about.get("version") or ""), url, path, valid, size)


def _ordered(found: Sequence[Found], requirements: Sequence[str]) -> list[Found]:
    by_name = {canonicalize_name(w.name): w for w in found}
    missing = [r for r in requirements if canonicalize_name(Requirement(r).name) not in by_name]
    if missing:
        raise NotFound(f"no wheel of {', '.join(missing)} on the configured package index")
    chosen = [by_name[canonicalize_name(Requirement(r).name)] for r in requirements]
    for wheel in chosen:
        if not wheel.url and wheel.path is None:
            raise SourceUnavailable(f"the index gives no address for {wheel.name}")
        if wheel.url and urlsplit(wheel.url).scheme not in ("http", "https"):
            raise SourceUnavailable(f"{redact(wheel.url)} is not an address that can be fetched")
    return chosen
