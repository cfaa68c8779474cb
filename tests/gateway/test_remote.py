"""Providers as upstreams: over verified TLS, with the gateway's own key, and nothing of the client's or of theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from pierhead.gateway import link
from pierhead.gateway.faults import Fault
from pierhead.gateway.operations import OPERATIONS
from pierhead.gateway.remote import Outside

SECRET = "sk-of-the-provider"
New = Callable[..., Awaitable[Any]]
REPLY = {"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}}]}


async def answers(call: Any) -> None:
    await call.json(REPLY)


async def test_a_request_is_passed_on_over_verified_tls_with_the_gateways_key(
    gate: Any, new_provider: New, chat: dict[str, Any]
) -> None:
    provider = await new_provider(answers)
    await gate.serve(provider.route())
    answer = await gate.ask("POST", "/v1/chat/completions", chat)
    assert answer.status == 200, answer.body
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    call = provider.calls[0]
    assert call.head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert call.headers["authorization"] == f"Bearer {SECRET}"
    assert call.headers["host"] == f"localhost:{provider.port}"
    assert json.loads(call.body) == chat | {"model": "theirs"}


async def test_nothing_of_the_client_but_its_request_reaches_a_provider(
    gate: Any, new_provider: New, chat: dict[str, Any]
) -> None:
    provider = await new_provider(answers)
    await gate.serve(provider.route())
    mine = {
        "authorization": "Bearer client-key",
        "x-api-key": "client-key",
        "cookie": "session=1",
        "x-request-id": "mine-1",
        "x-forwarded-for": "10.0.0.1",
        "user-agent": "OpenAI/Python",
        "x-stainless-os": "Linux",
        "x-anything": "else",
        "openai-organization": "theirs",
        "accept": "application/json",
    }
    await gate.ask("POST", "/v1/chat/completions", chat, unix=True, headers=mine)
    got = provider.calls[0].headers
    assert b"client-key" not in provider.calls[0].head
    assert set(got) == {
        *("host", "user-agent", "accept-encoding", "authorization"),
        *("content-type", "accept", "x-request-id", "content-length"),
    }
    assert got["x-request-id"] == "mine-1"
    assert got["user-agent"].startswith("pierhead/")


async def test_nothing_of_a_providers_account_reaches_the_client(
    gate: Any, new_provider: New, chat: dict[str, Any]
) -> None:
    async def tells_much(call: Any) -> None:
        raw = json.dumps(REPLY).encode()
        await call.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nset-cookie: a=b\r\nserver: cloud\r\n"
            b"openai-organization: org-1\r\nx-ratelimit-remaining-requests: 5\r\ncf-ray: 1\r\nx-request-id: theirs\r\n"
            b"content-length: %d\r\n\r\n" % len(raw) + raw
        )

    provider = await new_provider(tells_much)
    await gate.serve(provider.route())
    answer = await gate.ask("POST", "/v1/chat/completions", chat)
    assert set(answer.headers) == {"content-type", "content-length", "x-request-id"}
    assert answer.headers["x-request-id"] != "theirs"


async def test_connections_are_kept_and_used_again(gate: Any, new_provider: New, chat: dict[str, Any]) -> None:
    provider = await new_provider(answers)
    await gate.serve(provider.route())
    for _ in range(5):
        assert (await gate.ask("POST", "/v1/chat/completions", chat)).status == 200
    assert provider.connections == 1


async def test_a_stream_comes_through_event_by_event(gate: Any, new_provider: New, chat: dict[str, Any]) -> None:
    async def streams(call: Any) -> None:
        await call.sse()
        for text in ("a", "b"):
            await call.event({"choices": [{"delta": {"content": text}}]})
        await call.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
        await call.event(b"[DONE]")
        await call.end()

    provider = await new_provider(streams)
    await gate.serve(provider.route())
    answer = await gate.ask("POST", "/v1/chat/completions", chat | {"stream": True})
    assert re.findall(rb'"content": "(\w)"', answer.body) == [b"a", b"b"]
    assert b"prompt_tokens" not in answer.body, "the client did not ask for the usage"
    assert json.loads(provider.calls[0].body)["stream_options"] == {"include_usage": True}
    metrics = (await gate.ask("GET", "/metrics")).body.decode()
    assert 'pierhead_prompt_tokens_total{model="m"} 3' in metrics
    assert all(call.head.startswith(b"POST") for call in provider.calls), "nobody asks a provider for its metrics"


async def test_large_bodies_get_there_whole(gate: Any, new_provider: New, chat: dict[str, Any]) -> None:
    provider = await new_provider(answers)
    await gate.serve(provider.route())
    chat = chat | {"messages": [{"role": "user", "content": "x" * 3_000_000}]}
    assert (await gate.ask("POST", "/v1/chat/completions", chat)).status == 200
    assert json.loads(provider.calls[0].body) == chat | {"model": "theirs"}


@pytest.mark.parametrize("wrong", ["another authority", "another name"])
async def test_a_provider_that_is_not_who_it_says_gets_no_byte_of_the_request(
    gate: Any, new_provider: New, chat: dict[str, Any], folder: Path, wrong: str
) -> None:
    provider = await new_provider(answers, host="other.example" if wrong == "another name" else "localhost")
    route = provider.route()
    if wrong == "another authority":
        trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
        route = provider.route(ca_file=str(folder / "other.pem"))
    await gate.serve(route)
    answer = await gate.ask("POST", "/v1/chat/completions", chat)
    assert answer.status == 502
    error = answer.json()["error"]
    assert (error["code"], error["source"]) == ("provider_unreachable", "provider")
    assert not provider.calls


async def test_a_provider_that_does_not_listen_is_told_as_such(
    gate: Any, new_provider: New, chat: dict[str, Any]
) -> None:
    provider = await new_provider(answers)
    await provider.stop()
    await gate.serve(provider.route())
    answer = await gate.ask("POST", "/v1/chat/completions", chat)
    assert (answer.status, answer.json()["error"]["code"]) == (502, "provider_unreachable")
    assert "refused" in answer.json()["error"]["message"]


async def test_a_certificate_file_that_is_gone_is_named(gate: Any, new_provider: New, chat: dict[str, Any]) -> None:
    provider = await new_provider(answers)
    await gate.serve(provider.route(ca_file="/does/not/exist.pem"))
    answer = await gate.ask("POST", "/v1/chat/completions", chat)
    assert "/does/not/exist.pem" in answer.json()["error"]["message"]


async def test_plain_http_works_where_the_administrator_allowed_it(
    gate: Any, new_provider: New, chat: dict[str, Any]
) -> None:
    provider = await new_provider(answers, tls=False)
    await gate.serve(provider.route())
    assert (await gate.ask("POST", "/v1/chat/completions", chat)).status == 200


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        (400, 400, "some_code"),
        (401, 502, "provider_denied"),
        (403, 502, "provider_denied"),
        (404, 502, "provider_not_found"),
        (429, 429, "some_code"),
        (500, 502, "some_code"),
        (503, 503, "some_code"),
        (529, 503, "provider_overloaded"),
        (504, 504, "provider_timeout"),
    ],
)
async def test_a_providers_errors_are_told_in_our_words_and_never_with_its_key(
    gate: Any, new_provider: New, chat: dict[str, Any], given: int, status: int, code: str
) -> None:
    async def fails(call: Any) -> None:
        text = f"Incorrect API key provided: {call.headers['authorization']} or {SECRET[:10]}****"
        raw = json.dumps({"error": {"message": text, "code": "some_code", "type": "t"}}).encode()
        await call.send(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\nretry-after: 7\r\ncontent-length: %d\r\n\r\n"
            % (given, len(raw))
            + raw
        )

    provider = await new_provider(fails)
    await gate.serve(provider.route())
    answer = await gate.ask("POST", "/v1/chat/completions", chat)
    assert (answer.status, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["source"] == "provider"
    assert SECRET[:8].encode() not in answer.body
    assert (answer.headers.get("retry-after") == "7") is (status in (429, 503))


async def test_a_redirect_is_not_followed(gate: Any, new_provider: New, chat: dict[str, Any]) -> None:
    elsewhere = await new_provider(answers)

    async def redirects(call: Any) -> None:
        to = f"https://localhost:{elsewhere.port}/v1/chat/completions".encode()
        await call.send(b"HTTP/1.1 307 X\r\nlocation: %b\r\ncontent-length: 0\r\n\r\n" % to)

    provider = await new_provider(redirects)
    await gate.serve(provider.route())
    answer = await gate.ask("POST", "/v1/chat/completions", chat)
    assert answer.status == 502
    assert "location" not in answer.headers
    assert not elsewhere.calls


async def test_a_compressed_answer_that_nobody_asked_for_is_refused(
    gate: Any, new_provider: New, chat: dict[str, Any]
) -> None:
    async def compresses(call: Any) -> None:
        await call.send(b"HTTP/1.1 200 X\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc")

    provider = await new_provider(compresses)
    await gate.serve(provider.route())
    assert (await gate.ask("POST", "/v1/chat/completions", chat)).status == 502


async def test_anthropics_dialect_passes_with_its_own_headers(gate: Any, new_provider: New) -> None:
    async def messages(call: Any) -> None:
        await call.json({"type": "message", "usage": {"input_tokens": 4, "output_tokens": 2}})

    provider = await new_provider(messages)
    credential = link.Credential("x-api-key", SECRET)
    await gate.serve(provider.route(serves=("messages",), dialect="anthropic", credential=credential))
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"anthropic-beta": "tools-2024", "x-api-key": "client-key"}
    answer = await gate.ask("POST", "/v1/messages", body, headers=headers, unix=True)
    assert answer.json()["type"] == "message"
    got = provider.calls[0].headers
    assert (got["x-api-key"], got["anthropic-version"], got["anthropic-beta"]) == (SECRET, "2023-06-01", "tools-2024")
    assert "authorization" not in got
    assert json.loads(provider.calls[0].body) == body | {"model": "theirs"}


async def test_the_usage_of_anthropics_streams_is_put_together_from_both_ends(gate: Any, new_provider: New) -> None:
    async def streams(call: Any) -> None:
        await call.sse()
        begun = {"usage": {"input_tokens": 4, "cache_read_input_tokens": 3, "output_tokens": 1}}
        await call.event({"type": "message_start", "message": begun})
        for _ in range(300):
            await call.event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}})
        await call.event({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 300}})
        await call.event({"type": "message_stop"})
        await call.end()

    provider = await new_provider(streams)
    await gate.serve(provider.route(serves=("messages",), dialect="anthropic"))
    body = {"model": "m", "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    assert (await gate.ask("POST", "/v1/messages", body)).status == 200
    metrics = (await gate.ask("GET", "/metrics")).body.decode()
    assert 'pierhead_prompt_tokens_total{model="m"} 7' in metrics
    assert 'pierhead_completion_tokens_total{model="m"} 300' in metrics


async def test_what_a_provider_does_not_serve_is_refused(gate: Any, new_provider: New) -> None:
    provider = await new_provider(answers)
    await gate.serve(provider.route())
    answer = await gate.ask("POST", "/v1/embeddings", {"model": "m", "input": "x"})
    assert answer.status == 404
    assert not provider.calls


def outside(**changes: Any) -> Outside:
    facts: dict[str, Any] = {"provider": "p", "host": "h", "port": 443, "path": "/v1"}
    return Outside(
        link.Remote(**facts | {"credential": link.Credential("authorization", f"Bearer {SECRET}")} | changes)
    )


@pytest.mark.parametrize("path", ["/v1", "/openai", "/v1beta/openai", ""])
def test_a_base_url_means_what_it_means_to_the_official_client(path: str) -> None:
    head = outside(path=path).head(OPERATIONS["chat"], b"POST /x HTTP/1.1\r\ncontent-type: application/json\r\n")
    assert head.startswith(f"POST {path}/chat/completions HTTP/1.1\r\n".encode())


@pytest.mark.parametrize(
    "text",
    [
        f"no {SECRET} here",
        f"{SECRET}{SECRET}",
        f"{SECRET[:9]}",
        f"Bearer {SECRET}.",
        f"{SECRET[:12]}***** and {SECRET}",
    ],
)
def test_no_part_of_a_key_is_left_in_an_error(text: str) -> None:
    fault = outside().fault(400, json.dumps({"error": {"message": text}}).encode())
    assert SECRET[:8] not in fault.message
    assert SECRET not in repr(outside())


def test_a_prompt_that_is_too_long_is_known_in_anthropics_words() -> None:
    body = b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 9 tokens > 8"}}'
    fault = outside().fault(400, body)
    assert isinstance(fault, Fault)
    assert fault.code == "context_length_exceeded"
