"""Which tools a page of `tools/list` holds, where it ends, and what is kept of what was written."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_hub.face.expansion import Cursor, cut_page, listed_sandboxes
from ash_hub.face.tool_listing import Listings
from ash_hub.lifecycle.record import Record
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.spawning.toolsets import Toolset, pin
from ash_mcp.errors import ConfigError
from ash_mcp.types import DEFAULT_SCOPE, SandboxId, Scope, SessionName, State

MODERN, HANDSHAKE = "2026-07-28", "2025-11-25"


def toolset(*names: str, **more: Any) -> Toolset:
    return pin([{"name": name, "inputSchema": {"type": "object"}, **more} for name in names], {})


def sandbox(
    session: str,
    tools: Toolset,
    *,
    age: int = 0,
    state: State = State.READY,
    scope: Scope = DEFAULT_SCOPE,
    id: SandboxId | None = None,
) -> Sandbox:
    record = Record(
        owner="me",
        scope=scope,
        session=SessionName(session),
        recipe="r",
        maker="alone",
        created_at=1000.0 - age,
        start_by=1060.0,
        ready_at=1001.0 - age,
        expires_at=9e9,
        idle_seconds=None,
    )
    return Sandbox(id=id or SandboxId(f"id-{session}"), record=record, state=state, toolset=tools)


def listed(tools: bytes) -> list[str]:
    return [tool["name"] for tool in json.loads(b"[" + tools + b"]")]


def never(_: SandboxId) -> None:
    return None


def test_the_oldest_sandbox_comes_first_and_what_is_not_ready_does_not_come() -> None:
    tools = toolset("run")
    young, old = sandbox("b", tools), sandbox("a", tools, age=9)
    ended = sandbox("c", tools, state=State.GONE)
    assert listed_sandboxes([young, ended, old], never, most=None) == [old, young]


def test_of_two_sessions_of_one_name_the_older_is_shown() -> None:
    tools = toolset("run")
    old, young = sandbox("a", tools, age=9), sandbox("a", tools, id=SandboxId("other"), scope=Scope("s"))
    assert listed_sandboxes([young, old], never, most=None) == [old]


def test_without_a_most_everything_is_shown() -> None:
    many = [sandbox(f"s{number}", toolset("a", "b"), age=9 - number) for number in range(5)]
    assert listed_sandboxes(many, never, most=None) == many
    assert listed_sandboxes(many, never, most=4) == many[3:]


@given(counts=st.lists(st.integers(0, 5), max_size=6), room=st.integers(1, 60))
def test_pages_of_any_size_together_are_the_whole_list_once(counts: list[int], room: int) -> None:
    many = [
        sandbox(f"s{number}", toolset(*(f"t{n}" for n in range(count))), age=-number)
        for number, count in enumerate(counts)
    ]
    pages: list[list[bytes]] = []
    cursor: Cursor | None = Cursor(0.0, "", 0)
    while cursor is not None:
        page, cursor = cut_page(many, names_of, cursor, room)
        pages.append(page)
        assert page or cursor is None
        assert sum(len(tool) + 1 for tool in page) <= room or len(page) == 1
    assert [tool for page in pages for tool in page] == [name for box in many for name in names_of(box)]


def names_of(box: Sandbox) -> list[bytes]:
    assert box.toolset is not None
    return [f"{box.session}_{tool.name}".encode() for tool in box.toolset.tools]


def test_a_sandbox_that_ends_between_two_pages_hides_no_other() -> None:
    first, second, third = (sandbox(name, toolset("x", "y"), age=9 - n) for n, name in enumerate(("a", "b", "c")))
    page, cursor = cut_page([first, second, third], names_of, Cursor(0.0, "", 0), 12)
    assert page == [b"a_x", b"a_y", b"b_x"] and cursor is not None
    assert cut_page([first, third], names_of, cursor, 99) == ([b"c_x", b"c_y"], None)
    assert cut_page([first, second, third], names_of, cursor, 99)[0] == [b"b_y", b"c_x", b"c_y"]


@given(st.floats(allow_nan=False, allow_infinity=False), st.text("abc-0", max_size=40), st.integers(0, 300))
def test_a_cursor_is_read_as_it_was_written(created_at: float, sandbox_id: str, index: int) -> None:
    cursor = Cursor(created_at, sandbox_id, index)
    assert Cursor.parse(str(cursor)) == cursor


def encoded(body: str) -> str:
    return base64.urlsafe_b64encode(body.encode()).decode()


@pytest.mark.parametrize(
    "bad",
    [
        *("", "nonsense", "ä", "A" * 5000),
        *map(encoded, ("", "null", "[1,2]", '[1.0,"a",-1]', '[NaN,"a",1]', '["a","b",1]', '[1e999,"a",1]')),
        *map(encoded, ('[1.0,"a",true]', '[1.0,"a",1.5]', "[" * 150, '{"a":1,"b":2,"c":3}')),
    ],
)
def test_any_other_cursor_is_refused_with_what_to_do(bad: str) -> None:
    with pytest.raises(ConfigError, match="list again without one"):
        Cursor.parse(bad)


@given(st.text(max_size=80))
def test_no_text_makes_reading_a_cursor_fail_otherwise(text: str) -> None:
    try:
        Cursor.parse(text)
    except ConfigError:
        pass


def test_sandboxes_of_one_toolset_share_what_is_written() -> None:
    listings, tools = Listings([], name_limit=50), toolset("run", "stop")
    many = [sandbox(f"box{number}", tools, age=-number) for number in range(9)]
    page = listings.page(MODERN, many, None)
    assert listed(page.tools) == [f"box{number}_{name}" for number in range(9) for name in ("run", "stop")]
    assert 0 < listings.kept_bytes < len(page.tools) / 4


def test_what_is_kept_is_bounded_and_what_was_dropped_is_written_again() -> None:
    listings = Listings([], name_limit=50, max_kept_bytes=1000)
    many = [sandbox(f"s{number}", toolset(f"t{number}"), age=-number) for number in range(50)]
    for version in (MODERN, HANDSHAKE, MODERN):
        assert listed(listings.page(version, many, None).tools) == [f"s{n}_t{n}" for n in range(50)]
        assert listings.kept_bytes <= 1000


def test_a_session_name_is_put_in_once_and_only_where_names_begin() -> None:
    listings = Listings([], name_limit=50)
    tools = pin([{"name": "_", "description": '{"name":"_ \\u0000 \0', "inputSchema": {"type": "object"}}], {})
    (shown,) = json.loads(b"[" + listings.page(MODERN, [sandbox("a", tools)], None).tools + b"]")
    assert (shown["name"], shown["description"]) == ("a__", '{"name":"_ \\u0000 ')


def test_the_hives_own_tools_begin_the_first_page_and_no_other() -> None:
    own = {"name": "spawn", "inputSchema": {"type": "object"}}
    listings = Listings([own], name_limit=50, page_bytes=200)
    many = [sandbox(f"s{number}", toolset("run"), age=-number) for number in range(8)]
    names: list[str] = []
    cursor: str | None = None
    for _ in range(9):
        page = listings.page(HANDSHAKE, many, cursor)
        assert len(page.tools) <= 200
        names += listed(page.tools)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert names == ["spawn", *(f"s{number}_run" for number in range(8))]


@pytest.mark.parametrize("version", [MODERN, HANDSHAKE])
def test_a_tool_that_an_older_hive_pinned_and_a_client_would_refuse_hides_no_other(version: str) -> None:
    good = toolset("a", "b")
    broken = {"type": "object", "$schema": 5}
    bad = Toolset("x", (good.tools[0], type(good.tools[1])("b", None, "", broken, None, {})))
    assert listed(Listings([], name_limit=50).page(version, [sandbox("s", bad)], None).tools) == ["s_a"]
