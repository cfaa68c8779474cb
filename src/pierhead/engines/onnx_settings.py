"""The ONNX engine's settings by name: data."""

from __future__ import annotations

from pierhead.engines.setting_table import Setting, Table

PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "openvino")
TASKS = ("auto", "classify", "tokens", "embeddings", "rerank", "tensors")
_SETTINGS = {
    "task": Setting(str, "auto", choices=TASKS),
    "file": Setting(str, ""),
    "provider": Setting(str, "auto", choices=PROVIDERS),
    "device": Setting(str, ""),
    "gpus": Setting(tuple, ("all",), pattern=r"all|[0-9]{1,4}"),
    "gpu_mem_limit": Setting(int, 0, 1 << 20, 1 << 50, bytes=True),
    "threads": Setting(int, 0, 0, 1024),
    "inter_threads": Setting(int, 1, 1, 256),
    "workers": Setting(int, 1, 1, 64),
    "spin": Setting(bool, False),
    "optimization": Setting(str, "all", choices=("all", "extended", "basic", "none")),
    "max_batch": Setting(int, 32, 1, 4096),
    "max_batch_tokens": Setting(int, 4096, 1, 1 << 22),
    "max_delay_ms": Setting(float, 0.0, 0, 10_000),
    "queue": Setting(int, 1024, 1, 1 << 20),
    "context": Setting(int, 0, 0, 1 << 20),
    "truncate": Setting(bool, False),
    "pooling": Setting(str, "auto", choices=("auto", "mean", "cls", "max", "last")),
    "normalize": Setting(str, "auto", choices=("auto", "true", "false")),
    "activation": Setting(str, "auto", choices=("auto", "softmax", "sigmoid", "none")),
    "max_body_mb": Setting(int, 32, 1, 1024),
    "max_tensor_mb": Setting(int, 8, 1, 1024),
}
_ALIASES = {
    "max_length": "context",
    "max_model_len": "context",
    "execution_provider": "provider",
    "ep": "provider",
    "intra_threads": "threads",
    "intra_op_num_threads": "threads",
    "inter_op_num_threads": "inter_threads",
    "instances": "workers",
    "max_batch_size": "max_batch",
    "batch": "max_batch",
    "batch_size": "max_batch",
    "delay": "max_delay_ms",
    "max_delay": "max_delay_ms",
    "batch_delay_ms": "max_delay_ms",
    "max_queue": "queue",
    "queue_size": "queue",
    "graph_optimization": "optimization",
    "normalise": "normalize",
    "device_id": "gpus",
    "model": "file",
}
TABLE = Table("the ONNX engine", _SETTINGS, _ALIASES)
