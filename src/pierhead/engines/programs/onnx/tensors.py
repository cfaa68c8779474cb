"""Tensors in and out: plain JSON (``/v1/predict``) and the Open Inference Protocol V2 with its binary form."""

from __future__ import annotations

import importlib
import struct
from typing import Any

import msgspec

from .batching import Item
from .faults import Refused, bad
from .graph import Graph, Port
from .rows import Bounds, split

np: Any = importlib.import_module("numpy")
KINDS = {
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    **{
        f"{sign}INT{bits}": f"<{letter}{bits // 8}"
        for sign, letter in (("", "i"), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    "BOOL": "?",
}
MOST = 1 << 26  # elements of one tensor


class Tensor(msgspec.Struct, kw_only=True):
    """One input: ``data`` is flat or nested, or follows the JSON in as many bytes as a parameter says."""

    name: str
    shape: list[int]
    datatype: str
    data: Any = None
    parameters: dict[str, Any] = {}


class Wanted(msgspec.Struct):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class Infer(msgspec.Struct, kw_only=True):
    """The JSON part of a request."""

    inputs: list[Tensor]
    outputs: list[Wanted] = []
    parameters: dict[str, Any] = {}
    id: str = ""

    def binary(self, output: str) -> bool:
        """Whether the client wants an output in binary form."""
        for wanted in self.outputs:
            if wanted.name == output and "binary_data" in wanted.parameters:
                return bool(wanted.parameters["binary_data"])
        return bool(self.parameters.get("binary_data_output"))


class Predict(msgspec.Struct):
    """Named inputs as nested lists; a model with one input takes the list alone."""

    inputs: Any


_infer = msgspec.json.Decoder(Infer).decode
_predict = msgspec.json.Decoder(Predict).decode
_encode = msgspec.json.Encoder().encode


def read_infer(body: bytes, header: str | None) -> tuple[Infer, dict[str, Any]]:
    """The request and its inputs as arrays; Refused 400 says what is wrong with which."""
    cut = len(body)
    if header is not None:
        if not header.isdecimal() or len(header) > 12 or int(header) > len(body):
            raise bad(f"inference-header-content-length is {header[:40]!r}, the body has {len(body)} bytes")
        cut = int(header)
    request = _decoded(body[:cut], _infer)
    rest = memoryview(body)[cut:]
    arrays: dict[str, Any] = {}
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise bad(f"the input '{tensor.name[:60]}' is there twice")
        elements = _elements(tensor)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            arrays[tensor.name] = _plain(tensor, elements)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
            raise _wrong(tensor.name, f"binary_data_size is {str(size)[:40]}, and {len(rest)} bytes are left")
        arrays[tensor.name] = _binary(tensor, rest[:size], elements)
        rest = rest[size:]
    if len(rest):
        raise bad(f"{len(rest)} bytes follow the last tensor")
    return request, arrays


def _elements(tensor: Tensor) -> int:
    count = 1
    for extent in tensor.shape:
        count *= extent
        if extent < 0 or count > MOST:
            raise _wrong(tensor.name, f"its shape is {tensor.shape[:8]}")
    if len(tensor.shape) > 16:
        raise _wrong(tensor.name, f"it has {len(tensor.shape)} dimensions")
    if tensor.datatype != "BYTES" and tensor.datatype not in KINDS:
        raise _wrong(tensor.name, f"its datatype is {tensor.datatype[:20]!r}")
    return count


def _plain(tensor: Tensor, elements: int) -> Any:
    array = _array(tensor.name, tensor.data, "object" if tensor.datatype == "BYTES" else KINDS[tensor.datatype])
    if array.size != elements:
        raise _wrong(tensor.name, f"its shape is {tensor.shape[:8]}, and it has {array.size} elements")
    return array.reshape(tensor.shape)


def _binary(tensor: Tensor, data: memoryview, elements: int) -> Any:
    if tensor.datatype == "BYTES":
        array = np.array(_strings(tensor.name, data, elements), dtype=object)
    else:
        kind = np.dtype(KINDS[tensor.datatype])
        if len(data) != elements * kind.itemsize:
            raise _wrong(tensor.name, f"its shape is {tensor.shape[:8]}, and it has {len(data)} bytes")
        array = np.frombuffer(data, dtype=kind)
    return array.reshape(tensor.shape)


def _strings(name: str, data: memoryview, elements: int) -> list[str]:
    """Elements of BYTES: four bytes of length, little end first, then the text."""
    flat, at = list[str](), 0
    while at < len(data) and len(flat) < elements:
        (length,) = struct.unpack_from("<I", data, at) if at + 4 <= len(data) else (-1,)
        if not 0 <= length <= len(data) - at - 4:
            raise _wrong(name, "an element is longer than the tensor")
        try:
            flat.append(str(data[at + 4 : at + 4 + length], "utf-8"))
        except UnicodeDecodeError as exc:
            raise _wrong(name, "an element is not UTF-8") from exc
        at += 4 + length
    if at != len(data) or len(flat) != elements:
        raise _wrong(name, f"it does not have {elements} elements")
    return flat


def read_predict(body: bytes, graph: Graph) -> dict[str, Any]:
    """The inputs of a plain request as arrays of the model's types."""
    given = _decoded(body, _predict).inputs
    if not isinstance(given, dict):
        if len(graph.inputs) != 1:
            raise bad(f"'inputs' must be an object with {', '.join(graph.inputs)}")
        given = {next(iter(graph.inputs)): given}
    arrays: dict[str, Any] = {}
    for name, data in given.items():  # pyright: ignore[reportUnknownVariableType]
        port = _port(graph, str(name))  # pyright: ignore[reportUnknownArgumentType]
        arrays[port.name] = _array(port.name, data, port.kind)
    return arrays


def _array(name: str, data: Any, kind: str) -> Any:
    """Nested lists as an array of this type; nothing is rounded or cut to make it fit."""
    if data is None:
        raise _wrong(name, "it has no data")
    try:
        found = np.asarray(data, dtype=object if kind == "object" else None)
    except (ValueError, TypeError, RecursionError) as exc:
        raise _wrong(name, "its lists are not all of the same length") from exc
    if kind == "object":
        if not all(isinstance(one, str) for one in found.flat):
            raise _wrong(name, "it has data that are no strings")
        return found
    wanted = np.dtype(kind)
    fits = {"b": "b", "f": "fiu", "i": "iu", "u": "iu"}[wanted.kind]
    if found.size and found.dtype.kind not in fits:
        raise _wrong(name, f"it has data that are not {wanted.name}")
    if wanted.kind in "iu" and found.size:
        bounds = np.iinfo(wanted)
        if int(found.min()) < bounds.min or int(found.max()) > bounds.max:
            raise _wrong(name, f"it has numbers that are not {wanted.name}")
    with np.errstate(over="ignore"):
        return found.astype(wanted)


def items(graph: Graph, arrays: dict[str, Any], bounds: Bounds) -> list[Item]:
    """Inputs that fit the model, as work for the batcher."""
    feeds: dict[str, Any] = {}
    for name, array in arrays.items():
        port = _port(graph, name)
        if array.dtype != np.dtype(port.kind):
            raise _wrong(name, f"its datatype is not {port.datatype}")
        fits = len(port.shape) == array.ndim or not port.shape
        if not fits or any(d not in (-1, e) for d, e in zip(port.shape, array.shape, strict=False)):
            raise _wrong(name, f"its shape is {list(array.shape)}, the model wants {list(port.shape)}")
        feeds[name] = array
    if missing := [name for name in graph.inputs if name not in feeds]:
        raise bad(f"the input '{missing[0]}' is missing")
    return split(graph, feeds, bounds)


def run(graph: Graph, batch: list[Item]) -> list[Any]:
    """Each request's outputs by name."""
    names = list(graph.outputs)
    if len(batch) == 1:
        return [dict(zip(names, graph.run(batch[0].work, names), strict=True))]
    feeds = {name: np.concatenate([one.work[name] for one in batch]) for name in batch[0].work}
    found = graph.run(feeds, names)
    total = sum(one.rows for one in batch)
    if any(array.shape[0] != total for array in found):
        raise ValueError("the model does not keep its rows apart")  # then each request runs alone
    results: list[Any] = []
    at = 0
    for one in batch:
        results.append({name: array[at : at + one.rows] for name, array in zip(names, found, strict=True)})
        at += one.rows
    return results


def write_predict(model: str, outputs: dict[str, Any]) -> bytes:
    """Outputs as nested lists."""
    return _encode({"model": model, "outputs": {name: listed(array) for name, array in outputs.items()}})


def write_infer(model: str, request: Infer, outputs: dict[str, Any]) -> tuple[bytes, int]:
    """The answer's body, and the length of its JSON part where tensors follow it (else 0)."""
    names = [wanted.name for wanted in request.outputs] or list(outputs)
    told: list[dict[str, Any]] = []
    tail = b""
    for name in names:
        if name not in outputs:
            raise bad(f"the model has no output '{name[:60]}'; it has {', '.join(outputs)}")
        array = outputs[name]
        one: dict[str, Any] = {"name": name, "datatype": _datatype(array), "shape": list(array.shape)}
        if request.binary(name):
            data = _bytes(array)
            one["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            one["data"] = listed(array.reshape(-1))
        told.append(one)
    head = _encode(
        {"model_name": model, "model_version": "1", "outputs": told, **({"id": request.id} if request.id else {})}
    )
    return head + tail, len(head) if tail or any("parameters" in one for one in told) else 0


def listed(array: Any) -> Any:
    """Nested lists; what JSON has no number for (an infinity) becomes null, as msgspec writes it."""
    return array.tolist()


def _datatype(array: Any) -> str:
    if array.dtype.kind in "OUS":
        return "BYTES"
    return next(word for word, kind in KINDS.items() if np.dtype(kind) == array.dtype)


def _bytes(array: Any) -> bytes:
    if array.dtype.kind not in "OUS":
        return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [str(one).encode() for one in array.flat]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def told(port: Port) -> dict[str, Any]:
    """A port as the protocol's metadata has it."""
    return {"name": port.name, "datatype": port.datatype, "shape": list(port.shape)}


def _port(graph: Graph, name: str) -> Port:
    if name not in graph.inputs:
        raise bad(f"the model has no input '{name[:60]}'; it has {', '.join(graph.inputs)}")
    return graph.inputs[name]


def _decoded(body: bytes, decode: Any) -> Any:
    try:
        return decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise bad(f"the request cannot be used: {str(exc)[:300]}", "invalid_json") from exc


def _wrong(name: str, why: str) -> Refused:
    return bad(f"the input '{name[:60]}' cannot be used: {why}")
