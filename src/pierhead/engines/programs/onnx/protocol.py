"""The Open Inference Protocol V2 of this server: its questions, and tensors or texts to work on."""

from __future__ import annotations

import importlib
from typing import Any

import msgspec

from . import tensors
from .answers import Answers, Gone, encode
from .aside import aside
from .asks import MOST
from .batching import Batcher
from .faults import bad
from .graph import Graph
from .rows import Allowance, Bounds, joined
from .settings import Settings
from .words import Text

np: Any = importlib.import_module("numpy")


class Protocol:
    """``infer`` takes the graph's own tensors; of a model that reads texts also ``text_input``, or ``query`` and
    ``documents``.
    """

    def __init__(self, graph: Graph, raw: Batcher, answers: Answers | None, settings: Settings, rows: int = 0) -> None:
        self._graph = graph
        self._raw = raw
        self._answers = answers
        self._settings = settings
        longest = answers.context if answers is not None else settings.context
        self._bounds = Bounds(rows or settings.max_batch, settings.max_batch_tokens, settings.max_tensors, longest)

    def question(self, path: str) -> bytes:
        """The answer to a GET; b"" where there is nothing."""
        if path == "/v2":
            extensions = ["binary_tensor_data"]
            return encode({"name": "pierhead-onnx", "version": "1", "extensions": extensions})
        if path in ("/v2/health/live", "/v2/health/ready"):
            return b'{"live":true,"ready":true}'
        model = path.removeprefix("/v2/models/")
        if model == path or not model:
            return b""
        if model.endswith("/ready"):
            return encode({"name": self._settings.name, "ready": True})
        if "/" in model and "/versions/" not in path:
            return b""
        inputs, outputs = self._ports()
        return encode(
            {
                "name": self._settings.name,
                "versions": ["1"],
                "platform": "onnxruntime_onnx",
                "inputs": inputs,
                "outputs": outputs,
            }
        )

    def _ports(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        texts = {"datatype": "BYTES", "shape": [-1]}
        task = self._settings.task
        if self._answers is None:
            return [tensors.told(p) for p in self._graph.inputs.values()], [
                tensors.told(p) for p in self._graph.outputs.values()
            ]
        if task == "rerank":
            inputs = [{"name": "query", "datatype": "BYTES", "shape": [1]}, {"name": "documents", **texts}]
            return inputs, [{"name": "score", "datatype": "FP32", "shape": [-1]}]
        inputs = [{"name": "text_input", **texts}]
        if task == "embeddings":
            return inputs, [{"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}]
        if task == "tokens":
            return inputs, [{"name": "entities", **texts}]
        return inputs, [
            {"name": "label", **texts},
            {"name": "score", "datatype": "FP32", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, -1]},
        ]

    async def infer(self, body: bytes, header: str | None, gone: Gone) -> tuple[bytes, int]:
        """The answer and the length of its JSON part where binary tensors follow (else 0)."""
        request, arrays = await aside(len(body), lambda: tensors.read_infer(body, header))
        if self._answers is not None and arrays.keys() & {"text_input", "query", "documents"}:
            outputs = await self._texts(self._answers, request, arrays, gone)
        else:
            outputs = await self._run(arrays, gone)
        size = sum(array.nbytes for array in outputs.values())
        return await aside(size, lambda: tensors.write_infer(self._settings.name, request, outputs))

    async def _texts(
        self, answers: Answers, request: tensors.Infer, arrays: dict[str, Any], gone: Gone
    ) -> dict[str, Any]:
        names = {"query", "documents"} if self._settings.task == "rerank" else {"text_input"}
        if arrays.keys() != names:
            raise bad(f"the inputs are {', '.join(sorted(names))}, not {', '.join(sorted(arrays))[:200]}")
        flat: dict[str, list[str]] = {}
        for name, array in arrays.items():
            if array.dtype.kind != "O" or not 0 < array.size <= MOST:
                raise bad(f"the input '{name}' must be 1 to {MOST} texts (BYTES)")
            flat[name] = [str(one) for one in array.flat]
        truncate = request.parameters.get("truncate")
        texts: list[Text] = list(flat["text_input"]) if "text_input" in flat else []
        if self._settings.task == "rerank":
            if len(flat["query"]) != 1:
                raise bad("the input 'query' must be one text")
            texts = [(flat["query"][0], document) for document in flat["documents"]]
        found, _ = await answers.work(texts, truncate if isinstance(truncate, bool) else None, gone)
        return self._outputs(answers, texts, found)

    def _outputs(self, answers: Answers, texts: list[Text], found: list[Any]) -> dict[str, Any]:
        task = self._settings.task
        if task == "rerank":
            return {"score": np.array(found, np.float32)}
        if task == "embeddings":
            return {"embedding": np.stack(found)}
        if task == "tokens":
            told = [answers.entities(n, texts[n], spans)["entities"] for n, spans in enumerate(found)]
            return {"entities": np.array([msgspec.json.encode(one).decode() for one in told], object)}
        scores = np.array(found, np.float32)
        labels = [answers.label(int(n)) for n in scores.argmax(axis=1)]
        return {"label": np.array(labels, object), "score": scores.max(axis=1), "probabilities": scores}

    async def _run(self, arrays: dict[str, Any], gone: Gone) -> dict[str, Any]:
        """The outputs for the graph's own tensors, in as many runs as they need."""
        items = tensors.items(self._graph, arrays, self._bounds)
        results = await self._raw.submit(items, gone, Allowance(self._settings.max_body))
        return joined(items, results)

    async def predict(self, body: bytes, gone: Gone) -> bytes:
        """The graph's own tensors as plain JSON."""
        arrays = await aside(len(body), lambda: tensors.read_predict(body, self._graph))
        outputs = await self._run(arrays, gone)
        size = sum(array.nbytes for array in outputs.values())
        return await aside(size, lambda: tensors.write_predict(self._settings.name, outputs))
