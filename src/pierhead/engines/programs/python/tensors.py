"""Tensors over the Open Inference Protocol (KServe V2), in JSON and with the binary extension."""

from __future__ import annotations

import json
import struct
from typing import Any, cast

from fastapi import FastAPI, Request, Response

from .answers import encode
from .calls import Calls
from .faults import Fault
from .model import Method, Model

LENGTH = "inference-header-content-length"
_TYPES = {
    **{"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_NAMES = {name: word for word, name in _TYPES.items()}


def add(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """The route of tensors, for ``infer`` (a dict of arrays) or for a ``predict`` that takes arrays by name."""

    async def handle(request: Request) -> Response:
        asked, inputs = read(await request.body(), request.headers.get(LENGTH))
        found = await calls.ask(method.call, inputs) if method.name == "infer" else await _named(calls, method, inputs)
        return answer(model.settings.name, asked, outputs_of(found))

    handle.__annotations__ = {"request": Request, "return": Response}
    app.add_api_route("/v2/models/{name:path}/infer", handle, methods=["POST"], summary="Infer")


async def _named(calls: Calls, method: Method, inputs: dict[str, Any]) -> Any:
    wrong = set(inputs) - set(method.arguments)
    missing = [n for n, p in method.arguments.items() if p.default is p.empty and n not in inputs]
    if wrong or missing:
        said = f"there is no input {sorted(wrong)[0]}" if wrong else f"the input {missing[0]} is missing"
        raise Fault(422, "invalid_input", f"{said}; the model takes {', '.join(method.arguments)}")
    return await calls.ask(method.call, **inputs)


def read(body: bytes, length: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request and its arrays by name; Fault for one that is not well formed."""
    try:
        head = int(length) if length else len(body)
        asked = json.loads(body[:head])
        rest = memoryview(body)[head:]
        arrays: dict[str, Any] = {}
        for one in asked["inputs"]:
            parameters: dict[str, Any] = one.get("parameters") or {}
            size: Any = parameters.get("binary_data_size")
            raw = None
            if size is not None:
                raw, rest = rest[: int(size)], rest[int(size) :]
                if len(raw) != int(size):
                    raise ValueError("the body is shorter than its tensors")
            arrays[str(one["name"])] = _array(one, raw)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as exc:
        said = f"{exc} is missing" if isinstance(exc, KeyError) else str(exc)
        raise Fault(422, "invalid_input", f"the tensors cannot be read: {said}") from exc
    return asked, arrays


def _array(one: dict[str, Any], raw: memoryview | None) -> Any:
    import numpy

    kind, shape = one["datatype"], [int(size) for size in one["shape"]]
    if kind == "BYTES":
        flat = _texts(raw) if raw is not None else [str(v).encode() for v in _flat(one["data"])]
        made = numpy.array([*flat, None], dtype=object)[:-1]
    elif kind not in _TYPES:
        raise ValueError(f"there is no datatype {kind}")
    elif raw is not None:
        made = numpy.frombuffer(raw, dtype=_TYPES[kind]).copy()
    else:
        made = numpy.array(_flat(one["data"]), dtype=_TYPES[kind])
    return made.reshape(shape)


def _flat(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError("data is no list")
    parts = cast("list[Any]", data)
    return [value for part in parts for value in (_flat(part) if isinstance(part, list) else [part])]


def _texts(raw: memoryview) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        found.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    return found


def outputs_of(found: Any) -> dict[str, Any]:
    """Arrays by name: a dict as it is, one array as ``output``, several as ``output_0`` and so on."""
    import numpy

    if isinstance(found, dict):
        named = cast("dict[Any, Any]", found)
    elif isinstance(found, tuple):
        named = {f"output_{at}": one for at, one in enumerate(cast("tuple[Any, ...]", found))}
    else:
        named = {"output": found}
    return {str(name): numpy.asarray(value) for name, value in named.items()}


def answer(name: str, asked: dict[str, Any], outputs: dict[str, Any]) -> Response:
    """The answer, with the outputs that are wanted, each in the form in which it is wanted."""
    listed: list[dict[str, Any]] = asked.get("outputs") or [{"name": name} for name in outputs]
    wanted: dict[str, dict[str, Any]] = {str(one.get("name")): one.get("parameters") or {} for one in listed}
    general: dict[str, Any] = asked.get("parameters") or {}
    binary = bool(general.get("binary_data_output"))
    told: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for output, parameters in wanted.items():
        if output not in outputs:
            raise Fault(422, "invalid_input", f"there is no output {output}; the model gives {', '.join(outputs)}")
        array = outputs[output]
        kind = _NAMES.get(array.dtype.name, "BYTES")
        entry: dict[str, Any] = {"name": output, "datatype": kind, "shape": list(array.shape)}
        if parameters.get("binary_data", binary):
            blob = array.tobytes() if kind != "BYTES" else _written(array)
            blobs.append(blob)
            entry["parameters"] = {"binary_data_size": len(blob)}
        else:
            entry["data"] = array.ravel().tolist() if kind != "BYTES" else [_text(v) for v in array.ravel()]
        told.append(entry)
    body = {"model_name": name, "model_version": "1", "outputs": told}
    if asked.get("id"):
        body["id"] = asked["id"]
    head = encode(body)
    if not blobs:
        return Response(head, media_type="application/json")
    return Response(head + b"".join(blobs), media_type="application/octet-stream", headers={LENGTH: str(len(head))})


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _written(array: Any) -> bytes:
    texts = [value if isinstance(value, bytes) else str(value).encode() for value in array.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
