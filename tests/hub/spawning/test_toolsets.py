"""Tool lists from inside a sandbox are cleaned, bounded, pinned and named."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_hub.tools import MAX_DESCRIPTION_BYTES, MAX_TOOLS, clean_text, pin
from ash_mcp.types import SessionName
from ash_mcp.wire import ORIGINAL_NAME_META_KEY

SB1 = SessionName("sb1")


def tool(name: str = "run", **more: Any) -> dict[str, Any]:
    return {"name": name, "description": "Runs.", "inputSchema": {"type": "object"}, **more}


def names(*listed: dict[str, Any], limit: int = 50, session: SessionName = SB1) -> list[str]:
    return [shape["name"] for shape in pin(listed, {}).listing(session, limit).under(session)]


def test_a_tool_appears_under_its_session() -> None:
    assert names(tool("terminal-controller_execute_command")) == ["sb1_terminal-controller_execute_command"]


def test_a_long_name_is_shortened_with_a_stable_hash_and_its_original_kept() -> None:
    long = "a" * 100
    listing = pin([tool(long)], {}).listing(SB1, 50)
    (shape,) = listing.under(SB1)
    assert len(shape["name"]) == 50
    assert shape["_meta"] == {ORIGINAL_NAME_META_KEY: long}
    assert listing.renamed[shape["name"].removeprefix("sb1_")] == long
    assert names(tool(long)) == [shape["name"]]


def test_names_that_differ_only_past_the_limit_stay_apart() -> None:
    assert len(set(names(tool("x" * 90 + "1"), tool("x" * 90 + "2")))) == 2


@pytest.mark.parametrize("foreign", ["käse", "a.b", "a b", "a/b", "工具"])
def test_a_name_with_other_characters_is_replaced(foreign: str) -> None:
    (shown,) = names(tool(foreign))
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,50}", shown)


@pytest.mark.parametrize("bad", ["", "ash_exec", "a\nb", "a\u202eb", "x" * 129, None, 7])
def test_an_unusable_name_is_left_out_with_a_note(bad: object) -> None:
    toolset = pin([{**tool(), "name": bad}, tool("good")], {})
    assert [t.name for t in toolset.tools] == ["good"]
    assert toolset.notes


@pytest.mark.parametrize("entry", [None, 7, "tool", [], {}])
def test_an_entry_that_is_no_tool_is_left_out(entry: object) -> None:
    assert pin([entry, tool()], {}).tools[0].name == "run"


def test_only_so_many_tools_are_shown() -> None:
    toolset = pin([tool(f"t{n}") for n in range(MAX_TOOLS + 5)], {})
    assert len(toolset.tools) == MAX_TOOLS
    assert str(MAX_TOOLS) in toolset.notes[0]


def test_a_description_is_bounded_and_loses_invisible_characters() -> None:
    (kept,) = pin([tool(description="a\u200b\u202e\U000e0041b" + "é" * 5000)], {}).tools
    assert kept.description.startswith("abé")
    assert len(kept.description.encode()) <= MAX_DESCRIPTION_BYTES


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        None,
        [],
        {"type": "string"},
        deep(30),
        {"type": "object", "properties": {"x": {"$ref": "http://elsewhere/schema"}}},
        {"type": "object", "description": "x" * 10, "enum": ["y" * 50] * 2000},
    ],
)
def test_a_schema_that_is_no_bounded_local_object_becomes_the_open_one(schema: object) -> None:
    (kept,) = pin([tool(inputSchema=schema)], {}).tools
    assert kept.input_schema == {"type": "object"}


def test_a_local_reference_stays() -> None:
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "string"}}}
    assert pin([tool(inputSchema=schema)], {}).tools[0].input_schema == schema


def test_a_server_cannot_call_itself_harmless_but_its_recipe_can() -> None:
    said = {"readOnlyHint": True, "idempotentHint": True, "destructiveHint": True, "x": 1}
    (own,) = pin([tool(annotations=said)], {}).tools
    assert own.annotations == {"destructiveHint": True}
    (recipe,) = pin([tool(annotations=said)], {"run": {"readOnlyHint": True, "destructiveHint": False}}).tools
    assert recipe.annotations == {"readOnlyHint": True, "destructiveHint": False}


def test_equal_lists_have_equal_digests() -> None:
    assert pin([tool()], {}).digest == pin([tool()], {}).digest != pin([tool("other")], {}).digest


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.sampled_from(["name", "description", "inputSchema", "annotations"]), json_values)))
def test_whatever_a_server_lists_becomes_legal_names_and_json(listed: list[dict[str, Any]]) -> None:
    shown = pin(listed, {}).listing(SB1, 50).under(SB1)
    json.dumps(shown)
    assert len({shape["name"] for shape in shown}) == len(shown)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,50}", shape["name"]) for shape in shown)
    assert all(shape["inputSchema"].get("type") == "object" for shape in shown)


@given(st.text(max_size=200), st.integers(4, 100))
def test_cleaned_text_is_never_longer_than_asked(text: str, most: int) -> None:
    assert len(clean_text(text, most).encode()) <= most


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": 5},
        {"type": "object", "properties": []},
        {"type": "object", "required": "text"},
        {"type": "object", "required": [1]},
        {"type": "object", "$schema": 5},
        {"type": "object", "properties": {"a": {"default": float("nan")}}},
        {"type": "object", "properties": {"a": {"maximum": float("inf")}}},
    ],
)
def test_a_schema_that_a_protocol_version_cannot_list_is_not_shown(schema: dict[str, Any]) -> None:
    listed = {**tool(), "inputSchema": schema, "outputSchema": schema}
    toolset = pin([listed], {})
    (shape,) = toolset.listing(SB1, 50).under(SB1)
    assert shape["inputSchema"] == {"type": "object"} and "outputSchema" not in shape
    assert toolset.notes
