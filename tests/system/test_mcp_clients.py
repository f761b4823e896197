"""The main job through MCP clients that are not ours, over HTTP and over the stdio bridge, in both eras."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import anyio
import fastmcp
import mcp_types as types
import pytest
from fastmcp.client.transports import StdioTransport
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.subscriptions import ToolsListChanged

from tests.hive_process import BRIDGE

pytestmark = pytest.mark.anyio

MODERN = "2026-07-28"
WAYS = [(way, era) for way in ("http", "stdio") for era in ("legacy", MODERN)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Seat:
    """A connected client, and what it was told unasked."""

    client: Client
    era: str
    news: list[Any] = field(default_factory=list[Any])
    logs: list[types.LoggingMessageNotificationParams] = field(
        default_factory=list[types.LoggingMessageNotificationParams]
    )
    came: anyio.Event = field(default_factory=anyio.Event)

    async def hear(self, message: Any) -> None:
        self.news.append(message)
        self.came.set()
        self.came = anyio.Event()

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        self.logs.append(params)

    async def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool that must succeed and return its structured content."""
        result = await self.client.call_tool(name, arguments)
        assert not result.is_error, result.content
        return result.structured_content or {}

    async def until_told(self, kind: type[Any]) -> None:
        with anyio.fail_after(30):
            while not any(isinstance(message, kind) for message in self.news):
                await self.came.wait()

    async def names(self) -> list[str]:
        return [tool.name for tool in (await self.client.list_tools()).tools]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: "-".join(way))
async def seat(request: pytest.FixtureRequest, hive_url: str, anyio_backend: str) -> AsyncIterator[Seat]:
    way, era = cast("tuple[str, str]", request.param)
    where: Any = hive_url if way == "http" else _stdio(hive_url)
    seat: Seat

    async def hear(message: Any) -> None:
        await seat.hear(message)

    async def log(params: types.LoggingMessageNotificationParams) -> None:
        await seat.log(params)

    mode = "legacy" if era == "legacy" else "auto"
    async with Client(where, mode=mode, message_handler=hear, logging_callback=log, log_level="info") as client:
        assert (client.protocol_version == MODERN) == (era == MODERN)
        seat = Seat(client, era)
        yield seat


def _stdio(url: str) -> AbstractAsyncContextManager[Any]:
    command, *arguments = BRIDGE
    return stdio_client(StdioServerParameters(command=command, args=arguments, env={**os.environ, "ASH_URL": url}))


@pytest.fixture(scope="module")
async def box(seat: Seat) -> AsyncIterator[str]:
    spawned = await seat.call("spawn", recipe="echo")
    yield spawned["session"]
    await seat.call("destroy", session=spawned["session"])


async def test_the_hive_says_what_it_is_and_how_it_works(seat: Seat) -> None:
    assert "spawn" in (seat.client.instructions or "")
    capabilities = seat.client.server_capabilities
    assert capabilities is not None and capabilities.tools is not None and capabilities.tools.list_changed


async def test_every_tool_of_the_hive_is_fit_for_a_host(seat: Seat) -> None:
    listed = (await seat.client.list_tools()).tools
    own = {tool.name: tool for tool in listed if "_" not in tool.name or tool.name == "read_resource"}
    assert own.keys() >= {"spawn", "destroy", "list", "extend", "call"}
    for tool in own.values():
        assert tool.title and tool.description and tool.annotations is not None, tool.name
        assert (tool.output_schema is None) == (tool.name == "call"), tool.name


async def test_a_sandbox_comes_with_progress_and_goes_with_an_explanation(seat: Seat) -> None:
    reported: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        assert message
        reported.append(progress)

    result = await seat.client.call_tool("spawn", {"recipe": "echo"}, progress_callback=note)
    spawned: dict[str, Any] = result.structured_content or {}
    session = spawned["session"]
    assert spawned["status"] == "ready"
    assert f"{session}_echo" in {tool["name"] for tool in spawned["tools"]}
    assert f"{session}_echo" in await seat.names()
    assert len(reported) >= 2 and reported == sorted(reported)

    assert (await seat.call("destroy", session=session))["destroyed"]
    assert f"{session}_echo" not in await seat.names()
    await _check_explained(seat, session, f"{session}_echo", {"text": "x"})
    await _check_explained(seat, session, "call", {"session": session, "tool": "echo", "arguments": {"text": "x"}})


