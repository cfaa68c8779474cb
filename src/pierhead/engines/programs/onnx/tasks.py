"""What is done with texts: the tensors of a batch, and what its outputs mean for each text."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from .batching import Item
from .faults import Unusable
from .folder import Folder
from .graph import Graph
from .settings import Settings
from .words import Coded

np: Any = importlib.import_module("numpy")
_MADE = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Span(NamedTuple):
    """A stretch of a text that has a label; ``start`` and ``end`` are characters."""

    label: str
    score: float
    start: int
    end: int


class Texts:
    """Runs batches of texts. ``width`` is the number of classes, or of a vector's elements; 0: not known yet."""

    def __init__(self, graph: Graph, folder: Folder, settings: Settings, padding: int) -> None:
        self._graph = graph
        self._padding = padding
        self._feeds = _feeds(graph)
        self.rows, self._length = fixed(graph)
        self.output = _output(graph, settings.task)
        self._pooled = len(graph.outputs[self.output].shape) == 2
        width = graph.outputs[self.output].shape[-1]
        self.labels = _labels(folder.labels(), width)
        self._activation = _activation(settings, folder, width)
        self._pooling = settings.pooling if settings.pooling != "auto" else folder.pooling()
        self._normalize = _normalized(settings, folder, self._pooled)
        self.run = {
            "classify": self._classify,
            "rerank": self._rerank,
            "tokens": self._tokens,
            "embeddings": self._embed,
        }[settings.task]

    def _outputs(self, batch: list[Item]) -> tuple[Any, Any]:
        """The one output that counts as float32, and the mask."""
        longest = self._length or max(item.length for item in batch)
        rows = max(len(batch), self.rows)
        ids = np.full((rows, longest), self._padding, np.int64)
        mask = np.zeros((rows, longest), np.int64)
        for row, item in enumerate(batch):
            ids[row, : item.length] = item.work.ids
            mask[row, : item.length] = 1
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self._feeds:
            types = np.zeros((rows, longest), np.int64)
            for row, item in enumerate(batch):
                types[row, : item.length] = item.work.types
            feeds["token_type_ids"] = types
        if "position_ids" in self._feeds:
            feeds["position_ids"] = np.broadcast_to(np.arange(longest, dtype=np.int64), (rows, longest))
        made = {name: feeds[name].astype(kind, copy=False) for name, kind in self._feeds.items()}
        found = self._graph.run(made, [self.output])[0][: len(batch)]
        return found.astype(np.float32, copy=False), mask[: len(batch)]

    def _scores(self, logits: Any) -> Any:
        if self._activation == "softmax":
            moved = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return moved / moved.sum(axis=-1, keepdims=True)
        if self._activation == "sigmoid":
            return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
        return logits

    def _classify(self, batch: list[Item]) -> list[Any]:
        """Each text's row of scores."""
        return _rounded(self._scores(self._outputs(batch)[0]))

    def _rerank(self, batch: list[Item]) -> list[Any]:
        """Each pair's score: of several classes the last (``relevant``) counts."""
        return [row[-1] for row in _rounded(self._scores(self._outputs(batch)[0]))]

    def _embed(self, batch: list[Item]) -> list[Any]:
        """Each text's vector, as float32."""
        vectors, mask = self._outputs(batch)
        if not self._pooled:
            vectors = pooled(vectors, mask, self._pooling)
        if self._normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return list(vectors)

    def _tokens(self, batch: list[Item]) -> list[Any]:
        """Each text's stretches that have a label."""
        scores = self._scores(self._outputs(batch)[0])
        best, most = scores.argmax(axis=-1).tolist(), scores.max(axis=-1).tolist()
        return [spans(item.work, [self.labels[n] for n in best[row]], most[row]) for row, item in enumerate(batch)]


def pooled(vectors: Any, mask: Any, how: str) -> Any:
    """One vector for each text from those of its tokens; padding does not count."""
    if how == "cls":
        return vectors[:, 0]
    if how == "last":
        return vectors[np.arange(len(vectors)), mask.sum(axis=1) - 1]
    wide = mask[:, :, None].astype(np.float32)
    if how == "max":
        return np.where(wide > 0, vectors, -np.inf).max(axis=1)
    return (vectors * wide).sum(axis=1) / np.maximum(wide.sum(axis=1), 1e-9)


