"""Where a registry may send us: not into the user's own network, not by a name that changes its mind, not unproven."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from pierhead.config import SourceSettings
from pierhead.errors import ConfigError, PierError, SourceUnavailable
from pierhead.refs import parse
from pierhead.registry import connections
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login
from pierhead.registry.guard import proxy_for
from pierhead.registry.name import image_name
from pierhead.registry.places import Place, own_place
from pierhead.registry.tls import Trust, certificate_folders
from pierhead.registry.wire import Retry, is_private

from .doubles import DATA, DIGEST, Answer, Double, guarded, serving

pytestmark = pytest.mark.timeout(60)
ONCE = Retry(attempts=1, first=0.001, most=0.002)


class Names(AbstractResolver):
    """A name server that answers as it is told, in turn."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = {name.replace("_", "."): list(found) for name, found in answers.items()}
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        left = self.answers[host]
        address = left.pop(0) if len(left) > 1 else left[0]
        return [ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        pass


def registry(names: Names, double: Double, *, settings: SourceSettings | None = None) -> Registry:
    """A registry named far.example, on the double's port, with a login."""
    port = double.host.rpartition(":")[2]
    host = f"far.example:{port}"
    settings = settings or SourceSettings(insecure_registries=(host,), connect_timeout=1, read_timeout=2)
    name = image_name(parse(f"oci://{host}/a/b:v1"))
    return Registry(name, settings, Login("me", "secret-word"), retry=ONCE, resolver=lambda: names)


async def ask(registry: Registry) -> bytes:
    async with registry:
        return await registry.small(DIGEST)


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double listens on 127.0.0.1; for these tests only 10.0.0.0/8 is nearby."""
    from pierhead.registry import guard

    monkeypatch.setattr(guard, "is_private", lambda address: address.startswith("10."))


async def test_a_name_that_turns_to_a_nearby_address_is_not_connected_to(
    double: Double, loopback_is_public: None
) -> None:
    """Rebinding: the registry's own name is far away when first asked, and nearby when the login would go there."""
    names = Names(far_example=["127.0.0.1", "10.0.0.1"])
    double.behave = guarded("http://far.example:{port}/token")
    with pytest.raises(SourceUnavailable, match="own network"):
        await ask(registry(names, double))
    assert names.asked == ["far.example", "far.example"]
    assert [r.path.rpartition("/")[2] for r in double.requests] == [DIGEST]


@pytest.mark.parametrize("kind", ["token", "storage"])
async def test_a_far_registry_cannot_send_us_to_a_name_that_leads_nearby(
    double: Double, loopback_is_public: None, kind: str
) -> None:
    names = Names(far_example=["127.0.0.1"], trap_example=["10.0.0.1"])
    port = double.host.rpartition(":")[2]

    def behave(double: Double, request: web.Request) -> Answer:
        where = f"http://trap.example:{port}/token"
        if kind == "token":
            return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="{where}"'})
        return web.Response(status=307, headers={"Location": where})

    double.behave = behave
    with pytest.raises(SourceUnavailable) as caught:
        await ask(registry(names, double))
    assert "own network" in caught.value.message or "plain http" in caught.value.message
    assert "secret-word" not in str(caught.value.to_dict())
    assert len(double.requests) == 1


async def test_a_near_registry_may_keep_its_blobs_nearby_but_not_make_tokens_elsewhere(double: Double) -> None:
    names = Names(far_example=["127.0.0.1"], other_example=["127.0.0.1"])
    port = double.host.rpartition(":")[2]

    def behave(double: Double, request: web.Request) -> Answer:
        if request.host.startswith("other"):
            assert "Authorization" not in request.headers
            return None
        return web.Response(status=307, headers={"Location": f"http://other.example:{port}/storage"})

    double.behave = behave
    assert await ask(registry(names, double)) == DATA
    double.behave = guarded(f"https://other.example:{port}/token")
    with pytest.raises(SourceUnavailable, match=r"own network \(other\.example\)") as caught:
        await ask(registry(names, double))
    assert "token_hosts" in (caught.value.hint or "")


@pytest.mark.parametrize("method", ["GET", "PATCH", "PUT"])
async def test_a_registry_with_tls_cannot_send_an_upload_anywhere_in_the_clear(double: Double, method: str) -> None:
    """What it says as the place of an upload is not followed through redirects, which look at that themselves."""
    place = Place("127.0.0.1:1", "https://127.0.0.1:1")
    name = image_name(parse("oci://127.0.0.1:1/a/b:v1"))
    where = f"http://localhost:{double.host.rpartition(':')[2]}/upload"
    async with Registry(name, SourceSettings(), Login("me", "word"), retry=ONCE, place=place) as found:
        with pytest.raises(SourceUnavailable, match="plain http"):
            async with found.request(method, where, push=True, data=b"weights"):
                pass
    assert double.requests == []


async def test_a_token_host_that_the_user_names_is_asked(double: Double) -> None:
    names = Names(far_example=["127.0.0.1"], tokens_example=["127.0.0.1"])
    port = double.host.rpartition(":")[2]
    settings = SourceSettings(insecure_registries=(f"far.example:{port}",), token_hosts=("tokens.example",))
    double.behave = guarded(f"http://tokens.example:{port}/token")
    assert await ask(registry(names, double, settings=settings)) == DATA
    assert any(r.host.startswith("tokens.example") for r in double.requests)


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "127.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "64:ff9b::a00:1", "0.0.0.0",
     "2002:a00:1::", "fd00::1", "100.64.0.1"],
)  # fmt: skip
def test_addresses_nearby_are_known_in_every_dress(address: str) -> None:
    assert is_private(address)
    assert not is_private("8.8.8.8")
    assert not is_private("64:ff9b::808:808")


