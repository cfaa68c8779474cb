"""Writes a BERT of safetensors as ONNX with ONNX's own library, so that no benchmark or test needs PyTorch for it.

The graph has the operators that PyTorch's exporter writes. A classifier's head is made up where the weights have none:
for speed it does not matter what the labels mean.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SMALL = ("tokenizer.json", "tokenizer_config.json", "config.json", "modules.json", "sentence_bert_config.json")


class Graph:
    """Nodes and constants as they are added; every method returns the name of its output."""

    def __init__(self, weights: dict[str, Any], config: dict[str, Any]) -> None:
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.width: int = config["hidden_size"]
        self.epsilon: float = config.get("layer_norm_eps", 1e-12)

    def add(self, kind: str, *inputs: str, **how: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **how))
        return name

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = numpy.asarray(value)
        return name

    def weight(self, name: str, turned: bool = False) -> str:
        value = self.weights[name]
        return self.constant(numpy.ascontiguousarray(value.T) if turned else value, name)

    def linear(self, given: str, name: str) -> str:
        made = self.add("MatMul", given, self.weight(f"{name}.weight", True))
        return self.add("Add", made, self.weight(f"{name}.bias"))

    def normal(self, given: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", given, scale, bias, axis=-1, epsilon=self.epsilon)

    def embedded(self) -> str:
        words = self.add("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        types = self.add("Gather", self.weight("embeddings.token_type_embeddings.weight"), "token_type_ids")
        length = self.add("Gather", self.add("Shape", "input_ids"), self.constant(numpy.int64(1)), axis=0)
        zero, one = self.constant(numpy.int64(0)), self.constant(numpy.int64(1))
        places = self.add("Range", zero, length, one)
        where = self.add("Gather", self.weight("embeddings.position_embeddings.weight"), places)
        return self.normal(self.add("Add", self.add("Add", words, types), where), "embeddings.LayerNorm")

    def mask(self) -> str:
        """0 for tokens that count, a very small number for padding; [batch, 1, 1, sequence]."""
        wide = self.add("Unsqueeze", "attention_mask", self.constant(numpy.array([1, 2])))
        floats = self.add("Cast", wide, to=TensorProto.FLOAT)
        away = self.add("Sub", self.constant(numpy.float32(1)), floats)
        return self.add("Mul", away, self.constant(numpy.float32(-10000)))

    def heads_of(self, given: str, name: str, order: tuple[int, ...]) -> str:
        shape = self.constant(numpy.array([0, 0, self.heads, self.width // self.heads]))
        return self.add("Transpose", self.add("Reshape", self.linear(given, name), shape), perm=order)

    def layer(self, number: int, given: str, mask: str) -> str:
        base = f"encoder.layer.{number}"
        query = self.heads_of(given, f"{base}.attention.self.query", (0, 2, 1, 3))
        key = self.heads_of(given, f"{base}.attention.self.key", (0, 2, 3, 1))
        value = self.heads_of(given, f"{base}.attention.self.value", (0, 2, 1, 3))
        scale = self.constant(numpy.float32(math.sqrt(self.width // self.heads)))
        scores = self.add("Add", self.add("Div", self.add("MatMul", query, key), scale), mask)
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), value)
        flat = self.constant(numpy.array([0, 0, self.width]))
        seen = self.add("Reshape", self.add("Transpose", mixed, perm=(0, 2, 1, 3)), flat)
        seen = self.linear(seen, f"{base}.attention.output.dense")
        seen = self.normal(self.add("Add", seen, given), f"{base}.attention.output.LayerNorm")
        wide = self.gelu(self.linear(seen, f"{base}.intermediate.dense"))
        return self.normal(self.add("Add", self.linear(wide, f"{base}.output.dense"), seen), f"{base}.output.LayerNorm")

    def gelu(self, given: str) -> str:
        bent = self.add("Erf", self.add("Div", given, self.constant(numpy.float32(math.sqrt(2)))))
        more = self.add("Mul", given, self.add("Add", bent, self.constant(numpy.float32(1))))
        return self.add("Mul", more, self.constant(numpy.float32(0.5)))

    def hidden(self) -> str:
        found, mask = self.embedded(), self.mask()
        for number in range(self.layers):
            found = self.layer(number, found, mask)
        return found

    def logits(self, hidden: str, classes: int) -> str:
        first = self.add("Gather", hidden, self.constant(numpy.int64(0)), axis=1)
        pooled = self.add("Tanh", self.linear(first, "pooler.dense"))
        dice = numpy.random.default_rng(1)
        self.weights["classifier.weight"] = dice.normal(0, 0.02, (classes, self.width)).astype(numpy.float32)
        self.weights["classifier.bias"] = numpy.zeros(classes, numpy.float32)
        return self.linear(pooled, "classifier")


def write(source: Path, folder: Path, labels: tuple[str, ...] = ()) -> Path:
    """The model of a package's folder as an ONNX model's: a classifier with these labels, or vectors of tokens."""
    config: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    with safe_open(source / "model.safetensors", framework="numpy") as file:
        weights = {name: file.get_tensor(name) for name in list(file.keys())}
    graph = Graph(weights, config)
    hidden = graph.hidden()
    output, shape = (
        ("logits", ["batch", len(labels)]) if labels else ("last_hidden_state", ["batch", "sequence", graph.width])
    )
    graph.nodes.append(
        helper.make_node("Identity", [graph.logits(hidden, len(labels)) if labels else hidden], [output])
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
    constants = [numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    made = helper.make_graph(graph.nodes, "bert", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pierhead")
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(folder / "model.onnx"))
    for name in SMALL:
        if (source / name).is_file() and not (labels and name == "modules.json"):
            shutil.copy(source / name, folder / name)
    if labels:
        named = {
            "architectures": ["BertForSequenceClassification"],
            "id2label": {str(n): w for n, w in enumerate(labels)},
        }
        (folder / "config.json").write_text(json.dumps(config | named))
    elif (source / "1_Pooling").is_dir():
        shutil.copytree(source / "1_Pooling", folder / "1_Pooling", dirs_exist_ok=True)
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]))
