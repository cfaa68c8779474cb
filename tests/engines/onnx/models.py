"""Small ONNX models whose answers can be told by hand, made with ONNX's own library, and their small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "ada", "love", "##lace", "paris", "a", "b", "c")
TEXTS = ("input_ids", "attention_mask")
OPSET = [helper.make_opsetid("", 17)]


def tokenizer(folder: Path, **extra: Any) -> None:
    """A word-piece tokenizer of ``WORDS`` as the ``tokenizers`` library writes one."""
    special = [{"id": n, "content": w, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for n, w in enumerate(WORDS[:4])]  # fmt: skip
    single = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]  # fmt: skip
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    marks = {w: {"id": w, "ids": [n], "tokens": [w]} for n, w in enumerate(WORDS) if w in ("[CLS]", "[SEP]")}
    document = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None, "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": marks},
        "decoder": None,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {w: n for n, w in enumerate(WORDS)}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document | extra))


def config(folder: Path, kind: str, labels: tuple[str, ...] = (), **extra: Any) -> None:
    """A ``config.json`` of a BERT that reads 64 tokens."""
    document: dict[str, Any] = {"model_type": "bert", "architectures": [kind], "max_position_embeddings": 64}
    if labels:
        document["id2label"] = {str(n): label for n, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(document | extra))


def save(folder: Path, nodes: list[Any], constants: dict[str, Any], inputs: Any, outputs: Any, **how: Any) -> Path:
    """``inputs`` and ``outputs``: name to (type, shape)."""

    def values(ports: dict[str, tuple[int, list[Any]]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in ports.items()]

    weights = [numpy_helper.from_array(numpy.asarray(data), name) for name, data in constants.items()]
    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), weights)
    model = helper.make_model(graph, opset_imports=how.pop("opset", OPSET), ir_version=9)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(folder / "model.onnx"), **how)
    return folder


def texts(rows: Any = "batch", length: Any = "sequence") -> dict[str, tuple[int, list[Any]]]:
    return {name: (TensorProto.INT64, [rows, length]) for name in TEXTS}


def table(**rows: list[float]) -> Any:
    """A row for each word; of those that are not named all zeros."""
    width = len(next(iter(rows.values())))
    made = numpy.zeros((len(WORDS), width), numpy.float32)
    for word, row in rows.items():
        made[WORDS.index(word)] = row
    return made


def summed(folder: Path, weights: Any, rows: Any = "batch", length: Any = "sequence") -> Path:
    """Logits of a text: the sum of its words' rows, without padding."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["found"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["found", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),
    ]
    constants = {"table": weights, "last": numpy.array([-1]), "middle": numpy.array([1])}
    outputs = {"logits": (TensorProto.FLOAT, [rows, weights.shape[1]])}
    return save(folder, nodes, constants, texts(rows, length), outputs)


def each(folder: Path, weights: Any, output: str) -> Path:
    """A row for each token."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["found"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["found", "wide"], [output]),
    ]
    constants = {"table": weights, "last": numpy.array([-1])}
    return save(
        folder, nodes, constants, texts(), {output: (TensorProto.FLOAT, ["batch", "sequence", weights.shape[1]])}
    )


def classifier(folder: Path, rows: Any = "batch", length: Any = "sequence") -> Path:
    """POSITIVE for texts with ``good``, NEGATIVE for those with ``bad``."""
    summed(folder, table(good=[-2, 2], bad=[3, -3]), rows, length)
    tokenizer(folder)
    config(folder, "BertForSequenceClassification", ("NEGATIVE", "POSITIVE"))
    return folder


def tagger(folder: Path) -> Path:
    """Names of people and places."""
    rows = {"ada": [0, 5, 0, 0], "love": [0, 0, 5, 0], "##lace": [0, 0, 5, 0], "paris": [0, 0, 0, 5]}
    weights = table(**rows)
    weights[:, 0] += 1
    each(folder, weights, "logits")
    tokenizer(folder)
    config(folder, "BertForTokenClassification", ("O", "B-PER", "I-PER", "B-LOC"))
    return folder


def embedder(folder: Path, pooling: str = "mean", normalized: bool = True) -> Path:
    """Vectors of three elements."""
    each(folder, table(a=[1, 0, 0], b=[0, 1, 0], c=[0, 0, 1], good=[1, 1, 0]), "last_hidden_state")
    tokenizer(folder)
    config(folder, "BertModel", hidden_size=3)
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalized else [])]
    listed = [{"idx": n, "type": f"sentence_transformers.models.{m}"} for n, m in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({key: m == pooling for m, key in modes.items()}))
    return folder


def ranker(folder: Path) -> Path:
    """Scores pairs by how good they are."""
    summed(folder, table(good=[2], bad=[-2]))
    tokenizer(folder)
    config(folder, "BertForSequenceClassification", ("LABEL_0",))
    return folder


def doubler(folder: Path) -> Path:
    """Tensors: ``y`` is twice ``x`` (rows of four), ``size`` how many elements each row of it has."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["y"]),
        helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=0),
    ]
    constants = {"two": numpy.array(2, numpy.float32), "axis": numpy.array([1])}
    outputs = {"y": (TensorProto.FLOAT, ["n", 4]), "total": (TensorProto.FLOAT, ["n"])}
    return save(folder, nodes, constants, {"x": (TensorProto.FLOAT, ["n", 4])}, outputs)


def mixed(folder: Path) -> Path:
    """Tensors of many types that go through unchanged; nothing of it can be batched (``s`` has no rows)."""
    kinds = {"i": TensorProto.INT32, "h": TensorProto.FLOAT16, "t": TensorProto.STRING, "f": TensorProto.BOOL}
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in (*kinds, "s")]
    ports = {name: (kind, ["n"]) for name, kind in kinds.items()} | {"s": (TensorProto.INT64, [])}
    return save(folder, nodes, {}, ports, {f"{name}_out": port for name, port in ports.items()})