def spans(coded: Coded, labels: list[str], scores: list[float]) -> list[Span]:
    """Neighbouring tokens of one label as one stretch; ``B-`` begins a new one, ``O`` and special tokens are none."""
    found: list[tuple[Span, int]] = []
    last = ""
    for place, (start, end) in enumerate(coded.offsets):
        label = labels[place]
        if coded.special[place] or label == "O" or start == end:
            last = ""
            continue
        begins, name = label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
        goes_on = bool(found) and last == name and not (begins and start > found[-1][0].end)
        if goes_on and (not begins or start == found[-1][0].end):
            span, count = found[-1]
            mean = (span.score * count + scores[place]) / (count + 1)
            found[-1] = (Span(name, mean, span.start, end), count + 1)
        else:
            found.append((Span(name, scores[place], start, end), 1))
        last = name
    return [span._replace(score=round(span.score, 6)) for span, _ in found]


def _rounded(scores: Any) -> list[list[float]]:
    """As plain numbers without the digits that float32 does not have."""
    return np.round(scores.astype(np.float64), 7).tolist()


def _feeds(graph: Graph) -> dict[str, str]:
    """The inputs that a tokenizer makes, with their types; Unusable where the model wants others."""
    other = [name for name in graph.inputs if name not in _MADE]
    if "input_ids" not in graph.inputs or other:
        wants = ", ".join(graph.inputs)
        raise Unusable(f"the model takes {wants}, which a tokenizer alone does not make; set task=tensors")
    return {name: port.kind for name, port in graph.inputs.items()}


def fixed(graph: Graph) -> tuple[int, int]:
    """Rows and tokens of every batch where the graph was made for one shape only; 0: any."""
    shape = graph.inputs["input_ids"].shape if "input_ids" in graph.inputs else (-1, -1)
    if len(shape) != 2:
        raise Unusable(f"its input_ids have {len(shape)} dimensions, not two")
    return max(0, shape[0]), max(0, shape[1])


def _output(graph: Graph, task: str) -> str:
    """The output that is the answer."""
    names = {
        "classify": ("logits", "probabilities", "output_0"),
        "rerank": ("logits", "scores", "output_0"),
        "tokens": ("logits", "output_0"),
        "embeddings": ("sentence_embedding", "sentence_embeddings", "last_hidden_state", "token_embeddings"),
    }[task]
    chosen = next((name for name in names if name in graph.outputs), next(iter(graph.outputs)))
    dimensions = {"classify": (2,), "rerank": (2,), "tokens": (3,), "embeddings": (2, 3)}[task]
    found = len(graph.outputs[chosen].shape)
    if found not in dimensions:
        raise Unusable(f"its output {chosen} has {found} dimensions, so it cannot serve the task {task}")
    return chosen


def _labels(given: dict[int, str], width: int) -> list[str]:
    count = max(width, max(given, default=-1) + 1, 0)
    if width > 0 and given and max(given) >= width:
        raise Unusable(f"config.json names {len(given)} labels, the model has {width} classes")
    return [given.get(n, f"LABEL_{n}") for n in range(min(count, 1 << 20))]


def _activation(settings: Settings, folder: Folder, width: int) -> str:
    if settings.activation != "auto":
        return settings.activation
    several = folder.config.get("problem_type") == "multi_label_classification"
    classes = width if width > 0 else len(folder.labels())
    return "sigmoid" if several or (classes == 1 and settings.task != "tokens") else "softmax"


def _normalized(settings: Settings, folder: Folder, pooled_inside: bool) -> bool:
    """As the modules say; without modules yes, as clients of embeddings expect it."""
    modules = folder.modules()
    known = {"Transformer", "Pooling", "Normalize", "StaticEmbedding"}
    if other := [m for m in modules if m not in known and not pooled_inside and settings.task == "embeddings"]:
        raise Unusable(f"modules.json has the step {other[0]}, which is not in the ONNX file and not known here")
    if settings.normalize != "auto":
        return settings.normalize == "true"
    return "Normalize" in modules if modules else True
