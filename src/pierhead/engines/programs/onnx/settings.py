"""What the server is told at its start: one JSON document on the command line."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Task = Literal["classify", "tokens", "embeddings", "rerank", "tensors"]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes are bytes, ``delay`` is seconds, ``context`` tokens (0: the model's own); see ``engines.onnx_settings``."""

    name: str = "model"
    file: str = "model.onnx"
    task: Task = "tensors"
    provider: Literal["cpu", "cuda", "tensorrt", "openvino"] = "cpu"
    provider_options: dict[str, Any] = {}
    threads: int = 0
    inter_threads: int = 1
    workers: int = 1
    optimization: Literal["all", "extended", "basic", "none"] = "all"
    spin: bool = False
    arena: bool = True
    max_batch: int = 32
    max_batch_tokens: int = 4096
    delay: float = 0.0
    queue: int = 1024
    context: int = 0
    truncate: bool = False
    pooling: Literal["auto", "mean", "cls", "max", "last"] = "auto"
    normalize: Literal["auto", "true", "false"] = "auto"
    activation: Literal["auto", "softmax", "sigmoid", "none"] = "auto"
    max_body: int = 32 << 20
    max_tensors: int = 8 << 20
