"""What ``predict`` takes over HTTP, made from its signature: a type for FastAPI, and the way back to arguments."""

from __future__ import annotations

import inspect
import operator
import typing
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, PydanticSchemaGenerationError, TypeAdapter, create_model

from .model import Method, Unusable

OURS = frozenset({"model", "stream", "stream_options", "user"})  # members that belong to the gateway
_FIXED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)


class Shape(typing.NamedTuple):
    """``body`` is the type of a request; ``arguments`` makes of one what the method is called with.

    With batches it makes one item. ``result`` is the type of an answer where it can be described.
    """

    body: type[BaseModel]
    arguments: Callable[[Any], Any]
    result: Any
    taken: frozenset[str] = OURS  # members that are not passed on


_SINGLE = (bool, int, float, str, bytes, dict)  # none of them can be a batch


def shape(method: Method, *, batches: bool) -> Shape:
    """The shape of a method's requests; Unusable says what of its signature cannot be served."""
    parameters = [p for p in method.arguments.values() if p.kind in _FIXED]
    if batches:
        return _batched(method, parameters)
    result = described(method.types.get("return", Any), stream=method.streams)
    if len(parameters) == 1 and not method.open:
        only = parameters[0]
        kind = method.types.get(only.name, Any)
        if _is_model(kind):
            return Shape(kind, _single(only.name), result, _taken(kind))
    return Shape(_members(method, parameters), _named, result, _declared(parameters))


def _batched(method: Method, parameters: list[inspect.Parameter]) -> Shape:
    if len(parameters) != 1 or method.streams:
        raise Unusable(f"{method.name} gets batches, so it must take one list and give one, not a stream")
    only = parameters[0]
    kind = method.types.get(only.name, Any)
    if (typing.get_origin(kind) or kind) in _SINGLE or _is_model(kind):
        name = getattr(kind, "__name__", kind)
        raise Unusable(f"with max_batch_size above 1, {method.name} gets a list; it takes {name}: take list[{name}]")
    item = _item(kind)
    result = described(_item(method.types.get("return", Any)))
    if _is_model(item):
        return Shape(item, _same, result, _taken(item))
    body = _build(method, {only.name: (_wire(item), ...)})
    return Shape(body, operator.attrgetter(only.name), result, _declared(parameters))


def _members(method: Method, parameters: list[inspect.Parameter]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for one in parameters:
        if one.name in ("model", "stream"):
            raise Unusable(f"{method.name} cannot have an argument named {one.name}: that word is the gateway's")
        kind = _wire(method.types.get(one.name, Any))
        fields[one.name] = (kind, ... if one.default is one.empty else one.default)
    return _build(method, fields)


def _build(method: Method, fields: dict[str, Any]) -> type[BaseModel]:
    config = ConfigDict(
        extra="allow" if method.open else "forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )
    try:
        made = create_model(f"{method.name.capitalize()}Request", __config__=config, **fields)
        made.model_json_schema()
    except (PydanticSchemaGenerationError, TypeError, ValueError, NameError) as exc:
        said = str(exc).splitlines()[0]
        raise Unusable(f"the arguments of {method.name} cannot come as JSON: {said}") from exc
    return made


def _same(body: Any) -> Any:
    return body


def _single(name: str) -> Callable[[Any], Any]:
    def made(body: Any) -> dict[str, Any]:
        return {name: body}

    return made


def _named(body: BaseModel) -> dict[str, Any]:
    return {name: getattr(body, name) for name in (*type(body).model_fields, *(body.model_extra or ()))}


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _taken(kind: type[BaseModel]) -> frozenset[str]:
    names = {field.alias or name for name, field in kind.model_fields.items()}
    if "model" in names:
        raise Unusable(f"{kind.__name__} has a field named model: that word is the gateway's, so give it an alias")
    return OURS - names


def _declared(parameters: list[inspect.Parameter]) -> frozenset[str]:
    return OURS - {p.name for p in parameters}


def _item(kind: Any) -> Any:
    """The type of one item of a list."""
    found = typing.get_args(kind)
    return found[0] if found else Any


# --- arrays -----------------------------------------------------------------------------------------------------------


def array_type(kind: Any) -> Any:
    """The dtype that an annotation of numpy's asks for, None for any, and ``False`` where it is no array."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    origin = typing.get_origin(kind) or kind
    if getattr(origin, "__module__", "").partition(".")[0] != "numpy" or getattr(origin, "__name__", "") != "ndarray":
        return False
    args = typing.get_args(kind)
    inner = typing.get_args(args[-1]) if args else ()
    found = inner[0] if inner else None
    return found if isinstance(found, type) else None


def _wire(kind: Any) -> Any:
    """The type as JSON brings it: an array is nested lists of numbers."""
    dtype = array_type(kind)
    if dtype is False:
        return Any if kind is inspect.Parameter.empty else kind

    def to_array(value: Any) -> Any:
        import numpy

        made = numpy.asarray(value, dtype=dtype)
        if made.dtype == object:
            raise ValueError("the rows differ in length, or are no numbers")
        return made

    return Annotated[list[Any] | float, AfterValidator(to_array)]


def described(kind: Any, *, stream: bool = False) -> Any:
    """A result's type where a document can describe it; None otherwise. Of a stream it is that of each piece."""
    if stream:
        args = typing.get_args(kind)
        kind = args[0] if args else Any
    if kind in (Any, inspect.Parameter.empty, None, type(None)) or array_type(kind) is not False:
        return None
    try:
        TypeAdapter(kind).json_schema()
    except Exception:  # whatever Pydantic says of a type that it does not know
        return None
    return kind


def is_tensors(method: Method) -> bool:
    """Whether all that a method takes is arrays."""
    kinds = [method.types.get(name, Any) for name in method.arguments]
    return bool(kinds) and all(array_type(kind) is not False for kind in kinds)
