"""Texts: classes, labels of words, vectors, ranking; lengths told or refused; in the shapes that clients know."""

from __future__ import annotations

import base64
import json
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy
import openai
import pytest

from . import models
from .conftest import Serve, Served

pytestmark = pytest.mark.timeout(120)


def test_a_text_gets_its_label_and_the_probability_of_each(classifier: Served) -> None:
    answer = classifier.ask("/v1/classify", {"model": "any", "input": "a good film"})
    (one,) = answer["data"]
    assert (one["label"], one["num_classes"]) == ("POSITIVE", 2)
    assert one["probs"] == pytest.approx([1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))], abs=1e-6)
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert (answer["object"], answer["model"]) == ("list", "tiny")


def test_texts_of_all_lengths_keep_their_order_and_padding_changes_nothing(classifier: Served) -> None:
    texts = ["good", "bad " * 40, "a " * 30 + "good", "film bad", "good good"] * 20
    together = classifier.ask("/v1/classify", {"input": texts})["data"]
    assert [one["index"] for one in together] == list(range(100))
    assert [one["label"][0] for one in together] == list("PNPNP" * 20)
    alone = [classifier.ask("/v1/classify", {"input": text})["data"][0]["probs"] for text in texts[:5]]
    assert [one["probs"] for one in together[:5]] == alone


def test_a_pair_is_one_input(classifier: Served) -> None:
    answer = classifier.ask("/v1/classify", {"input": [["a good", "film"], ["bad", "film"]]})
    assert [one["label"] for one in answer["data"]] == ["POSITIVE", "NEGATIVE"]
    assert answer["usage"]["prompt_tokens"] == 11


def test_a_text_that_is_too_long_is_refused_with_the_numbers(classifier: Served) -> None:
    why = classifier.refused("/v1/classify", {"input": ["good", "bad " * 63]})
    assert "text 1 has 65 tokens, the model reads 64" in why
    assert "characters" in classifier.refused("/v1/classify", {"input": " " * 100_000})


def test_a_text_is_cut_only_when_asked_and_the_answer_says_so(classifier: Served) -> None:
    long = "good " * 20 + "bad " * 100
    answer = classifier.ask("/v1/classify", {"input": ["bad", long], "truncate": True})
    assert answer["truncated"] == [1]
    assert answer["usage"]["prompt_tokens"] == 3 + 64
    assert classifier.ask("/v1/classify", {"input": " " * 100_000 + "bad", "truncate": True})["truncated"] == [0]
    assert "truncated" not in classifier.ask("/v1/classify", {"input": "bad", "truncate": True})


def test_words_get_labels_with_their_places_in_the_text(tagger: Served) -> None:
    answer = tagger.ask("/v1/classify", {"input": ["Ada  lovelace a film paris", "a film"]})
    first, second = answer["data"]
    assert [(e["label"], e["text"], e["start"], e["end"]) for e in first["entities"]] == [
        ("PER", "Ada  lovelace", 0, 13),
        ("LOC", "paris", 21, 26),
    ]
    assert all(0.9 < e["score"] < 1 for e in first["entities"])
    assert second["entities"] == []


def test_the_official_client_gets_vectors_of_length_one(embedder: Served) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=embedder.path)) as http:
        client = openai.OpenAI(base_url="http://engine/v1", api_key="none", http_client=http, max_retries=0)
        found = client.embeddings.create(model="any", input=["a b", "c"])  # it asks for base64 by itself
        assert found.data[0].embedding == pytest.approx([0.70710678, 0.70710678, 0])
        assert found.data[1].embedding == [0, 0, 1]
        assert found.usage.prompt_tokens == 7
        plain = client.embeddings.create(model="any", input="a b", encoding_format="float", dimensions=1)
        assert plain.data[0].embedding == [1]


def test_base64_and_plain_numbers_are_the_same_vector(embedder: Served) -> None:
    plain = embedder.ask("/v1/embeddings", {"input": "a b b"})["data"][0]["embedding"]
    packed = embedder.ask("/v1/embeddings", {"input": "a b b", "encoding_format": "base64"})["data"][0]["embedding"]
    assert numpy.frombuffer(base64.b64decode(packed), "<f4") == pytest.approx(plain, abs=1e-7)


def test_tokens_of_the_clients_own_are_taken_as_they_are(embedder: Served) -> None:
    ids = [models.WORDS.index(word) for word in ("[CLS]", "a", "[SEP]")]
    by_tokens = embedder.ask("/v1/embeddings", {"input": ids})["data"]
    assert by_tokens == embedder.ask("/v1/embeddings", {"input": "a"})["data"]
    assert len(embedder.ask("/v1/embeddings", {"input": [ids, ids]})["data"]) == 2
    assert "vocabulary" in embedder.refused("/v1/embeddings", {"input": [2, 4000]})


@pytest.mark.parametrize(
    ("pooling", "normalized", "wanted"),
    [("mean", False, [0.25, 0.25, 0]), ("cls", False, [0, 0, 0]), ("max", True, [0.70710678, 0.70710678, 0])],
)
def test_vectors_are_pooled_and_normalized_as_the_models_own_files_say(
    starts: Serve, shelf: Path, pooling: str, normalized: bool, wanted: list[float]
) -> None:
    served = starts(models.embedder(shelf / f"pool-{pooling}", pooling, normalized)).wait()
    assert served.ask("/v1/embeddings", {"input": "a b"})["data"][0]["embedding"] == pytest.approx(wanted)


