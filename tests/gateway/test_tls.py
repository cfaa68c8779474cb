"""TLS on the gateway's addresses: which speak it, what a new certificate changes, and what a client that errs gets."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import shutil
import signal
import ssl
import warnings
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pierhead.config import GatewaySettings
from pierhead.errors import ConfigError
from pierhead.gateway import link
from pierhead.gateway.tls import Certificate

DEADLINE = 10.0


class Authority:
    """Makes certificates."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.cert = self._sign(name, self.key, ca=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self.cert.public_bytes(serialization.Encoding.PEM))

    def _sign(self, name: str, key: Any, *, ca: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if ca else self.cert.subject
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            made = made.add_extension(usage, critical=True)
        return made.sign(self.key, hashes.SHA256())

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        cert_file, key_file = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        cert_file.write_bytes(self._sign(name, key).public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file

    def context(self, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.file))
        if client:
            context.load_cert_chain(*map(str, client))
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Secure:
    """A gateway whose loopback address speaks TLS."""

    def __init__(self, gate: Any, authority: Authority) -> None:
        self.gate = gate
        self.authority = authority

    async def open(self, client: tuple[Path, Path] | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(DEADLINE):
            return await asyncio.open_connection(
                "127.0.0.1", self.gate.port, ssl=self.authority.context(client), server_hostname="localhost"
            )

    async def name(self) -> str:
        """The common name of the certificate that a new connection gets."""
        _, writer = await self.open()
        cert = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(True))
        writer.close()
        return str(cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)

    async def named(self, name: str) -> None:
        async with asyncio.timeout(DEADLINE):
            while await self.name() != name:
                pass


@pytest.fixture
async def secure(new_gate: Any, authority: Authority) -> Secure:
    cert, key = authority.issue("one")
    shutil.copy(cert, authority.folder / "tls.crt")
    shutil.copy(key, authority.folder / "tls.key")
    gate = await new_gate(
        tls_cert=str(authority.folder / "tls.crt"), tls_key=str(authority.folder / "tls.key"), tls_loopback=True
    )
    return Secure(gate, authority)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(DEADLINE):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head.split()[1]), await reader.readexactly(length)


def put(source: tuple[Path, Path], folder: Path) -> None:
    for path, name in zip(source, ("tls.crt", "tls.key"), strict=True):
        shutil.copy(path, folder / f".{name}")
        (folder / f".{name}").rename(folder / name)


async def test_requests_and_streams_go_over_tls_on_one_connection(secure, new_engine, http, chat):
    async def stream(call):
        if b'"stream"' not in call.body:
            await call.json({"choices": [{"message": {"content": "x" * 300_000}}]})
            return
        await call.sse()
        for n in range(3):
            await call.event({"n": n})
        await call.event(b"[DONE]")
        await call.end()

    engine = await new_engine(stream)
    await secure.gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    reader, writer = await secure.open()
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    for _ in range(2):
        writer.write(http("POST", "/v1/chat/completions", chat))
        status, body = await answer(reader)
        assert (status, len(json.loads(body)["choices"][0]["message"]["content"])) == (200, 300_000)
        writer.write(http("POST", "/v1/chat/completions", chat | {"stream": True}))
        async with asyncio.timeout(DEADLINE):
            assert b'{"n": 2}' in await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    assert (await secure.gate.ask("GET", "/health", unix=True)).status == 200  # the unix socket stays as it is


async def test_a_client_that_leaves_over_tls_frees_the_engine(secure, new_engine, http, chat):
    begun = asyncio.Event()

    async def endless(call):
        await call.sse()
        await call.event({"n": 1})
        begun.set()
        await call.reader.read()
        raise ConnectionResetError

    engine = await new_engine(endless)
    await secure.gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    for leave in ("close", "abort", "eof"):
        begun.clear()
        reader, writer = await secure.open()
        writer.write(http("POST", "/v1/chat/completions", chat | {"stream": True}))
        async with asyncio.timeout(DEADLINE):
            await begun.wait()
            await reader.readuntil(b'{"n": 1}')
            if leave == "close":
                writer.close()
            elif leave == "abort":
                writer.transport.abort()
            else:  # TCP's end without TLS's
                writer.get_extra_info("socket").shutdown(1)
            await engine.gone.get()
        writer.transport.abort()


async def test_a_refused_request_gets_its_whole_answer_before_the_end(secure, http):
    reader, writer = await secure.open()
    writer.write(b"GET / HTTP/9.9\r\n\r\n" + b"x" * 200_000)
    status, body = await answer(reader)
    assert status in (400, 505)
    assert b"error" in body
    async with asyncio.timeout(DEADLINE):
        assert await reader.read() == b""
    writer.transport.abort()


