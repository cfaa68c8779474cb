"""What recordings keep: no credentials, no personal data, no media; and never a pattern that takes for ever."""

from __future__ import annotations

import base64
import hashlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.gateway.telemetry.redact import SLOW, Redactor, iban, luhn

SECRETS = [
    "Authorization: Bearer abc.def-ghi_123456",
    "curl -H 'x-api-key: sk-ant-api03-AbCdEf0123456789'",
    "sk-proj-abc123DEF456ghi789",
    "pier_abcDEF_1234567890abcdefghij",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "AKIAIOSFODNN7EXAMPLE",
    "password: hunter22",
    'api_key="0123456789abcdef"',
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdef-_123",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
    "write to jo.doe+list@mail.example.co.uk",
    "call +49 170 1234567",
    "call +1 (415) 555-2671",
    "call 415-555-2671",
    "call 030 12345678",
    "card 4111 1111 1111 1111",
    "card 4111111111111111",
    "account DE89 3704 0044 0532 0130 00",
]


@pytest.mark.parametrize("text", SECRETS)
def test_what_is_private_is_taken_out(text):
    done = Redactor().text(f"Hello, {text} and so on.")
    secret = text.split()[-1].strip("'")
    assert secret not in done
    assert done.startswith("Hello, ")
    assert done.endswith("and so on.")
    assert "[" in done


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-25 10:30:00", "25.11.2026", "192.168.100.200:8080", "version 1.5.0", "pi is 3.14159265358979",
        "1 2 3 4 5 6 7 8 9 10", "skeleton, sk-learn and hf-transformers", "order 1234567890123456", "a@b",
        "def f(x): return x * 2",
    ],
)  # fmt: skip
def test_what_is_not_private_stays(text):
    assert Redactor().text(text) == text


def test_bodies_keep_their_shape():
    image = base64.b64encode(bytes(range(256)) * 4).decode()
    body = {
        "model": "m", "max_tokens": 5, "stream": True, "temperature": 0.5, "api_key": "x", "token": "y",
        "messages": [{"role": "user", "content": [
            {"type": "text", "text": "mail a.b@example.com"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "image", "source": {"type": "base64", "data": image}},
        ]}],
    }  # fmt: skip
    redactor = Redactor()
    done = redactor.body(json.dumps(body).encode())
    digest = hashlib.sha256(base64.b64decode(image)).hexdigest()
    parts = done["messages"][0]["content"]
    assert (done["max_tokens"], done["stream"], done["temperature"]) == (5, True, 0.5)
    assert (done["api_key"], done["token"]) == ("[redacted]", "[redacted]")
    assert parts[0]["text"] == "mail [e-mail]"
    assert parts[1]["image_url"]["url"] == f"[image/png sha256:{digest} 1024 bytes]"
    assert digest in parts[2]["source"]["data"]
    assert redactor.media


def test_what_is_no_json_is_cleaned_as_text():
    assert Redactor().body(b'{"cut": "mail a.b@example.com') == '{"cut": "mail [e-mail]'
    assert Redactor().body(b"") is None
    deep = Redactor().body(b"[" * 900 + b"]" * 900)
    assert "nested too deep" in json.dumps(deep)


def test_patterns_of_the_settings_hold_and_are_stopped_when_they_take_too_long():
    assert Redactor((r"project-\w+",)).text("on project-apollo now") == "on [redacted] now"
    begin = time.monotonic()
    assert Redactor((r"(a+)+$",)).text("a" * 40 + "b") == SLOW
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "text", ["eyJaaaaa-" * 30_000, "1 " * 100_000, "sk-" * 90_000, "a@" * 90_000, "password " * 30_000, "+49 " * 60_000]
)
def test_hostile_text_costs_bounded_time(text):
    begin = time.monotonic()
    Redactor().text(text)
    assert time.monotonic() - begin < 3


@given(st.text())
def test_any_text_is_taken(text):
    assert isinstance(Redactor().text(text), str)
    Redactor().body(text.encode("utf-8", "surrogatepass"))


def test_check_sums():
    assert luhn("4111 1111 1111 1111")
    assert not luhn("4111 1111 1111 1112")
    assert iban("GB82 WEST 1234 5698 7654 32")
    assert not iban("GB82 WEST 1234 5698 7654 33")