def test_how_close_two_texts_are_is_the_cosine_of_their_vectors(embedder: Served) -> None:
    answer = embedder.ask("/v1/score", {"text_1": "a", "text_2": ["a", "b", "a b"]})
    assert [one["score"] for one in answer["data"]] == pytest.approx([1, 0, math.sqrt(0.5)], abs=1e-6)


def test_documents_come_best_first_with_their_places(ranker: Served) -> None:
    documents = ["bad film", "good good film", {"text": "a good film"}]
    body = {"query": "film", "documents": documents, "top_n": 2, "return_documents": True}
    answer = ranker.ask("/v1/rerank", body)
    assert [(one["index"], one["document"]["text"]) for one in answer["results"]] == [
        (1, "good good film"),
        (2, "a good film"),
    ]
    scores = [one["relevance_score"] for one in answer["results"]]
    assert scores == pytest.approx([1 / (1 + math.exp(-4)), 1 / (1 + math.exp(-2))], abs=1e-6)
    assert answer["meta"]["tokens"]["input_tokens"] == answer["usage"]["prompt_tokens"] > 0


def test_pairs_are_scored_one_with_many_or_side_by_side(ranker: Served) -> None:
    answer = ranker.ask("/v1/score", {"text_1": ["good", "a"], "text_2": ["film", "bad"]})
    assert [round(one["score"], 3) for one in answer["data"]] == [0.881, 0.119]
    assert "as many as" in ranker.refused("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]})


def test_a_model_made_for_one_shape_gets_that_shape(starts: Serve, shelf: Path) -> None:
    served = starts(models.classifier(shelf / "fixed", rows=2, length=8)).wait()
    answer = served.ask("/v1/classify", {"input": ["good", "bad", "a good film"]})
    assert [one["label"][0] for one in answer["data"]] == ["P", "N", "P"]
    assert "the model reads 8" in served.refused("/v1/classify", {"input": "a " * 9})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "cannot be used"),
        (b"{", "cannot be used"),
        (b"[" * 100_000, "cannot be used"),
        (b'{"input": "\xff\xfe"}', "cannot be used"),
        (b'{"input": "\\ud800"}', "cannot be used"),
        ({"input": []}, "1 to 2048 texts, this one has 0"),
        ({"input": ["a"] * 2049}, "1 to 2048 texts, this one has 2049"),
        ({"input": [["a", "b", "c"]]}, "a pair is two texts"),
        ({"input": 5}, "cannot be used"),
        ({"input": {"a": 1}}, "cannot be used"),
        ({"text": "a"}, "missing required field `input`"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_a_bad_request_is_told_what_is_wrong(classifier: Served, body: object, why: str) -> None:
    assert why in classifier.refused("/v1/classify", body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"input": [1, "a"]}, "tokens and texts"),
        ({"input": [[]]}, "no tokens"),
        ({"input": [[-1]]}, "vocabulary"),
        ({"input": [2**70]}, "vocabulary"),
        ({"input": "a", "dimensions": 4}, "1 to 3"),
        ({"input": "a", "dimensions": 0}, "1 to 3"),
        ({"input": "a", "encoding_format": "hex"}, "cannot be used"),
        ({"input": [2] * 100}, "has 100 tokens"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_bad_request_for_vectors_is_told_what_is_wrong(embedder: Served, body: object, why: str) -> None:
    assert why in embedder.refused("/v1/embeddings", body)


def test_what_the_model_is_not_for_is_not_found_and_says_what_is(classifier: Served) -> None:
    assert "/v1/classify" in classifier.refused("/v1/embeddings", {"input": "a"}, 404)
    assert classifier.client.get("/nothing").status_code == 404
    assert classifier.client.put("/v1/classify").status_code == 405


def test_a_body_beyond_the_bound_is_refused_and_the_server_goes_on(starts: Serve, shelf: Path) -> None:
    served = starts(models.classifier(shelf / "bounded"), max_body_mb=1).wait()
    assert "larger than" in served.refused("/v1/classify", b" " * (2 << 20), 413)
    assert served.ask("/v1/classify", {"input": "good"})["data"][0]["label"] == "POSITIVE"


def test_what_happens_is_counted(classifier: Served) -> None:
    before = classifier.counted("onnx_prompt_tokens_total")
    classifier.ask("/v1/classify", {"input": ["good film"] * 10})
    assert classifier.counted("onnx_prompt_tokens_total") == before + 40
    assert classifier.counted("onnx_batch_size_count") >= 1
    assert classifier.counted("onnx_queue_size") == 0
    assert classifier.counted('onnx_requests_total{status="200"}') >= 1


@pytest.mark.parametrize("spaces", [0, 60])
def test_a_client_that_leaves_is_not_worked_for_however_large_its_question_was(
    starts: Serve, shelf: Path, spaces: int
) -> None:
    served = starts(models.classifier(shelf / f"left-{spaces}"), max_batch=1, queue=10_000).wait()
    body = json.dumps({"input": ["bad" + " " * spaces] * 2048}).encode()
    head = b"POST /v1/classify HTTP/1.1\r\nhost: engine\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(served.path)
        client.sendall(head + body)
        until(lambda: served.counted("onnx_batch_size_count") > 10)
    until(lambda: served.counted("onnx_queue_size") == 0)
    assert served.counted("onnx_batch_size_count") < 2048


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