async def _check_explained(seat: Seat, session: str, name: str, arguments: dict[str, Any]) -> None:
    result = await seat.client.call_tool(name, arguments)
    assert result.is_error
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    assert session in content.text and "destroy" in content.text and "spawn" in content.text
    failure = (result.meta or {})["ash/failure"]
    assert (failure["kind"], failure["data"]["reason"]) == ("sandbox_gone", "destroyed")


async def test_a_client_hears_that_its_tools_changed(seat: Seat) -> None:
    if seat.era == MODERN:
        async with seat.client.listen(tools_list_changed=True) as subscription:
            box = await seat.call("spawn", recipe="echo")
            with anyio.fail_after(30):
                event = await anext(aiter(subscription))
            assert isinstance(event, ToolsListChanged)
    else:
        seat.news.clear()
        box = await seat.call("spawn", recipe="echo")
        await seat.until_told(types.ToolListChangedNotification)
    await seat.call("destroy", session=box["session"])


async def test_a_sandboxs_tool_works_by_its_own_name_and_through_call(seat: Seat, box: str) -> None:
    text = 'a "quoted" line\nand ünïcode \u2028'
    assert await seat.call(f"{box}_echo", text=text) == {"text": text}
    assert await seat.call("call", session=box, tool="echo", arguments={"text": text}) == {"text": text}


async def test_progress_and_logs_of_a_sandboxs_tool_reach_the_caller(seat: Seat, box: str) -> None:
    steps: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        assert (total, message) == (3, f"step {int(progress)} of 3")
        steps.append(progress)

    seat.logs.clear()
    arguments = {"steps": 3, "seconds": 0.3}
    result = await seat.client.call_tool(f"{box}_slow", arguments, progress_callback=note)
    assert result.structured_content == {"steps": 3}
    assert steps == [1, 2, 3]
    assert any("taking 3 steps" in json.dumps(entry.data) for entry in seat.logs)


async def test_a_cancelled_call_stops_in_the_sandbox(seat: Seat, box: str) -> None:
    async def run(command: str) -> str:
        done = await seat.call("call", session=box, tool="ash_exec", arguments={"command": command})
        return done["stdout"].strip()

    async def cancel_when_started(scope: anyio.CancelScope) -> None:
        assert await run("mkfifo started; cat started") == "it runs"
        scope.cancel()

    long = "until test -p started; do sleep 0.01; done; echo $$ > pid; echo it runs > started; exec sleep 600"
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(cancel_when_started, group.cancel_scope)
            await seat.call("call", session=box, tool="ash_exec", arguments={"command": long})
        # a process that was killed may still wait for its parent to notice
        await run("while grep -q '^State:.[^Z]' /proc/$(cat pid)/status; do sleep 0.01; done; rm pid started")


async def test_files_are_read_as_resources(seat: Seat, box: str) -> None:
    command = {"command": "printf 'from inside' > note.txt"}
    await seat.call("call", session=box, tool="ash_exec", arguments=command)
    templates = (await seat.client.list_resource_templates()).resource_templates
    assert [template.uri_template for template in templates] == ["sandbox://{session}/{+path}"]
    uri = f"sandbox://{box}/note.txt"
    (content,) = (await seat.client.read_resource(uri)).contents
    assert isinstance(content, types.TextResourceContents) and content.text == "from inside"
    by_tool = await seat.call("read_resource", session=box, uri=uri)
    assert by_tool["contents"][0]["text"] == "from inside"


@pytest.mark.parametrize(("way", "era"), WAYS)
async def test_fastmcps_client_does_the_main_job(hive_url: str, way: str, era: str) -> None:
    command, *arguments = BRIDGE
    bridge = StdioTransport(command, arguments, env={**os.environ, "ASH_URL": hive_url}, keep_alive=False)
    where: Any = hive_url if way == "http" else bridge
    async with fastmcp.Client(where, mode=cast("Any", era)) as client:
        spawned = (await client.call_tool("spawn", {"recipe": "echo"})).structured_content or {}
        session = spawned["session"]
        assert f"{session}_echo" in {tool.name for tool in await client.list_tools()}
        said = await client.call_tool(f"{session}_echo", {"text": "hi"})
        assert said.structured_content == {"text": "hi"}
        said = await client.call_tool("call", {"session": session, "tool": "echo", "arguments": {"text": "hi"}})
        assert said.structured_content == {"text": "hi"}
        ended = (await client.call_tool("destroy", {"session": session})).structured_content or {}
        assert ended["destroyed"][0]["reason"] == "destroyed"
