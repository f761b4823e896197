"""Streams of relayed calls that their client hears on after it, or the sandbox, has let go of the first connection."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from fastmcp import Client, Context, FastMCP
from fastmcp.server.event_store import EventStore

from tests.router.relay_parts import Rig, legacy
from tests.router.sandbox_parts import open_box
from tests.router.sessions.test_relay_sessions import message, session

pytestmark = pytest.mark.anyio


def patient_server(go_on: asyncio.Event) -> FastMCP:
    server = FastMCP("patient")

    @server.tool
    async def later(ctx: Context) -> str:
        await ctx.report_progress(1, 2)
        await ctx.close_sse_stream()
        await go_on.wait()
        return "at last"

    return server


@pytest.mark.parametrize("door", ["/mcp", "/s/sb1/mcp"])
async def test_a_stream_that_the_sandbox_let_go_of_is_heard_on(rig: Rig, door: str):
    go_on, seen = asyncio.Event(), asyncio.Event()
    server = patient_server(go_on)

    async def progress(done: float, total: float | None, words: str | None) -> None:
        seen.set()

    async with open_box(rig.directory, "patient", server, event_store=EventStore(), retry_interval=10) as box:
        await rig.bind("sb1", box.socket)
        tool = "later" if door.startswith("/s") else "sb1_later"
        async with Client(rig.url.replace("/mcp", door), mode="legacy", progress_handler=progress) as client:
            answers: list[Any] = []

            async def call() -> None:
                answers.append((await client.call_tool(tool)).data)

            with anyio.fail_after(10):
                async with anyio.create_task_group() as group:
                    group.start_soon(call)
                    await seen.wait()
                    while not any("last-event-id" in head for head in box.posted("GET")):
                        await asyncio.sleep(0.01)
                    go_on.set()
            assert answers == ["at last"]
    assert all("." not in head["last-event-id"] for head in box.posted("GET") if "last-event-id" in head)


async def test_another_principal_or_an_event_of_nobodys_leads_to_no_sandbox(rig: Rig):
    go_on = asyncio.Event()
    go_on.set()
    async with open_box(rig.directory, "patient", patient_server(go_on), event_store=EventStore()) as box:
        await rig.bind("sb1", box.socket)
        async with session(rig) as (wire, session_id):
            await wire.send(legacy(message("tools/call", {"name": "sb1_later"}, 3), session_id))
            _, _, body = await wire.answer()
            event_id = next(line[4:] for line in body.splitlines() if line.startswith(b"id: ")).decode()
            assert event_id.startswith("sbx-")
            before = len(box.posted("GET"))
            for said, more in ((event_id, "x-principal: ann\r\n"), ("sbx-x.1.7", ""), ("7", "")):
                async with rig.connect() as other:
                    await other.send(legacy(b"", session_id, method="GET", more=f"last-event-id: {said}\r\n{more}"))
                    assert (await other.head())[1]["ash-origin"] == "hub"
            assert len(box.posted("GET")) == before
            await wire.send(legacy(b"", session_id, method="GET", more=f"last-event-id: {event_id}\r\n"))
            status, headers = await wire.head()
            assert (status, headers["ash-origin"], headers["mcp-session-id"]) == (200, "sandbox", session_id)
