"""Writes what a JSON schema refers to (`$ref` into `$defs`) where it is referred to. Pure.

Hosts that pass a tool's input schema on to a model drop the definitions and keep the references. So a listed schema
has neither. What cannot be written out (a schema within itself, or more than there is room for) is widened to its
bare type: a host may then accept what the tool refuses, and never the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, cast
from urllib.parse import unquote

__all__ = ["inline_references"]

_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")
_DROPPED: Final = frozenset({"$defs", "definitions", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$id"})
_TYPES: Final = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_BY_NAME: Final = frozenset({"properties", "patternProperties", "dependentSchemas"})
_SCHEMAS: Final = frozenset(
    {
        *("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains"),
        *("additionalProperties", "unevaluatedProperties", "propertyNames"),
        *("allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
    }
)
_ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)


def inline_references(schema: Mapping[str, Any], *, max_chars: int, max_depth: int) -> dict[str, Any]:
    """Return a schema without references and definitions.

    Args:
        max_chars: Of the result as JSON, if `schema` without its definitions has no more; then references are
            widened rather than written out.
        max_depth: Below it, references are widened, too.
    """
    shape = _Inliner(schema, max_chars, max_depth).schema(schema, frozenset({id(schema)}), 0)
    return cast("dict[str, Any]", shape) if isinstance(shape, dict) else {}


class _Inliner:
    def __init__(self, root: Mapping[str, Any], max_chars: int, max_depth: int) -> None:
        self._root = root
        self._sizes: dict[int, int] = {}
        self._room = max_chars - _size({key: value for key, value in root.items() if key not in _DROPPED})
        self._max_depth = max_depth

    def schema(self, shape: Any, within: frozenset[int], depth: int) -> Any:
        """Return `shape` written out; `within` are the schemas that it is a part of by reference, by identity."""
        if isinstance(shape, list):  # of schemas
            return [self.schema(item, within, depth + 1) for item in cast("list[Any]", shape)]
        if not isinstance(shape, Mapping):
            return shape
        fields = cast("Mapping[str, Any]", shape)
        own = {
            key: self._value(key, value, within, depth + 1)
            for key, value in fields.items()
            if key not in _DROPPED and key not in _REFERENCES
        }
        for key in _REFERENCES:
            if key in fields:
                own = _joined(self._target(fields[key], within, depth), own)
        return own

    def _value(self, key: str, value: Any, within: frozenset[int], depth: int) -> Any:
        if key in _SCHEMAS:
            return self.schema(value, within, depth)
        if isinstance(value, Mapping):
            fields = cast("Mapping[str, Any]", value)
            if key in _BY_NAME:
                return {name: self.schema(item, within, depth + 1) for name, item in fields.items()}
            if key == "discriminator":  # its mapping refers to definitions
                return {name: item for name, item in fields.items() if name != "mapping"}
        return cast("Any", value)

    def _target(self, reference: Any, within: frozenset[int], depth: int) -> Any:
        target: Any = self._resolve(reference)
        if isinstance(target, bool):
            return target
        if not isinstance(target, Mapping):
            return {}
        fields = cast("Mapping[str, Any]", target)
        cost = self._sizes.setdefault(id(fields), _size(fields))
        if id(fields) in within or cost > self._room or depth > self._max_depth:
            return _bare(fields)
        self._room -= cost
        return self.schema(fields, within | {id(fields)}, depth)

    def _resolve(self, reference: Any) -> Any:
        """Return what a JSON pointer leads to; None if it is none, or leads nowhere."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        found: Any = self._root
        for part in unquote(reference).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = cast("Mapping[str, Any]", found).get(key)
            elif isinstance(found, list) and key.isdecimal() and len(key) < 6:
                items = cast("list[Any]", found)
                found = items[int(key)] if int(key) < len(items) else None
            else:
                return None
        return found


def _joined(target: Any, own: dict[str, Any]) -> Any:
    """Return what a reference to `target` beside the keywords `own` means."""
    if not isinstance(target, dict):
        target = {} if target else {"not": {}}
    fields = cast("dict[str, Any]", target)
    if all(key in _ANNOTATIONS or (key in fields and fields[key] == value) for key, value in own.items()):
        return {**fields, **own}
    return {**own, "allOf": [*own.get("allOf", ()), fields]} if fields else own


def _bare(target: Mapping[str, Any]) -> dict[str, Any]:
    kind = target.get("type")
    return {"type": kind} if isinstance(kind, str) and kind in _TYPES else {}


def _size(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":")))
