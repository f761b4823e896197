"""Tools as one line each, `run(command: str, timeout_seconds: float = 60)`, and as many as fit into an answer. Pure.

Hosts pass an answer on to a model as a whole, or cut it: so it is short, and what is said of each tool gets shorter
where there are many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from ash_hub.spawning.toolsets import mapping

__all__ = ["arguments_of", "first_line", "fit"]

MAX_ARGUMENTS_CHARS: Final = 240
MAX_TYPE_CHARS: Final = 60
MAX_DEFAULT_CHARS: Final = 30
MAX_LINE_CHARS: Final = 120
_DEPTH: Final = 3
_NAMES: Final = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "object": "dict",
    "array": "list",
    "null": "None",
}

T = TypeVar("T")


def arguments_of(schema: Mapping[str, Any]) -> str:
    """Return what a tool takes: `name: type`, `name: type = default`, or `name?: type` where no default is known."""
    required = cast("Sequence[Any]", _list(schema.get("required")))
    written: list[str] = []
    room = MAX_ARGUMENTS_CHARS
    for name, shape in mapping(schema.get("properties")).items():
        part = _argument(name, mapping(shape), name in required)
        room -= len(part) + 2
        if room < 0:
            written.append("…")
            break
        written.append(part)
    return ", ".join(written)


def first_line(text: str) -> str:
    """Return the first line of a description, cut."""
    return _cut(text.strip().partition("\n")[0].rstrip(), MAX_LINE_CHARS)


def fit(ways: Sequence[Sequence[T]], cost: Callable[[T], int], room: int) -> Sequence[T]:
    """Return the first of several ways to write the same items, from long to short, that fits into `room`.

    Where none does, as many items of the last way as fit.
    """
    for way in ways:
        if sum(map(cost, way)) <= room:
            return way
    kept: list[T] = []
    for item in ways[-1]:
        room -= cost(item)
        if room < 0:
            break
        kept.append(item)
    return kept


def _argument(name: str, shape: Mapping[str, Any], is_required: bool) -> str:
    name, kind = _cut(" ".join(name.split()), MAX_TYPE_CHARS), _type(shape, _DEPTH)
    if is_required:
        return f"{name}: {kind}"
    return (
        f"{name}: {kind} = {_value(shape['default'], MAX_DEFAULT_CHARS)}" if "default" in shape else f"{name}?: {kind}"
    )


def _type(shape: Mapping[str, Any], depth: int) -> str:
    if depth == 0:
        return "any"
    choices = _list(shape.get("enum")) or ([shape["const"]] if "const" in shape else [])
    ways = [mapping(way) for way in (*_list(shape.get("anyOf")), *_list(shape.get("oneOf")))]
    kinds = shape.get("type")
    if choices:
        names = [_value(choice, MAX_TYPE_CHARS) for choice in choices]
        if sum(len(name) + 3 for name in names) > MAX_TYPE_CHARS:
            names = sorted({_kind_of(choice) for choice in choices})
    elif ways:
        names = [_type(way, depth - 1) for way in ways]
    else:
        names = [_named(kind, shape, depth) for kind in ([kinds] if isinstance(kinds, str) else _list(kinds))]
    known = " | ".join(dict.fromkeys(names))
    return known if known and len(known) <= MAX_TYPE_CHARS else "any"


def _named(kind: object, shape: Mapping[str, Any], depth: int) -> str:
    name = _NAMES.get(kind, "any") if isinstance(kind, str) else "any"
    items = mapping(shape.get("items"))
    inner = _type(items, depth - 1) if name == "list" and items else "any"
    return name if inner == "any" else f"{name}[{inner}]"


def _kind_of(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _value(value: object, most: int) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    return _cut(json.dumps(value, ensure_ascii=False), most)


def _list(value: object) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