async def test_old_versions_of_tls_and_plain_http_are_turned_away(secure):
    old = secure.authority.context()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", secure.gate.port, ssl=old, server_hostname="localhost")
    reader, writer = await asyncio.open_connection("127.0.0.1", secure.gate.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    async with asyncio.timeout(DEADLINE):
        assert b"200" not in await reader.read()  # closed, not cut: a reset would raise
    writer.close()
    assert await secure.name() == "one"


async def test_a_new_certificate_is_used_without_cutting_a_connection(secure, http):
    reader, writer = await secure.open()
    put(secure.authority.issue("two"), secure.authority.folder)
    await secure.named("two")
    writer.write(http("GET", "/health"))
    assert (await answer(reader))[0] == 200  # the old connection goes on
    writer.close()


async def test_no_connection_fails_while_certificates_change(secure, http):
    done, failed = asyncio.Event(), []

    async def ask() -> None:
        while not done.is_set():
            try:
                reader, writer = await secure.open()
                writer.write(http("GET", "/health"))
                assert (await answer(reader))[0] == 200
                writer.close()
            except (OSError, AssertionError) as exc:
                failed.append(exc)

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    for n in range(4):
        put(secure.authority.issue(f"n{n}"), secure.authority.folder)
        os.kill(secure.gate.pid, signal.SIGHUP)
        await secure.named(f"n{n}")
    done.set()
    await asyncio.gather(*asking)
    assert failed == []


async def test_a_broken_new_certificate_leaves_the_old_one_in_force_and_is_told(secure):
    (secure.authority.folder / "tls.crt").write_text("no certificate")
    async with asyncio.timeout(DEADLINE):
        while not (report := await secure.gate.next(link.Report)).problems:
            pass
    assert "stays in force" in report.problems[0]
    assert await secure.name() == "one"
    put(secure.authority.issue("three"), secure.authority.folder)
    await secure.named("three")
    async with asyncio.timeout(DEADLINE):
        while (await secure.gate.next(link.Report)).problems:
            pass


async def health(secure: Secure, client: tuple[Path, Path] | None, http: Any) -> None:
    reader, writer = await secure.open(client)
    try:
        writer.write(http("GET", "/health"))
        await answer(reader)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_clients_show_a_certificate_where_one_is_asked_for(new_gate, authority, http):
    cert, key = authority.issue("server")
    gate = await new_gate(tls_cert=str(cert), tls_key=str(key), tls_client_ca=str(authority.file), tls_loopback=True)
    secure = Secure(gate, authority)
    reader, writer = await secure.open(authority.issue("client"))
    writer.write(http("GET", "/health"))
    assert (await answer(reader))[0] == 200
    writer.close()
    stranger = Authority(authority.folder, "stranger").issue("other")
    for client in (None, stranger):
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await health(secure, client, http)


async def test_loopback_stays_plain_unless_settings_say_so(new_gate, authority):
    cert, key = authority.issue("server")
    snapshot = {"type": "snapshot", "version": 1, "pepper": "00", "keys": [{"id": "k", "mac": "00" * 32}]}
    gate = await new_gate(
        tls_cert=str(cert), tls_key=str(key), listen=("127.0.0.1:0", "0.0.0.0:0"), extra={"snapshot": snapshot}
    )
    assert (await gate.ask("GET", "/health")).status == 200
    far = next(int(a.rpartition(":")[2]) for a in gate.addresses if a.startswith("0.0.0.0"))
    _, writer = await asyncio.open_connection("127.0.0.1", far, ssl=authority.context(), server_hostname="localhost")
    writer.close()


async def test_the_sockets_handed_over_go_on_in_tls(secure, new_gate, sockets, http):
    addresses, fds = sockets(secure.gate)
    settings = secure.gate.settings
    after = type(secure.gate)(secure.gate.folder, settings)
    inherit = [{"fd": fd, "address": address} for fd, address in zip(fds, addresses, strict=True)]
    await after.launch({"inherit": inherit}, pass_fds=tuple(fds))
    secure.gate.say(link.Drain(5.0))
    assert await Secure(after, secure.authority).name() == "one"
    assert "Traceback" not in await after.stop()


@pytest.mark.parametrize("wrong", ["missing", "mismatch", "password", "junk"])
def test_a_gateway_does_not_start_with_a_certificate_that_is_none(authority, wrong):
    cert, key = authority.issue("one")
    if wrong == "missing":
        cert = cert.with_name("nothing")
    elif wrong == "mismatch":
        _, key = authority.issue("two")
    elif wrong == "junk":
        cert.write_bytes(b"\0" * 100)
    else:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        key.write_bytes(
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
    with pytest.raises(ConfigError) as caught:
        Certificate(GatewaySettings(tls_cert=str(cert), tls_key=str(key))).load()
    assert "tls_cert" in (caught.value.hint or "")
