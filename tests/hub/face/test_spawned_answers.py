"""What `spawn` answers: short, whatever a sandbox lists, and with a way on for hosts that show no new tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ash_hub.face.hive_tools import HIVE_TOOLS
from ash_hub.face.results import spawned, spawned_several
from ash_hub.face.signatures import arguments_of
from ash_hub.spawning.toolsets import Listing, pin
from ash_mcp.types import SessionName

SANDBOX: dict[str, Any] = {
    "session": "sb1",
    "sandbox_id": "0123456789-0123456789",
    "scope": "",
    "recipe": "general",
    "status": "ready",
    "age_seconds": 0,
    "created_at": "2026-11-28T12:00:00Z",
    "ready_at": "2026-11-28T12:00:00Z",
    "expires_at": "2026-11-29T12:00:00Z",
    "idle_seconds": 1800.0,
    "last_call_at": None,
    "ended_at": None,
    "reason": None,
    "cause": None,
    "message": None,
    "labels": {},
    "warnings": [],
    "network": "none",
    "run": None,
    "ports": [],
}
HOST_CHARS = 4000
RUN = {
    "type": "object",
    "properties": {"command": {"type": "string"}, "timeout_seconds": {"type": "number", "default": 60}},
    "required": ["command"],
}


def listing(*tools: dict[str, Any]) -> Listing:
    return pin(tools, {}).listing(SessionName("sb1"), 50)


def tool(name: str, schema: Any = RUN, description: str = "Run it.\nSlowly.") -> dict[str, Any]:
    return {"name": name, "inputSchema": schema, "description": description}


def test_tools_are_shown_as_a_model_calls_them() -> None:
    shape, text = spawned(SANDBOX, "sb1", listing(tool("exec")))
    assert "- sb1_exec(command: str, timeout_seconds: float = 60): Run it.\n" in text + "\n"
    assert shape["tools"] == [{"name": "sb1_exec", "arguments": "command: str, timeout_seconds: float = 60"}]
    assert shape["more_tools"] == 0


def test_both_forms_say_how_to_go_on_where_no_tools_appear() -> None:
    shape, text = spawned(SANDBOX, "sb1", listing(tool("exec")))
    for said in (shape["how_to_call"], text):
        assert 'call(session="sb1", tool="exec", arguments={...})' in said


def test_a_tool_that_is_listed_by_another_name_says_its_own() -> None:
    shape, text = spawned(SANDBOX, "sb1", listing(tool("my tool")))
    assert shape["tools"][0]["tool"] == "my tool" and "[tool=my tool]" in text


@pytest.mark.parametrize(("count", "keeps"), [(20, "arguments"), (60, "name"), (256, "name")])
def test_of_many_tools_less_is_said_and_the_rest_is_counted(count: int, keeps: str) -> None:
    shape, text = spawned(SANDBOX, "sb1", listing(*(tool(f"tool-{n}") for n in range(count))))
    assert all(keeps in item for item in shape["tools"])
    assert len(shape["tools"]) + shape["more_tools"] == count
    shown = text.count("\n- sb1_tool-")
    assert shown == count or text.endswith(f"\n- and {count - shown} more; see tools/list")


names = st.text("abcdefgh_-. é", min_size=1, max_size=128)
types = st.sampled_from(
    [
        {},
        {"type": "string"},
        {"type": ["integer", "null"]},
        {"enum": ["a", 1, None]},
        {"$ref": "#/$defs/X"},
        {"anyOf": 7},
    ]
) | st.fixed_dictionaries({"type": st.just("array"), "items": st.just({"type": "string"})})
schemas = st.fixed_dictionaries(
    {
        "type": st.just("object"),
        "properties": st.dictionaries(st.text(max_size=40), types, max_size=20),
        "required": st.lists(st.text(max_size=9), max_size=3),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.builds(tool, names, schemas, st.text(max_size=300)), max_size=40),
    st.lists(st.text(max_size=400), max_size=30),
)
def test_no_list_of_tools_and_no_warnings_make_it_long(tools: list[dict[str, Any]], warnings: list[str]) -> None:
    listed = listing(*tools)
    shape, text = spawned({**SANDBOX, "warnings": warnings, "network": ["a" * 60 + ".com"] * 6}, "sb1", listed)
    assert len(json.dumps(shape, indent=2)) < HOST_CHARS and len(text) < HOST_CHARS
    assert len(shape["tools"]) + shape["more_tools"] == len(listed.tools)
    validator: Any = Draft202012Validator(HIVE_TOOLS["spawn"].to_json()["outputSchema"])
    validator.validate(shape)


@pytest.mark.parametrize(("count", "tools", "failures"), [(2, 1, 0), (100, 20, 3), (1000, 60, 1000)])
def test_of_many_sandboxes_the_answer_is_as_short(count: int, tools: int, failures: int) -> None:
    sessions = [f"sb{number}" for number in range(5000, 5000 + count)]
    failed = [
        {"kind": f"kind{number % 3}", "message": "long " * 100, "retryable": False, "trainable": False}
        for number in range(failures)
    ]
    more = spawned_several(sessions, failed)
    listed = listing(*(tool(f"tool-{n}") for n in range(tools)))
    shape, text = spawned({**SANDBOX, "session": sessions[0], "network": ["a" * 60 + ".com"] * 6}, "sb1", listed, more)
    assert len(json.dumps(shape, indent=2)) < HOST_CHARS and len(text) < HOST_CHARS
    assert len(shape["sessions"]) + shape["more_sessions"] == count
    assert count > 100 or shape["sessions"] == sessions
    assert text.startswith(f"{count} sandboxes are ready, all alike: sb5000, sb5001")
    assert bool(shape["failed"]) == bool(failures) == (" failed (kind" in text)
    validator: Any = Draft202012Validator(HIVE_TOOLS["spawn"].to_json()["outputSchema"])
    validator.validate(shape)


@pytest.mark.parametrize(
    ("shape", "written"),
    [
        ({"type": "string"}, "x?: str"),
        ({"type": "boolean", "default": True}, "x: bool = True"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}, "x: int | None = None"),
        ({"type": "array", "items": {"type": "object"}}, "x?: list[dict]"),
        ({"enum": ["fast", "slow"], "default": "fast"}, 'x: "fast" | "slow" = "fast"'),
        ({"const": 3}, "x?: 3"),
        ({"type": "string", "default": "long " * 30}, 'x: str = "long long long long long lon…'),
        ({"enum": [f"choice {number}" for number in range(40)]}, "x?: str"),
        (True, "x?: any"),
        ({"type": 5}, "x?: any"),
    ],
)
def test_an_argument_is_written_with_its_type_and_default(shape: Any, written: str) -> None:
    assert arguments_of({"properties": {"x": shape}}) == written
