"""Two real hives on one Redis, one keeper and one state directory: they are one hive to whoever calls them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import fastmcp
import httpx
import mcp_types as types
import pytest
from fastmcp.client.elicitation import ElicitResult
from fastmcp.client.transports import StreamableHttpTransport
from mcp.client import Client

from ash_mcp import Hive
from ash_mcp.wire import FAILURE_META_KEY
from tests.balancer import alternating
from tests.redis_server import RedisServer
from tests.system.crash_parts import Home, gone_within, home

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.redis,
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:The .* capability is deprecated"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def place(redis: RedisServer) -> Iterator[Home]:
    with home(ASH_HUB_REDIS_URL=redis.url) as place:
        yield place


@pytest.fixture
def urls(place: Home) -> tuple[str, str]:
    return place.start(), place.start()


async def call(url: str, name: str, **arguments: Any) -> Any:
    async with Client(url) as client:
        return await client.call_tool(name, arguments)


async def sessions(url: str, **arguments: Any) -> dict[str, Any]:
    result = await call(url, "list", **arguments)
    return {sandbox["session"]: sandbox for sandbox in result.structured_content["sandboxes"]}


async def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    with anyio.fail_after(seconds):
        while not await true():
            await anyio.sleep(0.02)


@asynccontextmanager
async def connected(url: str, mode: Any) -> AsyncGenerator[Client]:
    async with Client(url, mode=mode, cache=None) as client:
        yield client


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_what_one_spawns_all_list_call_and_end(urls: tuple[str, str], mode: str) -> None:
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(connected(url, mode)) for url in urls]
        made: Any = (await a.call_tool("spawn", {"recipe": "echo", "session": "mine"})).structured_content
        assert "mine_echo" in {tool.name for tool in (await b.list_tools()).tools}
        for client in (a, b):
            said = await client.call_tool("mine_echo", {"text": "hi"})
            assert said.structured_content == {"text": "hi"}
            said = await client.call_tool("call", {"session": "mine", "tool": "echo", "arguments": {"text": "hi"}})
            assert said.structured_content == {"text": "hi"}
        extended: Any = (await b.call_tool("extend", {"session": "mine", "ttl_seconds": 1000})).structured_content
        assert (await sessions(urls[0]))["mine"]["expires_at"] == extended["expires_at"]
        assert (await b.call_tool("destroy", {"session": "mine"})).structured_content["destroyed"]
        assert "mine_echo" not in {tool.name for tool in (await a.list_tools()).tools}
        gone = await a.call_tool("mine_echo", {"text": "hi"})
        assert gone.is_error and (gone.meta or {})[FAILURE_META_KEY]["data"]["reason"] == "destroyed"
        ended = (await sessions(urls[0], include_ended=True))["mine"]
        assert (ended["sandbox_id"], ended["reason"]) == (made["sandbox_id"], "destroyed")


async def test_a_uuid_of_the_seed_is_good_on_every_replica(urls: tuple[str, str]) -> None:
    first, second = (url.removesuffix("/mcp") for url in urls)
    async with httpx.AsyncClient(timeout=30) as http:
        made = (await http.post(f"{first}/spawn", json={"image": "timemagic/rl-mcp:general-1.7"})).json()
        by_uuid = {"X-Session-ID": made["uuid"]}
        for url in urls:
            async with fastmcp.Client(StreamableHttpTransport(url, headers=by_uuid)) as client:
                assert "terminal-controller_execute_command" in {tool.name for tool in await client.list_tools()}
        ended = await http.delete(f"{second}/deprovision/{made['uuid']}")
        assert (ended.status_code, ended.json()) == (200, {"message": "Deprovisioned", "uuid": made["uuid"]})
        assert (await http.delete(f"{first}/deprovision/{made['uuid']}")).json() == {"error": "UUID not found"}


async def test_one_that_starts_later_knows_why_a_sandbox_ended(place: Home) -> None:
    first = place.start()
    await call(first, "spawn", recipe="echo", session="mine")
    await call(first, "destroy", session="mine")
    later = place.start()
    gone = await call(later, "mine_echo", text="hi")
    assert gone.is_error and (gone.meta or {})[FAILURE_META_KEY]["data"]["reason"] == "destroyed"
    assert (await sessions(later, include_ended=True))["mine"]["reason"] == "destroyed"


async def test_a_change_through_one_is_heard_by_connections_to_the_other(urls: tuple[str, str]) -> None:
    heard: list[Any] = []

    async def hear(message: Any) -> None:
        heard.append(message)

    async def told() -> bool:
        return any(isinstance(message, types.ToolListChangedNotification) for message in heard)

    async with Client(urls[1], mode="legacy", message_handler=hear) as old, Client(urls[1]) as new:
        await old.list_tools()
        async with new.listen(tools_list_changed=True) as subscription:
            await call(urls[0], "spawn", recipe="echo")
            with anyio.fail_after(20):
                await anext(aiter(subscription))
            await until(told)


async def test_one_key_is_one_sandbox_through_all(urls: tuple[str, str]) -> None:
    made: list[str] = []

    async def spawn(url: str) -> None:
        async with Hive(url) as hive:
            made.append((await hive.spawn("echo", idempotency_key="once")).id)

    async with anyio.create_task_group() as group:
        for url in (*urls, *urls):
            group.start_soon(spawn, url)
    assert len(made) == 4 and len(set(made)) == 1


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_a_client_that_reaches_another_replica_with_each_request_sees_one_hive(
    urls: tuple[str, str], mode: str
) -> None:
    ports = [urlsplit(url).port or 0 for url in urls]
    async with alternating(ports) as port, connected(f"http://127.0.0.1:{port}/mcp", mode) as client:
        for number in range(3):
            session = f"box{number}"
            spawned = await client.call_tool("spawn", {"recipe": "echo", "session": session})
            assert not spawned.is_error, spawned.content
            for _ in range(4):
                said = await client.call_tool(f"{session}_echo", {"text": session})
                assert said.structured_content == {"text": session}
                assert f"{session}_echo" in {tool.name for tool in (await client.list_tools()).tools}
        assert len((await client.call_tool("destroy", {"session": "*"})).structured_content["destroyed"]) == 3


async def test_a_replica_that_is_killed_takes_no_sandbox_with_it_and_the_reaper_goes_on(
    place: Home, urls: tuple[str, str]
) -> None:
    await call(urls[0], "spawn", recipe="echo", session="stays")
    await call(urls[0], "spawn", recipe="echo", session="short", ttl_seconds=15)
    place.hubs.reverse()
    place.kill_hub()  # the first, which reaps
    assert set(await sessions(urls[1])) == {"stays", "short"}
    said = await call(urls[1], "stays_echo", text="still")
    assert said.structured_content == {"text": "still"}

    async def expired() -> bool:
        return (await sessions(urls[1], include_ended=True))["short"]["reason"] == "ttl_expired"

    await until(expired, 40)
    third = place.start()
    assert set(await sessions(third)) == {"stays"}


async def test_a_replica_killed_while_it_spawns_leaves_nothing(place: Home, urls: tuple[str, str]) -> None:
    async def spawn() -> None:
        with anyio.move_on_after(20):
            try:
                await call(urls[1], "spawn", recipe="general", session="half", idempotency_key="k")
            except* Exception:
                pass  # its replica is killed

    async def half_made() -> bool:
        return "half" in await sessions(urls[0])

    async with anyio.create_task_group() as group:
        group.start_soon(spawn)
        await until(half_made, 20)
        place.kill_hub()
        began = time.monotonic()

        async def removed() -> bool:
            return not await sessions(urls[0])

        await until(removed, 30)
        assert time.monotonic() - began < 20
        group.cancel_scope.cancel()
    again = await call(urls[0], "spawn", recipe="echo", session="half", idempotency_key="k")
    assert not again.is_error, again.content


async def test_the_last_replica_that_stops_ends_the_sandboxes_and_nothing_is_left(
    place: Home, urls: tuple[str, str]
) -> None:
    await call(urls[0], "spawn", recipe="echo", session="box")
    assert place.stop_hub() == 0
    assert set(await sessions(urls[0])) == {"box"}
    assert place.stop_hub() == 0
    assert gone_within(30, lambda: not place.remains()), place.remains()


async def test_replicas_that_stop_together_leave_nothing(place: Home, urls: tuple[str, str]) -> None:
    await call(urls[0], "spawn", recipe="echo", session="box")
    for hub in place.hubs:
        hub.terminate()
    for hub in place.hubs:
        hub.communicate(timeout=30)
    assert gone_within(30, lambda: not place.remains()), place.remains()


async def test_a_legacy_session_outlives_the_death_of_its_replica(place: Home, urls: tuple[str, str]) -> None:
    headers = {"accept": "application/json, text/event-stream"}
    hello: dict[str, Any] = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
    }
    async with httpx.AsyncClient(headers=headers, timeout=10) as http:
        answer = await http.post(urls[1], json=hello)
        session = {"mcp-session-id": answer.headers["mcp-session-id"]}
        ask: dict[str, Any] = {"jsonrpc": "2.0", "id": 2, "method": "tools/list", "params": {}}
        assert (await http.post(urls[0], json=ask, headers=session)).status_code == 200
        place.kill_hub()
        began = time.monotonic()
        assert "spawn" in (await http.post(urls[0], json=ask, headers=session)).text
        assert time.monotonic() - began < 1


async def answer(text: str, kind: Any, params: Any, context: Any) -> Any:
    return ElicitResult(action="accept", content={"value": text.upper()})


async def think(messages: Any, params: Any, context: Any) -> str:
    return "four"


async def test_what_a_sandbox_asks_is_answered_through_whichever_replica_comes_next(
    redis: RedisServer, tmp_path: Path
) -> None:
    recipe = tmp_path / "asker"
    recipe.mkdir()
    text = 'name = "asker"\ndescription = "Asks."\nserver = { python = "asking:server" }\n'
    (recipe / "recipe.toml").write_text(text)
    shutil.copy(Path(__file__).with_name("asking.py"), recipe)
    with home(ASH_HUB_REDIS_URL=redis.url, ASH_HUB_RECIPE_DIRS=json.dumps([str(tmp_path)])) as place:
        ports = [urlsplit(place.start()).port or 0 for _ in range(2)]
        async with alternating(ports) as port:
            url = f"http://127.0.0.1:{port}/mcp"
            asked: dict[str, Any] = {"elicitation_handler": answer, "sampling_handler": think}
            async with fastmcp.Client(url, mode="legacy", **asked) as old:
                await old.call_tool("spawn", {"recipe": "asker", "session": "box"})
                for _ in range(4):
                    assert (await old.call_tool("box_greet")).data == "hello WHO ARE YOU?"
                    assert (await old.call_tool("box_think")).data == "four"
            async with fastmcp.Client(url, mode="2026-07-28", **asked) as new:
                for _ in range(4):  # each answer reaches the other replica, which takes up the state of the one before
                    assert (await new.call_tool("box_twice")).data == "FIRST?, then SECOND?"
                by_call: dict[str, Any] = {"session": "box", "tool": "twice", "arguments": {}}
                assert "FIRST?, then SECOND?" in str((await new.call_tool("call", by_call)).content)
