"""routes.toml is understood whole, or refused with the place and the closest known word."""

from __future__ import annotations

import pytest

from pierhead.daemon.baseurl import Address, address
from pierhead.daemon.routefile import read
from pierhead.errors import ConfigError

WHOLE = """
[providers.openai]
base_url = "https://api.openai.com/v1"
secret = "openai"
models = ["gpt-4o-mini"]
headers = { OpenAI-Organization = "org-1" }
timeout = 30

[providers.claude]
base_url = "https://api.anthropic.com"
dialect = "anthropic"
secret = "env:ANTHROPIC_API_KEY"

[routes.fast]
sticky = "header:X-Session-Id"
timeout = 10
to = [
  { model = "smollm2", weight = 9 },
  { provider = "openai", model = "gpt-4o-mini" },
  { model = "big", when = { key = "laptop", header = { x-tier = "gold*" } } },
]

[[routes.fast.fallback]]
provider = "claude"
model = "claude-haiku"
on = ["overload", "context"]

[routes.fast.mirror]
model = "candidate"
share = 0.1
tokens_per_day = 100000
"""
ROUTE = '[routes.r]\nto = [{ model = "m" }]\n'


def test_a_whole_file_is_understood() -> None:
    file = read(WHOLE)
    route = file.routes["fast"]
    assert [to.weight for to in route.to] == [9, 1, 1]
    assert route.to[2].when.header == {"x-tier": "gold*"}
    assert route.fallback[0].on == ("overload", "context")
    assert route.mirror is not None
    assert route.mirror.tokens_per_day == 100000
    assert file.providers["claude"].dialect == "anthropic"


def test_an_empty_file_has_no_routes() -> None:
    assert read("").routes == {}


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("[route.r]\n", "unknown key 'route'", "'routes'"),
        ("[routes.r]\nstickey = 'user'\nto = []\n", "unknown key 'stickey' in routes.r", "'sticky'"),
        ("[routes.r]\nto = [{ model = 'm', wieght = 1 }]\n", "'wieght' in routes.r.to[0]", "'weight'"),
        ("[routes.r]\nto = [{ model = 'm', when = { keys = 'k' } }]\n", "'keys' in routes.r.to[0].when", "'key'"),
        ("[providers.p]\nbase_ulr = 'https://x'\n", "'base_ulr' in providers.p", "'base_url'"),
        ("[providers.p]\nbase_url = 'https://x'\nserves = ['chatt']\n", "no operation 'chatt'", "'chat'"),
        (ROUTE + "[providers.ok]\nbase_url='https://x'\n[routes.s]\nto=[{provider='okk',model='m'}]", "'okk'", "'ok'"),
    ],
)
def test_an_unknown_word_is_refused_with_the_closest_one(text: str, place: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert place in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    "text",
    [
        "[routes.r",
        "[routes.r]\n",
        "[routes.r]\nto = []\n",
        "[routes.r]\nto = [{ model = 'm', weight = 0 }]\n",
        "[routes.r]\nto = [{ model = 'm', weight = -1 }]\n",
        "[routes.r]\nto = [{ model = 'm', weight = nan }]\n",
        "[routes.r]\nto = [{ model = 'm', weight = inf }]\n",
        "[routes.r]\nto = [{ model = 'm', weight = 'much' }]\n",
        "[routes.r]\nto = [{ model = '' }]\n",
        "[routes.r]\nto = [{ model = 'm', when = { key = 'k' } }]\n",
        "[routes.r]\nto = [{ model = 'm' }, { model = 'n', when = { header = { authorization = 'x' } } }]\n",
        "[routes.r]\nsticky = 'moon'\nto = [{ model = 'm' }]\n",
        "[routes.r]\nsticky = 'header:'\nto = [{ model = 'm' }]\n",
        "[routes.r]\nsticky = 'header:a b'\nto = [{ model = 'm' }]\n",
        "[routes.r]\ntimeout = -1\nto = [{ model = 'm' }]\n",
        "[routes.'a b']\nto = [{ model = 'm' }]\n",
        ROUTE + "[[routes.r.fallback]]\nmodel = 'x'\non = ['moon']\n",
        ROUTE + "[routes.r.mirror]\nmodel = 'x'\nshare = 2\n",
        ROUTE + "[providers.p]\nbase_url = 'https://x'\nheaders = { authorization = 'Bearer x' }\n",
        ROUTE + "[providers.p]\nbase_url = 'https://x'\nheaders = { a = \"b\\r\\nc: d\" }\n",
        ROUTE + "[providers.p]\nbase_url = 'https://x'\nheaders = { 'a b' = 'c' }\n",
        ROUTE + "[providers.'A/B']\nbase_url = 'https://x'\n",
    ],
)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"routes\.toml"):
        read(text)


def test_a_route_cannot_lead_to_another_so_nothing_goes_round() -> None:
    with pytest.raises(ConfigError, match="cannot lead to another"):
        read(ROUTE + "[routes.s]\nto = [{ model = 'm' }]\n[[routes.s.fallback]]\nmodel = 'r'\n")
    with pytest.raises(ConfigError, match="cannot lead to another"):
        read("[routes.r]\nto = [{ model = 'r' }]\n")


def test_a_route_in_front_of_a_model_may_lead_to_that_model() -> None:
    assert read("[routes.m]\nreplaces = true\nto = [{ model = 'm' }]\n").routes["m"].replaces


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.openai.com/v1", Address("api.openai.com", 443, True, "/v1")),
        ("https://api.openai.com/v1/", Address("api.openai.com", 443, True, "/v1")),
        ("https://[2001:db8::1]:8443", Address("2001:db8::1", 8443, True, "")),
        ("http://127.0.0.1:8000/v1", Address("127.0.0.1", 8000, False, "/v1")),
        ("http://localhost/v1", Address("localhost", 80, False, "/v1")),
    ],
)
def test_a_base_url_says_where_to_connect(url: str, expected: Address) -> None:
    assert address(url, allow_http=False, at="x") == expected


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com",
        "ftp://x/v1",
        "https://",
        "https://user:pass@x/v1",
        "https://x/v1?key=1",
        "https://x/v1#a",
        "https://x:99999/v1",
        "https://x/a b",
        "https://x/\r\nhost: y",
        "https://bücher.example/v1",
        "http://models.internal/v1",
        "http://10.0.0.1/v1",
    ],
)
def test_a_base_url_that_a_key_must_not_be_sent_to_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        address(url, allow_http=False, at="x")


def test_plain_http_goes_to_the_own_network_only_and_only_when_asked_for() -> None:
    assert address("http://10.0.0.1/v1", allow_http=True, at="x").tls is False
    with pytest.raises(ConfigError, match="public network"):
        address("http://8.8.8.8/v1", allow_http=True, at="x")
