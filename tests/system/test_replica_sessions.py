"""Handshake-era sessions of two real hives on one Redis: each works through the other, until its own is killed."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import fastmcp
import httpx
import mcp_types as types
import pytest
from mcp.client import Client

from ash_mcp.wire import FAILURE_META_KEY
from ash_router.replicas.membership import MISSED_SECONDS
from ash_router.upstream.call_tokens import load_hive_key
from tests.balancer import alternating
from tests.redis_server import RedisServer, running_redis
from tests.system.crash_parts import Home, home

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy]

HELLO = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
JSON_TYPES = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Two:
    """Two hives on one Redis, with backends of their own."""

    redis: RedisServer
    homes: list[Home] = field(default_factory=list[Home])
    urls: list[str] = field(default_factory=list[str])

    @property
    def ports(self) -> list[int]:
        return [httpx.URL(url).port or 0 for url in self.urls]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    with running_redis(tmp_path) as server:
        environment = {"ASH_HUB_REDIS_URL": f"{server.url}/1", "ASH_HUB_LIMITS__STARTING": "1"}
        with home(**environment) as one, home(**environment) as other:
            key = one.folder / "state" / "hive.key"
            load_hive_key(key)
            (other.folder / "state").mkdir(mode=0o700)
            shutil.copy(key, other.folder / "state" / "hive.key")
            yield Two(server, [one, other], [one.start(), other.start()])


@dataclass
class Session:
    """A session by its id, of which each request may go to another hive."""

    http: httpx.AsyncClient
    id: str

    async def post(self, url: str, method: str, request_id: int | None, **params: Any) -> httpx.Response:
        body: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if request_id is not None:
            body["id"] = request_id
        return await self.http.post(url, json=body, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        return {**JSON_TYPES, "mcp-session-id": self.id}


@asynccontextmanager
async def opened(url: str) -> AsyncGenerator[Session]:
    async with httpx.AsyncClient(timeout=30) as http:
        hello = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": HELLO}
        answer = await http.post(url, json=hello, headers=JSON_TYPES)
        assert answer.status_code == 200
        session = Session(http, answer.headers["mcp-session-id"])
        assert (await session.post(url, "notifications/initialized", None)).status_code == 202
        yield session


def session_of(spawned: Any) -> str:
    return str(spawned["session"])


def result(answer: httpx.Response) -> dict[str, Any]:
    (data,) = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")][-1:]
    return json.loads(data)["result"]


async def test_a_session_of_one_hive_lists_and_hears_through_the_other(two: Two):
    here, there = two.urls
    async with opened(here) as session:
        answer = await session.post(there, "tools/list", 1)
        assert answer.headers["ash-origin"] == "hub"
        assert "spawn" in {tool["name"] for tool in result(answer)["tools"]}
        async with session.http.stream("GET", there, headers=session.headers) as stream:
            assert stream.status_code == 200
            async with Client(here, mode="legacy") as other:
                assert not (await other.call_tool("spawn", {"recipe": "echo"})).is_error
            with anyio.fail_after(10):
                async for line in stream.aiter_lines():
                    if "notifications/tools/list_changed" in line:
                        break
        names = {tool["name"] for tool in result(await session.post(there, "tools/list", 2))["tools"]}
        assert "sb1_echo" in names
        said = await session.post(there, "tools/call", 3, name="sb1_echo", arguments={"text": "hello"})
        assert said.headers["ash-origin"] == "sandbox" and "hello" in str(result(said))
        assert (await session.http.delete(there, headers=session.headers)).status_code == 200
        for url in two.urls:
            assert (await session.post(url, "tools/list", 4)).status_code == 404


async def test_a_hive_that_stops_answers_what_another_forwards_until_that_one_knows(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        inside = probe.getsockname()[1]
    with running_redis(tmp_path) as server, home(ASH_HUB_REDIS_URL=f"{server.url}/1") as one:
        shared = one.environment
        one.environment = {**shared, "ASH_HUB_ADVERTISE": f"127.0.0.1:{inside}"}
        here = one.start()
        one.environment = shared
        there = one.start()
        stopping = one.hubs.pop(0)
        async with opened(here) as session:
            assert (await session.post(there, "tools/list", 1)).status_code == 200
            began = listened = time.monotonic()
            stopping.terminate()
            while stopping.poll() is None:
                with suppress(OSError):
                    await (await anyio.connect_tcp("127.0.0.1", inside)).aclose()
                    listened = time.monotonic()
                answer = await session.post(there, "tools/list", 2)
                assert answer.status_code == 200, answer.text
                await anyio.sleep(0.01)
            assert listened - began > MISSED_SECONDS
            assert (await session.post(there, "tools/list", 3)).status_code == 200  # it was reopened
        stopping.communicate()


async def test_clients_work_through_a_balancer_that_is_not_sticky(two: Two):
    told = anyio.Event()

    async def hear(message: Any) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            told.set()

    async with alternating(two.ports) as port:
        url = f"http://127.0.0.1:{port}/mcp"
        async with Client(url, mode="legacy", message_handler=hear) as client:
            spawned = await client.call_tool("spawn", {"recipe": "echo"})
            name = session_of(spawned.structured_content)
            for number in range(6):
                said = await client.call_tool(f"{name}_echo", {"text": f"{number}"})
                assert f"{number}" in str(said.content) and not said.is_error
                assert f"{name}_echo" in {tool.name for tool in (await client.list_tools()).tools}
            with anyio.fail_after(5):
                await told.wait()
        async with fastmcp.Client(url, mode="legacy") as client:
            made = await client.call_tool("spawn", {"recipe": "echo"})
            name = session_of(made.structured_content)
            for number in range(6):
                assert f"{number}" in str((await client.call_tool(f"{name}_echo", {"text": f"{number}"})).content)
                assert "spawn" in {tool.name for tool in await client.list_tools()}


async def test_a_killed_owner_ends_calls_typed_and_the_other_takes_its_sessions_up_soon(two: Two):
    here, there = two.urls
    async with opened(here) as session:
        body = {
            "jsonrpc": "2.0",
            "id": 7,
            "method": "tools/call",
            "params": {"name": "spawn", "arguments": {"recipe": "echo"}, "_meta": {"progressToken": "p"}},
        }
        async with session.http.stream("POST", there, json=body, headers=session.headers) as stream:
            lines = stream.aiter_lines()
            async for line in lines:
                if "notifications/progress" in line:
                    break
            two.homes[0].kill_hub()
            with anyio.fail_after(5):
                last = [line async for line in lines if line.startswith("data: {")][-1]
        answer = json.loads(last.removeprefix("data: "))
        failure = answer["result"]["_meta"][FAILURE_META_KEY]
        assert (answer["id"], failure["kind"], failure["trainable"]) == (7, "stream_broken", False)
        assert answer["result"]["_meta"]["ash-nonce"] == stream.headers["ash-nonce"]
        began_at = time.monotonic()
        listed = await session.post(there, "tools/list", 8)
        assert time.monotonic() - began_at < 1
        assert "spawn" in {tool["name"] for tool in result(listed)["tools"]}
        assert listed.headers["mcp-session-id"] == session.id
        stranger = {**session.headers, "mcp-session-id": f"{session.id[:-1]}{'A' if session.id[-1] != 'A' else 'B'}"}
        gone = await session.http.post(there, json={**body, "method": "tools/list"}, headers=stranger)
        assert (gone.status_code, gone.json()["error"]["message"]) == (404, "Session not found")
