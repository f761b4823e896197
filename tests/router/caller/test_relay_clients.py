"""Real MCP clients call real MCP servers through the relay, in both eras."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from fastmcp import Client

from tests.router.relay_parts import Rig
from tests.router.sandbox_parts import Box

pytestmark = pytest.mark.anyio

ERAS = ["legacy", "2026-07-28"]


@pytest.mark.parametrize("mode", ERAS)
async def test_a_namespaced_tool_runs_in_its_sandbox(rig: Rig, box: Box, mode: Any):
    async with Client(rig.url, mode=mode) as client:
        result = await client.call_tool("sb1_add", {"a": 2, "b": 3})
    assert result.data == 5
    assert box.ran == ["add"]


@pytest.mark.parametrize("mode", ERAS)
async def test_the_call_tool_runs_a_tool_of_the_session_that_it_names(rig: Rig, box: Box, mode: Any):
    async with Client(rig.url, mode=mode) as client:
        arguments = {"session": "sb1", "tool": "echo", "arguments": {"value": 2**70}}
        result = await client.call_tool("call", arguments)
    assert result.structured_content == {"value": 2**70}


@pytest.mark.parametrize("mode", ERAS)
async def test_a_shortened_tool_name_reaches_the_tool_that_it_stands_for(rig: Rig, box: Box, mode: Any):
    async with Client(rig.url, mode=mode) as client:
        result = await client.call_tool("sb1_plus", {"a": 2, "b": 5})
    assert result.data == 7


@pytest.mark.filterwarnings("ignore:The logging capability is deprecated")
@pytest.mark.parametrize("mode", ERAS)
async def test_progress_and_logs_stream_through(rig: Rig, box: Box, mode: Any):
    seen: list[float] = []
    logged: list[Any] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        seen.append(done)

    async def log(message: Any) -> None:
        logged.append(message)

    async with Client(rig.url, mode=mode, progress_handler=progress, log_handler=log) as client:
        if mode == "legacy":
            await client.set_logging_level("info")
        result = await client.call_tool("sb1_steps")
    assert result.data == "done"
    assert seen == [1, 2]
    if mode == "legacy":
        assert len(logged) == 1


@pytest.mark.parametrize("mode", ERAS)
async def test_giving_up_stops_the_work_in_the_sandbox(rig: Rig, box: Box, mode: Any):
    async with Client(rig.url, mode=mode) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "sb1_wait")
            with anyio.fail_after(10):
                await box.waiting.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(10):
            await box.cancelled.wait()
    assert len(rig.ledger) == 0


@pytest.mark.parametrize("mode", ERAS)
async def test_what_is_not_for_a_sandbox_goes_to_the_hub(rig: Rig, box: Box, mode: Any):
    async with Client(rig.url, mode=mode) as client:
        assert {tool.name for tool in await client.list_tools()} == {"call", "hello"}
        assert (await client.call_tool("hello")).data == "hello from the hub"
        missing = await client.call_tool("call", {"session": "sb9", "tool": "add"})
        assert "no session sb9" in str(missing.content)
        unknown = await client.call_tool("sb9_add", raise_on_error=False)
        assert unknown.is_error
    assert box.ran == []


@pytest.mark.parametrize("mode", ERAS)
async def test_another_principals_sandbox_is_not_reached(rig: Rig, box: Box, mode: Any):
    await rig.bind("theirs", box.socket, owner="somebody")
    async with Client(rig.url, mode=mode) as client:
        unknown = await client.call_tool("theirs_add", {"a": 1, "b": 1}, raise_on_error=False)
    assert unknown.is_error
    assert box.heads == []


async def test_many_calls_at_once_get_their_own_answers(rig: Rig, box: Box):
    answers: dict[int, Any] = {}

    async def add(client: Client[Any], number: int) -> None:
        answers[number] = (await client.call_tool("sb1_add", {"a": number, "b": number})).data

    async with Client(rig.url, mode="2026-07-28") as client, anyio.create_task_group() as group:
        for number in range(30):
            group.start_soon(add, client, number)
    assert answers == {number: 2 * number for number in range(30)}
