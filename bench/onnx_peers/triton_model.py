"""The same model in the Python backend of NVIDIA's tritonserver, as its documentation does it: texts in, labels out.

Triton's own dynamic batcher puts requests together; texts are tokenized and padded by batch. ``settings.json`` beside
this file says where the model is and how many threads it may use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import triton_python_backend_utils as backend
from tokenizers import Tokenizer


class TritonPythonModel:
    """What the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = json.loads((Path(args["model_repository"]) / args["model_version"] / "settings.json").read_bytes())
        folder = Path(settings["folder"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(512)
        self.tokenizer.enable_padding()
        labels = json.loads((folder / "config.json").read_bytes())["id2label"]
        self.labels = numpy.array([labels[str(n)] for n in range(len(labels))], object)

    def execute(self, requests: list[Any]) -> list[Any]:
        texts: list[str] = []
        counts: list[int] = []
        for request in requests:
            given = backend.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)
            texts += [text.decode() for text in given]
            counts.append(len(given))
        found = self.tokenizer.encode_batch(texts)
        feeds = {
            "input_ids": numpy.array([one.ids for one in found], numpy.int64),
            "attention_mask": numpy.array([one.attention_mask for one in found], numpy.int64),
            "token_type_ids": numpy.array([one.type_ids for one in found], numpy.int64),
        }
        (logits,) = self.session.run(None, feeds)
        moved = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = moved / moved.sum(axis=-1, keepdims=True)
        answers: list[Any] = []
        at = 0
        for count in counts:
            part = scores[at : at + count]
            at += count
            outputs = [
                backend.Tensor("label", self.labels[part.argmax(axis=1)].reshape(-1, 1)),
                backend.Tensor("score", part.max(axis=1, keepdims=True).astype(numpy.float32)),
            ]
            answers.append(backend.InferenceResponse(outputs))
        return answers
