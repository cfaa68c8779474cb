"""TLS: the user's own authorities count, unknown ones do not, and nothing falls back to plain http."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from pierhead import events

from .servers import Child, Puller, Server, make_gguf, serving

MODEL = make_gguf()
Spawn = Callable[..., Awaitable[Child]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("this machine has no openssl")
    folder = tmp_path_factory.mktemp("tls")
    file, key = folder / "cert.pem", folder / "key.pem"
    made = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    made += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)]
    subprocess.run([openssl, "req", *made, *names], check=True, capture_output=True, timeout=30)
    file.write_text(file.read_text() + key.read_text())
    return file


@pytest.fixture
async def secure(certificate: Path) -> AsyncGenerator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with serving(context) as server:
        yield server


async def test_an_authority_of_the_users_own_is_trusted(
    secure: Server, certificate: Path, puller: Puller, spawn: Spawn
) -> None:
    child = await spawn(secure.add("/m.gguf", MODEL), SSL_CERT_FILE=str(certificate))
    assert isinstance((await child.events())[-1], events.PullDone)


async def test_an_authority_that_the_settings_name_is_trusted(
    secure: Server, certificate: Path, puller: Puller
) -> None:
    settings = msgspec.structs.replace(puller.settings, ca_file=str(certificate))
    record = await puller(secure.add("/m.gguf", MODEL), settings=settings)
    assert puller.content(record) == MODEL


async def test_an_unknown_authority_is_refused_at_once(secure: Server, puller: Puller, spawn: Spawn) -> None:
    child = await spawn(secure.add("/m.gguf", MODEL))
    last = (await child.events())[-1]
    assert isinstance(last, events.Failed)
    assert last.error["code"] == "source_unavailable"
    assert "secure connection" in last.error["message"]
    assert "SSL_CERT_FILE" in last.error["hint"]


async def test_a_redirect_to_plain_http_is_refused(
    secure: Server, server: Server, certificate: Path, puller: Puller, spawn: Spawn
) -> None:
    plain = server.add("/m.gguf", MODEL)
    child = await spawn(secure.add("/m.gguf", redirect=plain), SSL_CERT_FILE=str(certificate))
    last = (await child.events())[-1]
    assert isinstance(last, events.Failed)
    assert "plain http" in last.error["message"]
    assert server.requests == []
