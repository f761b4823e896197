"""A client of the handshake era that never initialises again goes on with the hive that was started anew."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from mcp.client import Client

from ash_hub.app import Hive, open_hive
from ash_hub.settings import HubSettings

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

REQUEST_IDS = itertools.count()
TYPES = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
HELLO: dict[str, Any] = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "codex-mcp-client", "version": "1"},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@asynccontextmanager
async def hive_on(port: int, folder: Path) -> AsyncGenerator[Hive]:
    with anyio.fail_after(90):
        async with open_hive(HubSettings(port=port, state_dir=folder / "state", run_dir=folder / "run")) as hive:
            yield hive


async def ask(hive: Hive, session: str | None, method: str, **params: Any) -> httpx.Response:
    headers = TYPES if session is None else {**TYPES, "mcp-session-id": session}
    body: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
    if not method.startswith("notifications/"):
        body["id"] = next(REQUEST_IDS)
    async with httpx.AsyncClient(timeout=30) as http:
        return await http.post(hive.url, headers=headers, json=body)


def result(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return json.loads([line for line in answer.text.splitlines() if line.startswith("data: {")][-1][6:])["result"]


async def hears_of_changed_tools(hive: Hive, session: str) -> None:
    headers = {"accept": "text/event-stream", "mcp-session-id": session}
    with anyio.fail_after(10):
        async with httpx.AsyncClient() as http, http.stream("GET", hive.url, headers=headers) as stream:
            assert stream.status_code == 200
            async for line in stream.aiter_lines():
                if "notifications/tools/list_changed" in line:
                    return


async def test_a_session_outlives_its_hive(port: int, folder: Path) -> None:
    async with hive_on(port, folder) as hive:
        session = (await ask(hive, None, "initialize", **HELLO)).headers["mcp-session-id"]
        assert (await ask(hive, session, "notifications/initialized")).status_code == 202

    async with hive_on(port, folder) as hive:
        async with Client(hive.url) as other:
            spawned: Any = (await other.call_tool("spawn", {"recipe": "echo"})).structured_content
        name = f"{spawned['session']}_echo"
        # several at once, as a client sends them whose stream broke
        answers: list[httpx.Response] = []

        async def call() -> None:
            answers.append(await ask(hive, session, "tools/call", name=name, arguments={"text": "hello"}))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
        for answer in answers:
            assert answer.headers["ash-origin"] == "sandbox" and "hello" in str(result(answer))
        await hears_of_changed_tools(hive, session)
        listed = await ask(hive, session, "tools/list")
        assert listed.headers["mcp-session-id"] == session
        tools = {tool["name"]: tool for tool in result(listed)["tools"]}
        assert name in tools
        assert f"Tools of {spawned['session']}" in tools["call"]["description"]  # who the client is, is known
        async with httpx.AsyncClient(timeout=30) as http:
            assert (await http.delete(hive.url, headers={"mcp-session-id": session})).status_code == 200

    (folder / "state" / "hive.key").unlink()
    async with hive_on(port, folder) as hive:
        assert (await ask(hive, session, "tools/list")).status_code == 404
