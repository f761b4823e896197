"""A sandbox that this process does not know yet is looked up in the store before anybody says that there is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.client import Client

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import SandboxId
from ash_router.bounds.limits import RelayLimits
from ash_router.routes import Route, Routes
from ash_router.store.base import RouteChanges
from ash_router.store.memory import MemoryStore
from tests.router.relay_parts import JSON_TYPE, Rig, modern, open_rig, route_to, tool_call
from tests.router.sandbox_parts import Box

pytestmark = pytest.mark.anyio

ADD = {"a": 1, "b": 2}
LIMITS = RelayLimits(lookup_timeout_seconds=60)
TIGHT = RelayLimits(lookup_timeout_seconds=0.1)


class SharedStore(MemoryStore):
    """A store that counts what it is asked, and may be slow or away."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.away = False

    async def route_changes(self, since: str | None) -> RouteChanges:
        self.looks += 1
        await self.gate.wait()
        if self.away:
            raise ConnectFailed("the store is away")
        return await super().route_changes(since)


@pytest.fixture
async def store() -> SharedStore:
    return SharedStore()


@pytest.fixture
async def rig(request: pytest.FixtureRequest, tmp_path: Path, store: SharedStore) -> AsyncGenerator[Rig]:
    async with open_rig(tmp_path, shared=store, limits=getattr(request, "param", LIMITS)) as rig:
        yield rig


@pytest.fixture
async def elsewhere(store: SharedStore, box: Box) -> Route:
    """A sandbox that another process bound, as `sb7`; `box` itself is bound here, as `sb1`."""
    route = route_to(box.socket, "sb7")
    await Routes(store).bind(route)
    return route


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sb7_add", ADD),
        ("call", {"session": "sb7", "tool": "add", "arguments": ADD}),
        ("call", {"sandbox": "sb7", "tool": "add", "arguments": ADD}),
        ("call", {"sandbox": "sb7", "session": None, "tool": "add", "arguments": ADD}),
        ("call", {"sandbox": "sb7", "session": "sb7", "tool": "add", "arguments": ADD}),
    ],
)
async def test_a_call_reaches_a_sandbox_that_another_process_made(
    rig: Rig, box: Box, elsewhere: Route, store: SharedStore, mode: Any, name: str, arguments: dict[str, Any]
):
    async with Client(rig.url, mode=mode) as client:
        for _ in range(2):
            result = await client.call_tool(name, arguments)
            assert result.structured_content == {"result": 3}
    assert (box.ran, store.looks) == (["add", "add"], 1)


def door(name: str) -> list[bytes]:
    body = tool_call("add", ADD)
    rest = f"host: hub\r\n{JSON_TYPE}mcp-protocol-version: 2026-07-28\r\nmcp-method: tools/call\r\nmcp-name: add\r\n"
    rest += f"content-length: {len(body)}\r\n"
    by_path = f"POST /s/{name}/mcp HTTP/1.1\r\n{rest}\r\n"
    by_header = f"POST /mcp HTTP/1.1\r\n{rest}x-session-id: {name}\r\n\r\n"
    return [by_path.encode() + body, by_header.encode() + body]


async def test_direct_doors_lead_to_a_sandbox_that_another_process_made(
    rig: Rig, box: Box, elsewhere: Route, store: SharedStore
):
    for name in ("sb7", elsewhere.sandbox_id):
        for request in door(name):
            rig.routes._leave(SandboxId(elsewhere.sandbox_id))  # type: ignore[reportPrivateUsage]
            rig.routes._version = None  # type: ignore[reportPrivateUsage]
            async with rig.connect() as wire:
                await wire.send(request)
                status, headers, _ = await wire.answer()
                assert (status, headers["ash-origin"]) == (200, "sandbox")
    assert (box.ran, store.looks) == (["add"] * 4, 4)


