"""Tool lists from inside a sandbox are cleaned, bounded, pinned and named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_hub.spawning.toolsets import (
    MAX_DESCRIPTION_BYTES,
    MAX_LIST_BYTES,
    MAX_LIST_CHARACTERS,
    MAX_LIST_VALUES,
    MAX_TOOLS,
    Toolset,
    clean_text,
    pin,
)
from ash_mcp.types import SessionName
from ash_mcp.wire import ORIGINAL_NAME_META_KEY

SB1 = SessionName("sb1")


def tool(name: str = "run", **more: Any) -> dict[str, Any]:
    return {"name": name, "description": "Runs.", "inputSchema": {"type": "object"}, **more}


def shapes(toolset: Toolset, limit: int = 50, session: SessionName = SB1) -> list[dict[str, Any]]:
    """Return the tools as a list shows them for one session."""
    return [pinned.to_json(f"{session}_{name}") for name, pinned in toolset.listing(session, limit).tools]


def names(*listed: dict[str, Any], limit: int = 50, session: SessionName = SB1) -> list[str]:
    return [shape["name"] for shape in shapes(pin(listed, {}), limit, session)]


def test_a_tool_appears_under_its_session() -> None:
    assert names(tool("terminal-controller_execute_command")) == ["sb1_terminal-controller_execute_command"]


def test_a_long_name_is_shortened_with_a_stable_hash_and_its_original_kept() -> None:
    long = "a" * 100
    toolset = pin([tool(long)], {})
    (shape,) = shapes(toolset)
    assert len(shape["name"]) == 50
    assert shape["_meta"] == {ORIGINAL_NAME_META_KEY: long}
    assert toolset.listing(SB1, 50).renamed[shape["name"].removeprefix("sb1_")] == long
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


def test_a_local_reference_is_written_out_in_what_a_tool_takes() -> None:
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "string"}}}
    (kept,) = pin([tool(inputSchema=schema, outputSchema=schema)], {}).tools
    assert kept.input_schema == {"type": "object", "properties": {"x": {"type": "string"}}}
    assert kept.output_schema == schema


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
    shown = shapes(pin(listed, {}))
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
    (shape,) = shapes(toolset)
    assert shape["inputSchema"] == {"type": "object"} and "outputSchema" not in shape
    assert toolset.notes


def test_what_is_removed_from_a_text_makes_no_room_for_what_comes_behind_its_limit() -> None:
    assert clean_text("\u200b" * 90 + "shown" + "behind" * 2, 95) == "shown…"
    assert clean_text("\u200b" * 90 + "shown", 95) == "shown"


class Looked:
    """Counts the characters and values that are looked at."""

    def __init__(self) -> None:
        self.characters = 0
        self.values = 0

    def text(self, text: str) -> str:
        looked = self

        class Text(str):
            __slots__ = ()

            def __getitem__(self, at: SupportsIndex | slice) -> str:
                return Text(super().__getitem__(at))

            def __iter__(self) -> Iterator[str]:
                looked.characters += len(self)
                return super().__iter__()

            def isprintable(self) -> bool:
                looked.characters += len(self)
                return super().isprintable()

        return Text(text)

    def many(self, item: object, count: int) -> list[object]:
        looked = self

        class Items(list[object]):
            def __iter__(self) -> Iterator[object]:
                for item in super().__iter__():
                    looked.values += 1
                    yield item

        return Items([item] * count)


LARGE = 3 * MAX_LIST_CHARACTERS


def schema(said: object) -> dict[str, Any]:
    return {"type": "object", "enum": said}


HOSTILE: Mapping[str, Callable[[Looked], list[dict[str, Any]]]] = {
    "description": lambda looked: [tool(description=looked.text("x" * LARGE))],
    "title": lambda looked: [tool(title=looked.text("\u200b" * LARGE))],
    "text": lambda looked: [tool(inputSchema=schema(looked.text("x" * LARGE)))],
    "key": lambda looked: [tool(inputSchema={"type": "object", looked.text("k" * LARGE): 1})],
    "texts": lambda looked: [tool(inputSchema=schema(looked.many(looked.text("x" * LARGE), 1000)))],
    "invisible": lambda looked: [
        tool(f"t{n}", description=said, outputSchema=schema(looked.many(said, 15)))
        for said in [looked.text("\u200b" * LARGE)]
        for n in range(MAX_TOOLS)
    ],
    "values": lambda looked: [tool(inputSchema=schema(looked.many(1, LARGE)))],
    "schemas": lambda looked: [tool(f"t{n}", inputSchema=schema(looked.many(1, 20_000))) for n in range(MAX_TOOLS)],
}
"""Lists by what of them is more than anybody may be made to read."""


@pytest.mark.parametrize("what", HOSTILE)
def test_of_the_worst_list_only_a_bounded_part_is_looked_at(what: str) -> None:
    looked = Looked()
    pin(HOSTILE[what](looked), {})
    assert looked.characters <= 2 * MAX_LIST_CHARACTERS  # once whether anything is to be removed, once what
    assert looked.values <= 3 * MAX_LIST_VALUES  # to measure, to clean and to write


def test_a_list_that_is_too_large_is_shown_as_far_as_it_goes() -> None:
    listed = [tool(f"t{n}", description="x" * MAX_DESCRIPTION_BYTES, title="y" * 200) for n in range(MAX_TOOLS)]
    toolset = pin(listed, {})
    shown = len(toolset.tools)
    (following,) = pin([listed[shown]], {}).tools
    size = sum(shown.kept_bytes() for shown in toolset.tools)
    assert size <= MAX_LIST_BYTES < size + following.kept_bytes()
    assert toolset.notes == (f"only the first {shown} tools are shown: the list is too large",)


def test_a_schema_of_too_many_values_costs_its_tool_alone() -> None:
    listed = [tool("bad", inputSchema={"type": "object", "enum": [1] * 50_000}), tool("good")]
    assert [kept.name for kept in pin(listed, {}).tools] == ["bad", "good"]
