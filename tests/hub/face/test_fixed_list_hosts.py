"""Hosts that do not follow changes read in `call`'s description what they can call."""

from __future__ import annotations

import json

import pytest

from ash_hub.face.fixed_list_hosts import FIXED_LIST_HOSTS, MAX_NOTE_CHARS, fixed_list_host, note_of_tools
from ash_hub.face.hive_tools import listed_hive_tools
from ash_hub.face.tool_listing import Listings
from ash_hub.lifecycle.record import Record
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.spawning.toolsets import Toolset, pin
from ash_mcp.types import DEFAULT_SCOPE, SandboxId, SessionName, State

RUN = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


def toolset(*names: str) -> Toolset:
    return pin([{"name": name, "inputSchema": RUN} for name in names], {})


def sandbox(session: str, tools: Toolset) -> Sandbox:
    record = Record(
        owner="me",
        scope=DEFAULT_SCOPE,
        session=SessionName(session),
        recipe="r",
        maker="alone",
        created_at=1.0,
        start_by=2.0,
        ready_at=1.5,
        expires_at=9e9,
        idle_seconds=None,
    )
    return Sandbox(id=SandboxId(f"id-{session}"), record=record, state=State.READY, toolset=tools)


@pytest.mark.parametrize("client", ["codex-mcp-client", "qwen-cli-mcp-client-ash", "Cline", "continue-cli-client"])
def test_a_host_is_known_by_its_client_info(client: str) -> None:
    host = fixed_list_host(client)
    assert host is not None and host.version and host.reason


@pytest.mark.parametrize("client", ["claude-code", "gemini-cli-mcp-client-ash", "opencode", "mcp", "", "x" * 9999])
def test_others_are_left_alone(client: str) -> None:
    assert fixed_list_host(client) is None


def test_no_two_rows_are_of_one_host() -> None:
    assert len({host.client for host in FIXED_LIST_HOSTS}) == len(FIXED_LIST_HOSTS)


def test_the_note_names_tools_as_call_takes_them_and_those_of_one_toolset_once() -> None:
    shared = toolset("run", "my tool")
    note = note_of_tools([sandbox("a", toolset("stop")), sandbox("b", shared), sandbox("c", shared)])
    assert note == (" Tools of c, b: run(command: str), my tool(command: str). Tools of a: stop(command: str).")
    assert note_of_tools([]) == ""


@pytest.mark.parametrize(("tools", "boxes"), [(30, 1), (250, 1), (20, 60)])
def test_the_note_is_bounded_and_begins_with_the_newest(tools: int, boxes: int) -> None:
    many = [
        sandbox(f"box{number}", toolset(*(f"a-rather-long-name-{number}-{n}" for n in range(tools))))
        for number in range(boxes)
    ]
    note = note_of_tools(many)
    assert note.startswith(f" Tools of box{boxes - 1}: a-rather") and len(note) <= MAX_NOTE_CHARS


def test_the_note_is_listed_behind_the_description_for_that_request_alone() -> None:
    listings = Listings(listed_hive_tools(""), name_limit=50)
    plain, noted, again = (
        json.loads(b"[" + listings.page("2025-11-25", [], None, notes).tools + b"]")
        for notes in ({}, {"call": " Tools of a: x()."}, {"call": ""})
    )
    assert plain == again
    for before, after in zip(plain, noted, strict=True):
        more = " Tools of a: x()." if before["name"] == "call" else ""
        assert after == {**before, "description": before["description"] + more}
