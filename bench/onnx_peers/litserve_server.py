"""The same model behind LitServe, with its dynamic batching; texts are tokenized and padded by batch.

python litserve_server.py MODEL_FOLDER PORT THREADS MAX_BATCH DELAY_MS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy
import onnxruntime
from tokenizers import Tokenizer

FOLDER, PORT, THREADS, BATCH, DELAY = Path(sys.argv[1]), *(float(word) for word in sys.argv[2:])


class Sentiment(litserve.LitAPI):
    """One text in, a label and its score out."""

    def setup(self, device: Any) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(THREADS)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(FOLDER / "model.onnx"), options)
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self.tokenizer.enable_truncation(512)
        self.tokenizer.enable_padding()
        labels = json.loads((FOLDER / "config.json").read_bytes())["id2label"]
        self.labels = [labels[str(n)] for n in range(len(labels))]

    def decode_request(self, request):  # without a type: LitServe would look for it in the query
        return request["input"]

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def predict(self, texts: list[str]) -> Any:
        found = self.tokenizer.encode_batch(texts)
        feeds = {
            "input_ids": numpy.array([one.ids for one in found], numpy.int64),
            "attention_mask": numpy.array([one.attention_mask for one in found], numpy.int64),
            "token_type_ids": numpy.array([one.type_ids for one in found], numpy.int64),
        }
        (logits,) = self.session.run(None, feeds)
        moved = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
        return moved / moved.sum(axis=-1, keepdims=True)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        best = int(output.argmax())
        return {"label": self.labels[best], "score": float(output[best])}


if __name__ == "__main__":
    api = Sentiment(max_batch_size=int(BATCH), batch_timeout=DELAY / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(PORT), num_api_servers=1, log_level="error", generate_client_file=False)
