"""All sources behind one session, by kind of reference; decides nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from pierhead.config import SourceSettings
from pierhead.errors import UsageError
from pierhead.events import Listener, ignore
from pierhead.paths import Paths
from pierhead.refs import Reference
from pierhead.sources.artifact import Artifacts
from pierhead.sources.base import Source
from pierhead.sources.http import Http, Retry
from pierhead.sources.hub import Hub
from pierhead.sources.installer import Installer
from pierhead.sources.local import Local
from pierhead.sources.modelscope import COOKIE, ModelScope
from pierhead.sources.ollama import Ollama
from pierhead.sources.pypi import PyPI
from pierhead.sources.web import Web


class Sources:
    """All sources behind one session; use as an async context manager."""

    def __init__(
        self,
        settings: SourceSettings,
        paths: Paths,
        *,
        listener: Listener = ignore,
        env: Mapping[str, str] | None = None,
        retry: Retry | None = None,
    ) -> None:
        env = os.environ if env is None else env
        self.http = Http(settings, retry=retry)
        self._scope_http = Http(settings, retry=retry, cookie=COOKIE)
        web = Web(self.http)
        installer = Installer(settings.pypi_installer, env)
        self._artifacts = Artifacts(settings, env, retry, listener)
        self._sources: dict[str, Source] = {
            "https": web,
            "http": web,
            "file": Local(),
            "hf": Hub.from_environment(self.http, settings.hf_endpoint, env),
            "ms": ModelScope.from_environment(self._scope_http, settings.ms_endpoint, env),
            "oci": self._artifacts,
            "ollama": Ollama(self._artifacts, env, listener),
            "pypi": PyPI(self.http, installer, paths.cache / "wheels", listener),
        }

    async def __aenter__(self) -> Self:
        await self.http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._artifacts.close()
        await self._scope_http.__aexit__(kind, value, trace)
        await self.http.__aexit__(kind, value, trace)

    def of(self, reference: Reference) -> Source:
        """The source of a reference; UsageError for kinds that cannot be pulled."""
        found = self._sources.get(reference.kind)
        if found is None:
            raise UsageError(
                f"'{reference}' cannot be pulled: {reference.kind} references are not supported yet",
                hint="Use a short name, hf:, ms:, oci:, ollama:, pypi:, https: or a file.",
            )
        return found
