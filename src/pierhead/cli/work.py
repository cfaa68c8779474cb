"""``pier run`` for models that do not chat: classes, labels of words, vectors, ranking, plain tensors."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import click

from pierhead.cli.chatapi import refusal
from pierhead.cli.output import print_json, table
from pierhead.errors import DaemonUnavailable, UsageError
from pierhead.paths import Paths
from pierhead.sockets import connect_unix
from pierhead.store.model import ModelRecord

_MOST = 256 << 20
_TALKS = frozenset(("chat", "completions"))


def abilities(paths: Paths, record: ModelRecord) -> tuple[str, ...]:
    """What the gateway says that the model can do, where that may be something else than to chat."""
    if any(f.format == "gguf" and f.role == "weights" for f in record.files):
        return ()
    card = ask(paths, f"/v1/models/{quote(record.name, safe='')}")
    return tuple(card.get("capabilities") or ())


def chats(able: Sequence[str]) -> bool:
    """Whether a conversation makes sense; true where nothing is known."""
    return not able or bool(_TALKS & set(able))


def work(
    paths: Paths, record: ModelRecord, able: Sequence[str], prompt: str, piped: str, files: str, as_json: bool
) -> None:
    """One answer of a model that does not chat, printed; UsageError tells what it wants instead of a prompt."""
    kinds: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
        "classify": lambda: ("/v1/classify", {"input": _text(record, prompt, files, piped)}),
        "embeddings": lambda: ("/v1/embeddings", {"input": _text(record, prompt, files, piped)}),
        "rerank": lambda: ("/v1/rerank", _documents(record, prompt, piped or files)),
        "predict": lambda: ("/v1/predict", {"inputs": _tensors(record, prompt or piped or files)}),
    }
    kind = next((name for name in kinds if name in able), "")
    if not kind:
        raise UsageError(
            f"'{record.name}' does not chat; it can do: {', '.join(able)}",
            hint="Ask it through the gateway; `pier status` shows the address.",
        )
    path, body = kinds[kind]()
    answer = ask(paths, path, {"model": record.name, **body})
    if as_json:
        print_json(_told(kind, record.name, answer))
    else:
        _show(kind, answer, body)


def ask(paths: Paths, path: str, body: dict[str, Any] | None = None) -> Any:
    """The gateway's whole answer to JSON, or to a question; its refusal as the error that it means."""
    if body is None:
        return send(paths, "GET", path)
    return send(paths, "POST", path, json.dumps(body).encode())


def send(paths: Paths, method: str, path: str, data: bytes | None = None, kind: str = "application/json") -> Any:
    """The gateway's whole answer to a body of some kind; its refusal as the error that it means."""
    connection = http.client.HTTPConnection("localhost")
    try:
        connection.sock = connect_unix(paths.gateway_socket)
        connection.request(method, path, data, {"Content-Type": kind})
        response = connection.getresponse()
        if response.status != 200:
            raise refusal(response)
        return json.loads(response.read(_MOST))
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise DaemonUnavailable("the gateway does not answer", hint=f"See {paths.daemon_log}.") from exc
    finally:
        connection.close()


# --- what goes in -----------------------------------------------------------------------------------------------------


def _text(record: ModelRecord, *parts: str) -> str:
    if text := "\n\n".join(part for part in parts if part):
        return text
    raise UsageError(f"'{record.name}' does not chat: it works on a text", hint=f'Type `pier run {record.name} "…"`.')


def _documents(record: ModelRecord, query: str, lines: str) -> dict[str, Any]:
    documents = [line for line in lines.splitlines() if line.strip()]
    if query and documents:
        return {"query": query, "documents": documents, "return_documents": True}
    raise UsageError(
        f"'{record.name}' puts texts into order: it needs a query and one text per line",
        hint=f'Type `pier run {record.name} "query" < lines.txt`.',
    )


def _tensors(record: ModelRecord, text: str) -> Any:
    hint = f"Type `pier run {record.name} '{{\"INPUT\": [[1, 2]]}}'`; `pier inspect {record.name}` names the inputs."
    if not text:
        raise UsageError(f"'{record.name}' works on tensors: give them as JSON", hint=hint)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"'{record.name}' works on tensors, and the text is no JSON: {exc}", hint=hint) from exc


# --- what comes out ---------------------------------------------------------------------------------------------------


def _told(kind: str, model: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer for programs, flat."""
    if kind == "predict":
        return {"model": model, "outputs": answer["outputs"]}
    usage = {"usage": answer.get("usage", {})}
    if kind == "rerank":
        return {"model": model, "results": answer["results"], **usage}
    one = answer["data"][0]
    if kind == "embeddings":
        return {"model": model, "embedding": one["embedding"], **usage}
    if "entities" in one:
        return {"model": model, "entities": one["entities"], **usage}
    return {"model": model, "label": one["label"], "score": max(one["probs"]), "probs": one["probs"], **usage}


def _show(kind: str, answer: dict[str, Any], body: dict[str, Any]) -> None:
    if kind == "predict":
        click.echo(json.dumps(answer["outputs"]))
    elif kind == "rerank":
        found = [(f"{one['relevance_score']:.4f}", body["documents"][one["index"]]) for one in answer["results"]]
        table(("SCORE", "TEXT"), found, fold=(1,))
    elif kind == "embeddings":
        click.echo(json.dumps(answer["data"][0]["embedding"]))
    elif "entities" in answer["data"][0]:
        entities: list[dict[str, Any]] = answer["data"][0]["entities"]
        table(("LABEL", "SCORE", "TEXT"), [(e["label"], f"{e['score']:.4f}", e["text"]) for e in entities], fold=(2,))
    else:
        one = answer["data"][0]
        click.echo(f"{one['label']}  {max(one['probs']):.4f}")