async def test_a_body_that_comes_during_the_look_is_whole(rig: Rig, box: Box, elsewhere: Route, store: SharedStore):
    store.gate.clear()
    value = "x" * 200_000
    async with rig.connect() as wire:
        wire.writer.write(modern("sb7_echo", tool_call("sb7_echo", {"value": value})))
        with anyio.fail_after(5):
            while not store.looks:
                await asyncio.sleep(0)
        store.gate.set()
        status, headers, body = await wire.answer()
    assert (status, headers["ash-origin"]) == (200, "sandbox")
    assert value.encode() in body


async def test_a_name_that_nobody_has_is_not_found_after_one_look_each(rig: Rig, box: Box, store: SharedStore):
    async with rig.connect() as wire:
        for number in range(1, 4):
            await wire.send(modern("sb9_add"))
            status, headers, _ = await wire.answer()
            assert headers["ash-origin"] == "hub"
            assert store.looks == number
    for request in door("sb9"):
        async with rig.connect() as wire:
            await wire.send(request)
            status, _, body = await wire.answer()
            assert (status, json.loads(body)["error"]["message"]) == (404, "route not found")
    assert store.looks == 5


@pytest.mark.parametrize("name", ["sb1_add", "hello", "read_resource", "list", "spawn_x", "Sb9_add"])
async def test_what_is_known_or_nobodys_name_costs_no_look(rig: Rig, box: Box, store: SharedStore, name: str):
    async with rig.connect() as wire:
        await wire.send(modern(name))
        await wire.answer()
    assert store.looks == 0


async def test_a_hundred_that_ask_at_once_share_two_looks(rig: Rig, box: Box, elsewhere: Route, store: SharedStore):
    store.gate.clear()
    asked = modern("sb7_add", tool_call("sb7_add", ADD))

    async def ask() -> None:
        async with rig.connect() as wire:
            await wire.send(asked)
            assert (await wire.answer())[1]["ash-origin"] == "sandbox"

    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(ask)
        with anyio.fail_after(5):
            while len(rig.server.server_state.connections) < 100:
                await asyncio.sleep(0)
        store.gate.set()
    assert store.looks <= 2
    assert len(box.ran) == 100


@pytest.mark.parametrize(("rig", "how"), [(LIMITS, "away"), (TIGHT, "slow")], indirect=["rig"])
async def test_a_store_that_does_not_answer_delays_nobody_for_long(
    rig: Rig, box: Box, elsewhere: Route, store: SharedStore, how: str
):
    store.away = how == "away"
    if how == "slow":
        store.gate.clear()
    for request in door("sb7"):
        async with rig.connect() as wire:
            await wire.send(request)
            status, headers, body = await wire.answer()
        error = json.loads(body)["error"]
        assert (status, error["kind"], error["retryable"]) == (503, "connect_failed", True)
        assert headers["ash-origin"] == "hub"
    async with rig.connect() as wire:
        await wire.send(modern("sb7_add"))
        assert (await wire.answer())[1]["ash-origin"] == "hub"
        await wire.send(modern("sb1_add", tool_call("sb1_add", ADD)))
        assert (await wire.answer())[1]["ash-origin"] == "sandbox"


async def test_a_caller_who_leaves_during_the_look_takes_it_from_nobody_else(
    rig: Rig, box: Box, elsewhere: Route, store: SharedStore
):
    store.gate.clear()
    asked = modern("sb7_add", tool_call("sb7_add", ADD))
    async with rig.connect() as stays:
        async with rig.connect() as leaves:
            await leaves.send(asked)
            with anyio.fail_after(5):
                while not store.looks:
                    await asyncio.sleep(0)
            await stays.send(asked)
        with anyio.fail_after(5):
            while len(rig.server.server_state.connections) > 1:
                await asyncio.sleep(0)
        store.gate.set()
        assert (await stays.answer())[1]["ash-origin"] == "sandbox"
    assert box.ran == ["add"]


async def test_with_a_store_of_its_own_it_looks_nowhere(tmp_path: Path):
    async with open_rig(tmp_path) as alone, alone.connect() as wire:
        await wire.send(modern("sb7_add"))
        assert (await wire.answer())[1]["ash-origin"] == "hub"
        assert not alone.relay.looks_up
