"""Tensors of the Open Inference Protocol over HTTP, as JSON or in its binary form: read and written; pure."""

from __future__ import annotations

import struct
from typing import Any, cast

import msgspec

from pierhead.gateway.faults import Fault, bad_request

HEADER = "inference-header-content-length"
BINARY = b"application/octet-stream"
_MOST = 1024  # elements of one input


class Tensor(msgspec.Struct, kw_only=True):
    """One input as it comes: ``data`` is flat or nested, or follows the JSON in as many bytes as a parameter says."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class Wanted(msgspec.Struct):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, kw_only=True):
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


def read(body: bytes, header: str | None) -> tuple[InferRequest, dict[str, list[str]]]:
    """The request and its inputs as texts, by name; Fault 400 says what is wrong with which tensor."""
    cut = len(body)
    if header is not None:
        if not header.isdecimal() or len(header) > 12 or int(header) > len(body):
            raise bad_request(f"{HEADER} is {header[:40]!r}, the body has {len(body)} bytes.")
        cut = int(header)
    try:
        request = msgspec.json.decode(body[:cut], type=InferRequest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise bad_request(f"the request cannot be used: {exc}.", code="invalid_json") from exc
    rest = memoryview(body)[cut:]
    texts: dict[str, list[str]] = {}
    for tensor in request.inputs:
        if tensor.name in texts:
            raise bad_request(f"the input '{tensor.name[:60]}' is there twice.", param="inputs")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            texts[tensor.name] = _plain(tensor)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
            raise _wrong(tensor, f"binary_data_size is {size!r}, and {len(rest)} bytes are left")
        texts[tensor.name] = _strings(tensor, bytes(rest[:size]))
        rest = rest[size:]
    if rest:
        raise bad_request(f"{len(rest)} bytes follow the last tensor.")
    return request, texts


def _plain(tensor: Tensor) -> list[str]:
    _check(tensor)
    flat: list[str] = []
    waiting: list[Any] = [tensor.data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(reversed(cast("list[Any]", value)))
            if len(waiting) > 2 * _MOST:
                raise _wrong(tensor, f"it has more than {_MOST} elements")
        elif isinstance(value, str):
            flat.append(value)
        else:
            raise _wrong(tensor, "it has data that are no strings" if value is not None else "it has no data")
    return _counted(tensor, flat)


def _strings(tensor: Tensor, data: bytes) -> list[str]:
    """Elements of BYTES: four bytes of length, little end first, then the text."""
    _check(tensor)
    flat, at = list[str](), 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at) if at + 4 <= len(data) else (-1,)
        if not 0 <= length <= len(data) - at - 4:
            raise _wrong(tensor, "an element is longer than the tensor")
        try:
            flat.append(data[at + 4 : at + 4 + length].decode())
        except UnicodeDecodeError as exc:
            raise _wrong(tensor, "an element is not UTF-8") from exc
        at += 4 + length
        if len(flat) > _MOST:
            raise _wrong(tensor, f"it has more than {_MOST} elements")
    return _counted(tensor, flat)


def _check(tensor: Tensor) -> None:
    if tensor.datatype != "BYTES":
        raise _wrong(tensor, f"its datatype is {tensor.datatype[:20]}, not BYTES")


def _counted(tensor: Tensor, flat: list[str]) -> list[str]:
    wanted = 1
    for size in tensor.shape:
        wanted = min(wanted * max(size, -1), 1 << 40)
    if wanted != len(flat) or any(size < 0 for size in tensor.shape):
        raise _wrong(tensor, f"its shape is {tensor.shape[:8]}, and it has {len(flat)} elements")
    if not flat:
        raise _wrong(tensor, "it is empty")
    return flat


def _wrong(tensor: Tensor, reason: str) -> Fault:
    return bad_request(f"the input '{tensor.name[:60]}' cannot be used: {reason}.", param="inputs")


class Output(msgspec.Struct):
    """One output to tell: texts, or rows of numbers."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]

    def packed(self) -> bytes:
        """Its elements in binary form."""
        if self.datatype == "BYTES":
            raw = [str(text).encode() for text in self.data]
            return b"".join(struct.pack("<I", len(text)) + text for text in raw)
        return struct.pack(f"<{len(self.data)}f", *self.data)


def written(model: str, request: InferRequest, output: Output) -> tuple[bytes, int]:
    """The answer's body, and the length of its JSON part where tensors follow it (else 0)."""
    told: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
    tail = output.packed() if request.binary(output.name) else b""
    if request.binary(output.name):
        told["parameters"] = {"binary_data_size": len(tail)}
    else:
        told["data"] = output.data
    answer: dict[str, Any] = {"model_name": model, "outputs": [told]}
    if request.id:
        answer["id"] = request.id
    head = msgspec.json.encode(answer)
    return head + tail, len(head) if "parameters" in told else 0
