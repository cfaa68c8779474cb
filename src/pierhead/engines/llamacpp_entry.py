"""The program that runs inside a replica: llama.cpp's own server on one unix socket; knows nothing of Pierhead.

Standalone on purpose (standard library and xllamacpp only): the same text runs in a sandbox and in a container.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import importlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any, cast


def main() -> int:
    """Load the model, say so, serve until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--settings", required=True)
    parser.add_argument("--beside", action="append", default=[], help="the folder of another model")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    settings: dict[str, Any] = json.loads(args.settings)
    try:
        xllamacpp = load()
        params = parameters(xllamacpp, args.model_dir, settings, args.beside)
        listen(params, args.socket)
        server = xllamacpp.Server(params)
    except Exception as exc:  # the last stop of this program: the reason goes to its log
        print(f"engine: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    notify(args.socket)
    threading.Event().wait()
    del server
    return 0


def load() -> Any:
    """llama.cpp; a build for CUDA needs NVIDIA's libraries, which may lie beside it as wheels."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError:
        found = [path for name in ("libcudart", "libcublasLt", "libcublas") for path in libraries(name)]
        if not found:
            raise
    for path in found:  # the loader does not look for them there, but takes what is loaded already
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    return importlib.import_module("xllamacpp")


def libraries(name: str) -> list[str]:
    """Where a library of NVIDIA's wheels is."""
    places = [os.path.join(glob.escape(folder), "nvidia", "*", "lib", f"{name}.so.*") for folder in sys.path]
    return sorted({path for place in places for path in glob.glob(place)})


def listen(params: Any, place: str) -> None:
    """On a unix socket, or on ``address:port`` where a socket file cannot reach whoever asks."""
    host, _, port = place.rpartition(":")
    if place.startswith("/"):
        params.hostnames = [place]
    else:
        params.hostnames, params.port = [host], int(port)


def end(_signal: int, _frame: object) -> None:
    """Leave at once: the gateway has drained what mattered."""
    os._exit(0)


def parameters(xllamacpp: Any, folder: str, settings: dict[str, Any], beside: Sequence[str] = ()) -> Any:
    """llama.cpp's parameters with every setting applied; names with dots reach into nested groups."""
    params = xllamacpp.CommonParams()
    params.endpoint_metrics = True
    params.ui = False
    params.ctx_shift = False
    params.fit_params = False
    params.cors_origins = "http://localhost"
    for name, value in settings.items():
        if name == "model":
            params.model.path = os.path.join(folder, value)
        elif name == "mmproj":
            params.mmproj.path = os.path.join(folder, value)
        elif name == "chat_template_file":
            with open(os.path.join(folder, value), encoding="utf-8") as file:
                params.chat_template = file.read()
        elif name == "gpus":
            require(xllamacpp, int(value))
        elif name == "alias":
            params.model_alias = {value}
        elif name == "lora":
            params.lora_adapters = [lora(xllamacpp, place(folder, beside, entry), entry) for entry in value]
        elif name == "draft":
            params.speculative.draft.mparams.path = place(folder, beside, value)
            params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        else:
            owner, leaf = reach(params, name)
            setattr(owner, leaf, typed(xllamacpp, getattr(owner, leaf), value))
    return params


def require(xllamacpp: Any, gpus: int) -> None:
    """Refuse to start without the GPUs that were planned for; llama.cpp would silently do with the processor."""
    seen = xllamacpp.get_device_info()
    found = [device for device in seen if device["type"].name.endswith("GPU")]
    if len(found) < gpus:
        names = ", ".join(device["description"] for device in seen)
        raise RuntimeError(f"llama.cpp can use {len(found)} of {gpus} GPUs; it sees: {names}. Does the driver answer?")


def place(folder: str, beside: Sequence[str], entry: dict[str, Any]) -> str:
    """The path of a file of the model, or of another one beside it."""
    return os.path.join(beside[int(entry["beside"])] if "beside" in entry else folder, str(entry["file"]))


def lora(xllamacpp: Any, path: str, entry: dict[str, Any]) -> Any:
    """One adapter and its scale."""
    made = xllamacpp.CommonAdapterLoraInfo()
    made.path = path
    made.scale = float(entry.get("scale", 1.0))
    return made


def reach(owner: Any, name: str) -> tuple[Any, str]:
    """The object that holds a dotted name, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, leaf


def typed(xllamacpp: Any, now: Any, value: Any) -> Any:
    """An enumeration's member by name; everything else as it is."""
    members: Any = getattr(cast("Any", type(now)), "__members__", None)
    return members[value] if isinstance(value, str) and members is not None else value


def notify(path: str) -> None:
    """Tell whoever started this that the model is loaded and the socket listens (as systemd's services do)."""
    if not path.startswith("/"):
        return  # nobody can be told
    place = os.path.join(os.path.dirname(path), "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        try:
            out.connect(place)
            out.send(b"READY=1")
        except OSError:
            pass  # nobody waits: an engine started by hand


if __name__ == "__main__":
    sys.exit(main())
