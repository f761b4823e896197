"""A schema without references says the same; where it cannot, it accepts more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ash_hub.face.hive_tools import listed_hive_tools
from ash_hub.spawning.schema_references import inline_references
from ash_hub.spawning.toolsets import MAX_SCHEMA_BYTES, pin

NAMES = ("A", "B", "C")


def inlined(schema: dict[str, Any], max_chars: int = MAX_SCHEMA_BYTES) -> dict[str, Any]:
    return inline_references(schema, max_chars=max_chars, max_depth=20)


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():  # pyright: ignore[reportUnknownVariableType]
            yield str(key)  # pyright: ignore[reportUnknownArgumentType]
            yield from keys(item)
    elif isinstance(value, list):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from keys(item)


def is_free(schema: Any) -> bool:
    return {"$ref", "$defs", "definitions", "$dynamicRef", "$recursiveRef"}.isdisjoint(keys(schema))


def accepts(schema: dict[str, Any], value: Any) -> bool:
    validator: Any = Draft202012Validator(schema)
    return bool(validator.is_valid(value))


def schemas(references: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    kinds = st.sampled_from(["string", "integer", "object", "array", "null"])
    leaf = st.fixed_dictionaries({}, optional={"type": kinds}) | references
    return st.recursive(
        leaf,
        lambda inner: (
            st.fixed_dictionaries({"type": st.just("array"), "items": inner})
            | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)})
            | st.fixed_dictionaries(
                {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("xy"), inner, max_size=2)},
                optional={"required": st.just(["x"])},
            )
        ),
        max_leaves=4,
    )


def to(*names: str) -> st.SearchStrategy[Any]:
    """References to definitions of these names, some with more keywords."""
    if not names:
        return st.nothing()
    pointers = st.sampled_from([f"#/$defs/{name}" for name in names])
    more = {"description": st.just("said"), "type": st.just("object"), "maxProperties": st.just(1)}
    return st.fixed_dictionaries({"$ref": pointers}, optional=more)


def with_definitions(**definitions: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {
            "type": st.just("object"),
            "properties": st.dictionaries(st.sampled_from("xyz"), schemas(to(*NAMES)), max_size=3),
            "$defs": st.fixed_dictionaries(definitions),
        }
    )


acyclic = with_definitions(A=schemas(st.nothing()), B=schemas(to("A")), C=schemas(to("A", "B")))
cyclic = with_definitions(**{name: schemas(to(*NAMES)) for name in NAMES})
values = st.recursive(
    st.none() | st.integers(0, 1) | st.just("text"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.sampled_from("xyz"), values, max_size=3)


@settings(max_examples=60, deadline=None)
@given(acyclic, objects)
def test_a_schema_says_the_same_without_references(schema: dict[str, Any], value: Any) -> None:
    written = inlined(schema)
    assert is_free(written) and accepts(written, value) == accepts(schema, value)


def is_grounded(schema: dict[str, Any]) -> bool:
    """Whether no definition is itself by references alone: such a schema means nothing, and validators fail at it."""
    try:
        accepts(schema, {"x": {"x": {}}, "y": {"y": {}}, "z": {}})
    except Exception:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(cyclic, objects, st.integers(10, 2000))
def test_what_refers_to_itself_or_is_large_is_widened_and_bounded(
    schema: dict[str, Any], value: Any, most: int
) -> None:
    written = inlined(schema, most)
    assert is_free(written)
    bare = {key: item for key, item in schema.items() if key != "$defs"}
    assert len(json.dumps(written, separators=(",", ":"))) <= max(most, 3 * len(json.dumps(bare)))
    if is_grounded(schema) and _checked(schema, value):
        assert accepts(written, value)


def _checked(schema: dict[str, Any], value: Any) -> bool:
    try:
        return accepts(schema, value)
    except RecursionError:
        return False


def test_a_schema_that_doubles_with_each_reference_stays_small() -> None:
    doubling = {
        f"D{n}": {"type": "object", "properties": {side: {"$ref": f"#/$defs/D{n + 1}"} for side in "ab"}}
        for n in range(40)
    }
    (kept,) = pin(
        [
            {
                "name": "run",
                "inputSchema": {"type": "object", "properties": {"x": {"$ref": "#/$defs/D0"}}, "$defs": doubling},
            }
        ],
        {},
    ).tools
    assert is_free(kept.input_schema) and kept.input_schema["properties"]["x"]["type"] == "object"
    assert len(json.dumps(kept.input_schema)) < 2 * MAX_SCHEMA_BYTES


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("#/$defs/a~1b", {"type": "integer"}),
        ("#/$defs/%61~1b", {"type": "integer"}),
        ("#/properties/y/anyOf/1", {"type": "null"}),
        ("#", {"type": "object"}),
        ("#/$defs/none", {}),
        ("#/properties/y/anyOf/7", {}),
        ("#anchor", {}),
        ("#/$defs/never", {"not": {}}),
    ],
)
def test_a_reference_is_what_its_pointer_leads_to(reference: str, meant: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"$ref": reference}, "y": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
        "$defs": {"a/b": {"type": "integer"}, "never": False},
    }
    assert inlined(schema)["properties"]["x"] == meant


def test_a_property_may_be_named_as_a_keyword_and_data_is_left_alone() -> None:
    schema = {
        "type": "object",
        "properties": {"$defs": {"type": "string"}, "definitions": {"const": {"definitions": 1}}},
    }
    assert inlined(schema) == schema


def test_a_tool_whose_schema_is_all_reference_is_shown_with_its_arguments() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "required": ["next"]}
    (kept,) = pin([{"name": "run", "inputSchema": {"$ref": "#/$defs/Node", "$defs": {"Node": node}}}], {}).tools
    assert kept.input_schema == {**node, "properties": {"next": {"type": "object"}}}


def test_no_tool_of_the_hive_has_definitions_in_its_input_schema() -> None:
    assert all(is_free(tool["inputSchema"]) for tool in listed_hive_tools(""))