# --- proxies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://ghcr.io/v2/", "http://proxy.lan:3128"),
        ("http://plain.example/", "http://other.lan"),
        ("https://a.corp.example/", ""),
        ("https://corp.example:8443/", ""),
        ("https://10.1.2.3:5000/", ""),
        ("https://11.1.2.3:5000/", "http://proxy.lan:3128"),
        ("https://reg.lan:5000/", ""),
        ("https://reg.lan:5001/", "http://proxy.lan:3128"),
        ("http://127.0.0.1:5000/", ""),
    ],
)
def test_the_environment_says_which_proxy(url: str, expected: str) -> None:
    env = {
        "HTTPS_PROXY": "http://proxy.lan:3128",
        "http_proxy": "other.lan",
        "NO_PROXY": ".corp.example, 10.0.0.0/8,reg.lan:5000",
    }
    assert proxy_for(url, env) == expected


async def test_a_proxy_is_asked_for_a_registry_far_away(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://me:proxy-word@{double.host}")
    settings = SourceSettings(insecure_registries=("far.example:5000",))
    name = image_name(parse("oci://far.example:5000/a/b:v1"))
    async with Registry(name, settings, Login("me", "word"), retry=ONCE) as found:
        assert await found.small(DIGEST) == DATA
    assert double.requests[0].headers["Host"] == "far.example:5000"
    assert double.requests[0].headers["Proxy-Authorization"].startswith("Basic ")
    monkeypatch.setenv("no_proxy", "far.example")
    assert proxy_for("http://far.example:5000/") == ""


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.crt, and server and client certificates (.cert, .key) that it signed."""
    if shutil.which("openssl") is None:
        pytest.skip("this machine has no openssl")
    folder = tmp_path_factory.mktemp("ca")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=30)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-days", "2", "-subj", "/CN=ours", "-keyout", "ca.key", "-out", "ca.crt")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san"]
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.cert")
    return folder


@pytest.fixture
async def secure(authority: Path) -> AsyncGenerator[Double]:
    """A registry with TLS that wants a client's certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority / "ca.crt")
    context.load_cert_chain(authority / "server.cert", authority / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    async with serving(Double(), ssl_context=context) as found:
        yield found


async def ask_secure(secure: Double, folders: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, **more: str) -> bytes:
    monkeypatch.setattr(connections, "Trust", lambda settings: Trust(settings, folders))
    name = image_name(parse(f"oci://{secure.host}/a/b:v1"))
    settings = SourceSettings(connect_timeout=5, read_timeout=5, **more)  # type: ignore[arg-type]
    place = Place(secure.host, f"https://{secure.host}")
    async with Registry(name, settings, Login(), retry=ONCE, place=place) as found:
        return await found.small(DIGEST)


async def test_dockers_folders_say_whom_to_trust_and_who_we_are(
    secure: Double, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceUnavailable, match="secure connection") as caught:
        await ask_secure(secure, (tmp_path,), monkeypatch)
    assert "ca_file" in (caught.value.hint or "")
    folder = tmp_path / secure.host
    folder.mkdir()
    shutil.copy(authority / "ca.crt", folder / "ca.crt")
    with pytest.raises(SourceUnavailable):  # it wants to know who we are
        await ask_secure(secure, (tmp_path,), monkeypatch)
    for name in ("client.cert", "client.key"):
        shutil.copy(authority / name, folder / name)
    assert await ask_secure(secure, (tmp_path,), monkeypatch) == DATA
    (folder / "ca.crt").unlink()
    assert await ask_secure(secure, (tmp_path,), monkeypatch, ca_file=str(authority / "ca.crt")) == DATA


async def test_certificates_that_cannot_be_used_are_named(
    secure: Double, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / secure.host
    folder.mkdir()
    cases = {
        "ca.crt": (b"no certificate", "authorities"),
        "client.cert": ((authority / "client.cert").read_bytes(), "no key beside it"),
    }
    for name, (content, words) in cases.items():
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            await ask_secure(secure, (tmp_path,), monkeypatch)
        (folder / name).unlink()
    shutil.copy(authority / "client.cert", folder / "client.cert")
    locked = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", "client.key", "-out", str(folder / "client.key")]
    subprocess.run(locked, cwd=authority, check=True, capture_output=True, timeout=30)  # noqa: ASYNC221
    with pytest.raises(ConfigError, match="cannot use"):
        await ask_secure(secure, (tmp_path,), monkeypatch)
    with pytest.raises(PierError, match="authorities"):
        await ask_secure(secure, (), monkeypatch, ca_file=str(tmp_path / "gone.pem"))


def test_the_usual_folders_are_looked_in() -> None:
    assert {str(p) for p in certificate_folders()} >= {"/etc/docker/certs.d", str(Path.home() / ".docker" / "certs.d")}


def test_plain_http_is_for_loopback_and_what_is_configured() -> None:
    settings = SourceSettings(insecure_registries=("registry.lan:5000",))
    assert own_place("127.0.0.1:5000", settings).plain
    assert own_place("registry.lan:5000", settings).plain
    assert not own_place("registry.lan", settings).plain
    assert not own_place("10.0.0.1:5000", settings).plain
