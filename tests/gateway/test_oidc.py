"""Tokens of an OpenID provider: those that hold are as good as keys, and hostile ones are not."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pierhead.config import GatewaySettings
from pierhead.errors import ConfigError
from pierhead.gateway import link
from pierhead.gateway.issuer import fetchable
from pierhead.gateway.tokens import check_settings

RSA = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def public(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    kinds = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    algorithm = next(a for kind, a in kinds.items() if isinstance(key, kind))
    return json.loads(algorithm.to_jwk(key.public_key())) | {"kid": kid} | more


class Provider:
    """A local provider with real keys."""

    def __init__(self) -> None:
        self.keys = [
            public(RSA, "r1"),
            public(EC, "e1"),
            public(ED, "d1"),
            {"kty": "oct", "kid": "o1", "k": "c2VjcmV0"},
        ]
        self.fetched = 0
        self.name: str | None = None
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.endswith("openid-configuration"):
                    document = {"issuer": provider.name or provider.url, "jwks_uri": provider.url + "/jwks"}
                else:
                    provider.fetched += 1
                    document = {"keys": provider.keys}
                raw = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def claims(self, **changes: Any) -> dict[str, Any]:
        claims = {"iss": self.url, "aud": "pierhead", "sub": "ann", "exp": time.time() + 60} | changes
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, key: Any = RSA, algorithm: str = "RS256", kid: str | None = "r1", **changes: Any) -> str:
        return jwt.encode(self.claims(**changes), key, algorithm, headers={"kid": kid} if kid else None)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.stop()


def settings(provider: Provider, **more: Any) -> dict[str, Any]:
    return {"oidc_issuer": provider.url, "oidc_audience": "pierhead", "require_key": True} | more


async def models(gate: Any, token: str) -> tuple[int, str]:
    got = await gate.ask("GET", "/v1/models", headers={"authorization": f"Bearer {token}"})
    return got.status, "" if got.status == 200 else got.json()["error"]["code"]


async def test_tokens_of_every_algorithm_that_counts_are_accepted_and_looked_up_once(new_gate, provider):
    gate = await new_gate(**settings(provider))
    for key, algorithm, kid in ((RSA, "RS256", "r1"), (RSA, "PS512", "r1"), (EC, "ES256", "e1"), (ED, "EdDSA", "d1")):
        assert await models(gate, provider.token(key, algorithm, kid)) == (200, "")
    assert await models(gate, provider.token(kid=None)) == (200, "")  # the only key of its kind
    assert provider.fetched == 1


async def test_hostile_tokens_are_refused(new_gate, provider):
    gate = await new_gate(**settings(provider))
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def forged(header: dict[str, Any], secret: bytes | None = None, claims: dict[str, Any] | None = None) -> str:
        parts = [json.dumps(part).encode() for part in (header, claims or provider.claims())]
        text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
        signature = hmac.digest(secret, text, hashlib.sha256) if secret is not None else b""
        return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()

    good = provider.token()
    head, body, signature = good.split(".")
    for name, token in {
        "none": forged({"alg": "none", "typ": "JWT"}),
        "None": forged({"alg": "None", "kid": "r1"}),
        "confusion": forged({"alg": "HS256", "kid": "r1"}, pem),
        "oct": forged({"alg": "HS256", "kid": "o1"}, b"secret"),
        "other key": provider.token(OTHER),
        "kind": forged({"alg": "ES256", "kid": "r1"}),
        "audience": provider.token(aud="another"),
        "no audience": provider.token(aud=None),
        "issuer": provider.token(iss="https://evil.example"),
        "expired": provider.token(exp=time.time() - 60),
        "no expiry": provider.token(exp=None),
        "not yet": provider.token(nbf=time.time() + 3600),
        "no subject": provider.token(sub=None),
        "unknown kid": provider.token(kid="r9"),
        "jku": jwt.encode(provider.claims(), OTHER, "RS256", headers={"kid": "x", "jku": "https://evil.example/jwks"}),
        "jwk": jwt.encode(provider.claims(), OTHER, "RS256", headers={"kid": "x", "jwk": public(OTHER, "x")}),
        "crit": jwt.encode(provider.claims(), RSA, "RS256", headers={"kid": "r1", "crit": ["exp"]}),
        "changed": f"{head}.{body[:-4]}AAAA.{signature}",
        "cut": f"{head}.{body}.",
        "empty": "ey..",
        "junk": "eyJ.\u00ff.x".encode("latin-1").decode("latin-1"),
        "huge": "ey" + "a" * 20_000 + ".b.c",
        "nested": forged({"alg": "RS256", "kid": ["r1"]}),
    }.items():
        assert (await models(gate, token))[0] == 401, name
    assert await models(gate, good) == (200, "")
    assert (await models(gate, provider.token(exp=time.time() - 5)))[0] == 200  # clocks may differ a little
    assert provider.fetched == 1  # unknown names of keys do not make it ask again and again


async def test_claims_say_what_a_token_may_do_and_settings_what_they_do_not(new_gate, provider, new_engine, chat):
    async def ok(call):
        await call.json({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    engine = await new_engine(ok)
    claims = {"models": "pier.models", "admin": "roles=ops", "rpm": "https://example.com/rpm"}
    gate = await new_gate(**settings(provider, oidc_claims=claims, oidc_grants={"budgets": ["3requests/day"]}))
    await gate.serve(link.Route(name="smol", endpoints=(engine.endpoint,)), link.Route(name="big"))

    async def ask(token: str, model: str = "smol") -> tuple[int, str]:
        headers = {"authorization": f"Bearer {token}"}
        got = await gate.ask("POST", "/v1/chat/completions", chat | {"model": model}, headers=headers)
        return got.status, "" if got.status == 200 else got.json()["error"]["code"]

    narrow = provider.token(pier={"models": ["smol*"]})
    assert await ask(narrow) == (200, "")
    assert await ask(narrow, "big") == (403, "model_not_allowed")
    assert await ask(provider.token(pier={"models": "smol big"})) == (200, "")
    for nothing in ([], "", " "):
        assert await ask(provider.token(pier={"models": nothing})) == (403, "unusable_claims")
    assert await ask(provider.token(jti="another")) == (200, "")
    assert await ask(provider.token(jti="fourth")) == (402, "budget_exceeded")  # one subject, one budget
    assert await ask(provider.token(sub="bob", **{"https://example.com/rpm": 1})) == (200, "")
    assert (await ask(provider.token(sub="bob", **{"https://example.com/rpm": 1})))[0] == 429
    assert await ask(provider.token(sub="eve", **{"https://example.com/rpm": "much"})) == (403, "unusable_claims")

    async def status(token: str) -> int:
        return (await gate.ask("GET", "/api/v1/status", headers={"authorization": f"Bearer {token}"})).status

    assert await status(provider.token(roles=["dev"])) == 403
    assert await status(provider.token(roles=["dev", "ops"])) == 503  # let in; no daemon is there
    assert await status(provider.token(roles="ops dev", sub="carl")) == 503


async def test_a_token_ends_on_an_open_connection(new_gate, provider, http):
    gate = await new_gate(**settings(provider))
    wire = await gate.wire()
    ask = http("GET", "/v1/models", None, {"authorization": f"Bearer {provider.token(exp=time.time() - 28)}"})
    seen = []
    async with asyncio.timeout(20):
        while not seen or seen[-1] == 200:
            await wire.send(ask)
            seen.append((await wire.answer()).status)
    assert seen[0] == 200
    assert seen[-1] == 401


async def test_pipelined_requests_and_bodies_wait_for_the_token(new_gate, provider, new_engine, http, chat):
    async def ok(call):
        await call.json({"size": len(call.body)})

    engine = await new_engine(ok)
    gate = await new_gate(**settings(provider))
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    wire = await gate.wire()
    headers = {"authorization": f"Bearer {provider.token()}"}
    long = chat | {"messages": [{"role": "user", "content": "x" * 300_000}]}
    await wire.send(http("POST", "/v1/chat/completions", long, headers) + http("GET", "/v1/models", None, headers))
    assert (await wire.answer()).json()["size"] > 300_000
    assert (await wire.answer()).status == 200


async def test_a_provider_that_is_away_is_named_and_keys_go_on(new_gate, provider):
    provider.name = "https://somebody.else"
    gate = await new_gate(**settings(provider))
    mac = hmac.new(b"p" * 32, b"sk-one", hashlib.sha256).hexdigest()
    await gate.serve(keys=(link.Key(id="k", mac=mac),), pepper=(b"p" * 32).hex())
    assert await models(gate, provider.token()) == (503, "issuer_unavailable")
    assert await models(gate, "sk-one") == (200, "")


async def test_keys_of_a_provider_may_rotate(monkeypatch, provider):
    from pierhead.gateway import issuer as issuers

    issuer = issuers.Issuer(provider.url, "pierhead")
    assert (await issuer.verify(provider.token()))["sub"] == "ann"
    provider.keys = [public(OTHER, "r2")]
    monkeypatch.setattr(issuers, "_PAUSE", 0.0)
    assert (await issuer.verify(provider.token(OTHER, kid="r2")))["sub"] == "ann"
    assert provider.fetched == 2
    with pytest.raises(issuers.Fault):
        await issuer.verify(provider.token())


def test_a_provider_without_tls_or_audience_is_refused():
    assert fetchable("https://id.example")
    assert fetchable("http://127.0.0.1:8080/realm")
    assert fetchable("http://[::1]/")
    for url in ("http://id.example", "http://127.0.0.1.evil.example", "file:///etc/passwd", "https://", "ftp://x", ""):
        assert not fetchable(url), url
    for bad in (
        GatewaySettings(oidc_issuer="http://id.example", oidc_audience="x"),
        GatewaySettings(oidc_issuer="https://id.example"),
        GatewaySettings(oidc_issuer="https://id.example", oidc_audience="x", oidc_claims={"colour": "x"}),
    ):
        with pytest.raises(ConfigError) as caught:
            check_settings(bad)
        assert caught.value.hint
