"""Arguments of a tool from the words of a command line, typed by the tool's input schema. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn, cast

import typer

__all__ = ["check_required", "read_arguments", "read_json_arguments", "usage_of"]

_TYPES_IN_ORDER: Final = ("null", "boolean", "integer", "number", "object", "array")
"""From the strictest to the loosest, before `string`, which takes anything."""

_MAX_REFERENCES: Final = 20


def read_json_arguments(text: str) -> dict[str, Any]:
    """Return the arguments that are written as one JSON object."""
    value = _json(text, "the arguments")
    if not isinstance(value, dict):
        raise typer.BadParameter(f'the arguments are a JSON object, such as \'{{"path": "a"}}\', not {text[:80]!r}')
    return cast("dict[str, Any]", value)


def read_arguments(words: Iterable[str], schema: Mapping[str, Any], tool: str) -> dict[str, Any]:
    """Return the arguments that `key=value` and `key:=json` words mean.

    A value is read as the type that the schema gives its key; where it gives none, as JSON
    if it is that, else as text.
    """
    properties = _object(schema.get("properties"))
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key in ("", ":"):
            raise typer.BadParameter(
                f"{word!r} is no argument; write key=value, or key:=JSON. {usage_of(tool, schema)}"
            )
        literal, key = key.endswith(":"), key.removesuffix(":")
        if key in given:
            raise typer.BadParameter(f"{key!r} is given twice; say it once")
        if key not in properties and schema.get("additionalProperties") is False:
            raise typer.BadParameter(f"{tool} has no argument {key!r}. {usage_of(tool, schema)}")
        given[key] = _json(text, key) if literal else _typed(key, text, _object(properties.get(key)), schema)
    return given


def check_required(given: Mapping[str, Any], schema: Mapping[str, Any], tool: str) -> None:
    """Refuse arguments that lack what the schema requires."""
    missing = [name for name in _list(schema.get("required")) if name not in given]
    if missing:
        raise typer.BadParameter(
            f"{tool} needs {', '.join(f'{name}=…' for name in missing)}. {usage_of(tool, schema)}"
        )


def usage_of(tool: str, schema: Mapping[str, Any]) -> str:
    """Return one line on what a tool takes: required arguments first, others in brackets."""
    required = [str(name) for name in _list(schema.get("required"))]
    others = [name for name in _object(schema.get("properties")) if name not in required]
    words = [f"{name}=…" for name in required] + [f"[{name}=…]" for name in others]
    return f"It takes: {' '.join(words)}" if words else f"{tool} takes no arguments"


def _typed(key: str, text: str, shape: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
    types = _types(shape, schema)
    if not types:
        return _json_or_text(text)
    for kind in _TYPES_IN_ORDER:
        if kind in types:
            found, value = _as(kind, text)
            if found:
                return value
    if "string" in types:
        return text
    wanted = " or ".join(kind for kind in _TYPES_IN_ORDER if kind in types)
    hint = "; write it as JSON" if types & {"object", "array"} else ""
    raise typer.BadParameter(f"{key}={text[:80]!r} is not of type {wanted}{hint}")


def _types(shape: Mapping[str, Any], schema: Mapping[str, Any], depth: int = 0) -> set[str]:
    """Return the JSON types that a schema allows; none when it does not say."""
    if depth > _MAX_REFERENCES:
        return set()
    reference = shape.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = schema
        for part in reference[2:].split("/"):
            target = _object(target).get(part)
        return _types(_object(target), schema, depth + 1)
    named = shape.get("type")
    if named is not None:
        return {str(name) for name in (_list(named) or [named])}
    if isinstance(values := shape.get("enum", [shape["const"]] if "const" in shape else None), list):
        return {_type_of(value) for value in cast("list[Any]", values)}
    choices = [*_list(shape.get("anyOf")), *_list(shape.get("oneOf"))]
    found = [_types(_object(choice), schema, depth + 1) for choice in choices]
    return {kind for kinds in found for kind in kinds} if all(found) else set()


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, classes in (("boolean", bool), ("integer", int), ("number", float), ("string", str), ("array", list)):
        if isinstance(value, classes):
            return kind
    return "object"


def _as(kind: str, text: str) -> tuple[bool, Any]:
    """Say whether `text` can be read as a JSON type, and as what."""
    if kind == "boolean" and text.lower() in ("true", "false", "yes", "no"):
        return True, text.lower() in ("true", "yes")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False, None
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        return True, int(value)
    actual = _type_of(value)
    return actual == kind or (kind == "number" and actual == "integer"), value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise typer.BadParameter(f"{what}: {text[:80]!r} is not JSON ({exc})") from exc


def _json_or_text(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _object(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
