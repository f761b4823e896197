"""Stateless calls to a server without a runner borrow sessions: one call at a time, and of one caller alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_mcp.types import Endpoint
from ash_router.bounds.limits import RelayLimits
from ash_router.sessions.handshakes import (
    _MAX_LENT,  # pyright: ignore[reportPrivateUsage]
    _MAX_PARTING,  # pyright: ignore[reportPrivateUsage]
    Handshakes,
)
from ash_router.sessions.session_map import UpstreamSession
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.pool import ConnectionPool
from tests.image_server import Image, running_image
from tests.router.relay_parts import Rig, Wire, modern, open_rig, route_to, tool_call

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def bound(rig: Rig, image: Image) -> str:
    """Bind the route to the server and return the sandbox's id."""
    endpoint = Endpoint(host="127.0.0.1", port=image.port, server_path="/serve")
    route = replace(route_to(Path("x"), "own"), endpoint=endpoint)
    await rig.routes.bind(route)
    return route.sandbox_id


async def call(rig: Rig, name: str, arguments: dict[str, Any], *, by: str = "me") -> bytes:
    async with rig.connect() as wire:
        await wire.send(modern(name, tool_call(name, arguments), more=f"x-principal: {by}\r\n"))
        status, headers, body = await wire.answer()
        assert (status, headers["ash-origin"]) == (200, "sandbox"), body
        assert "mcp-session-id" not in headers and b'"resultType":"complete"' in body
        return body


async def test_no_caller_gets_anothers_session(tmp_path: Path) -> None:
    async with running_image() as image, open_rig(tmp_path) as rig:
        sandbox_id = await bound(rig, image)
        rig.admission.bound["guest"] = sandbox_id  # type: ignore[assignment]
        for by in ("me", "guest", "me", "guest"):
            assert b'{"result":3}' in await call(rig, "own_add", {"a": 1, "b": 2}, by=by)
        first, second, third, fourth = image.sessions
        assert (first, second) == (third, fourth) and first != second


async def test_calls_at_once_with_one_request_id_have_a_session_each_and_few_are_kept(tmp_path: Path) -> None:
    many = _MAX_LENT + 3
    async with running_image() as image, open_rig(tmp_path) as rig:
        await bound(rig, image)
        async with anyio.create_task_group() as group:
            for _ in range(many):
                group.start_soon(call, rig, "own_meet", {"others": many})
        assert len(set(image.sessions)) == many
        with anyio.fail_after(10):
            while sum(head[":method"] == "DELETE" for head in image.heads) < 3:
                await anyio.sleep(0.01)
        opened = sum(head[":method"] == "POST" and "mcp-session-id" not in head for head in image.heads)
        await call(rig, "own_add", {"a": 1, "b": 2})
        assert image.sessions[-1] in image.sessions[:-1]
        assert sum(head[":method"] == "POST" and "mcp-session-id" not in head for head in image.heads) == opened


async def test_a_sandbox_that_has_ended_leaves_no_session_behind(tmp_path: Path) -> None:
    async with running_image() as image, open_rig(tmp_path) as rig:
        sandbox_id = await bound(rig, image)
        await call(rig, "own_add", {"a": 1, "b": 2})
        rig.relay.forget(sandbox_id)  # type: ignore[arg-type]
        await call(rig, "own_add", {"a": 1, "b": 2})
        assert len(set(image.sessions)) == 2


async def test_a_call_that_outlives_its_sandbox_leaves_no_session_behind(tmp_path: Path) -> None:
    parts = handshakes_of(tmp_path)
    lent = parts.handshakes._lent  # pyright: ignore[reportPrivateUsage]
    for usable in (True, False):
        assert parts.handshakes.borrow_idle("me", parts.upstream.route) is None
        parts.handshakes.forget(parts.upstream.route.sandbox_id)
        parts.handshakes.give_back("me", parts.upstream, usable=usable)
        assert not lent and not parts.spawned


async def test_few_sessions_of_a_sandbox_that_ends_none_wait_for_it(tmp_path: Path) -> None:
    parts = handshakes_of(tmp_path)
    for _ in range(2):
        parts.handshakes.borrow_idle("me", parts.upstream.route)
        for _ in range(_MAX_PARTING + 9):
            parts.handshakes.give_back("me", parts.upstream, usable=False)
        assert len(parts.spawned) == _MAX_PARTING
        while parts.spawned:
            await parts.spawned.pop()


@dataclass
class Parts:
    handshakes: Handshakes
    upstream: UpstreamSession
    spawned: list[Coroutine[Any, Any, None]]


def handshakes_of(folder: Path) -> Parts:
    """Return what ends sessions only when the test says so, and a session at a place where nobody listens."""
    spawned, limits = list[Coroutine[Any, Any, None]](), RelayLimits()
    pool = ConnectionPool(
        connect_timeout_seconds=1, max_idle=0, idle_seconds=1, max_head_bytes=1024, max_headers=10, silent_seconds=1
    )
    handshakes = Handshakes(pool, CallTokens(Ed25519PrivateKey.generate()), limits, spawned.append)
    return Parts(handshakes, UpstreamSession(route_to(folder / "nobody"), b"s1", b"2025-11-25"), spawned)


@pytest.mark.parametrize("json_response", [False, True], ids=["stream", "json"])
@pytest.mark.parametrize("stateless_http", [False, True], ids=["sessions", "no sessions"])
async def test_a_caller_that_waits_hears_that_its_call_goes_on_and_gets_a_result_of_its_era(
    tmp_path: Path, json_response: bool, stateless_http: bool
) -> None:
    limits = RelayLimits(quiet_seconds=0.1)
    ways = {"json_response": json_response, "stateless_http": stateless_http}
    async with running_image(**ways) as image, open_rig(tmp_path, limits=limits) as rig:
        await bound(rig, image)
        async with rig.connect() as wire:
            await wire.send(modern("own_meet", tool_call("own_meet", {"others": 2})))
            assert (await wire.head())[0] == 200
            begun = await wire.chunk()
            assert begun.startswith(b":"), "a comment of the hive's own, before the server has answered"
            await call(rig, "own_meet", {"others": 2})
            rest = b"".join([chunk async for chunk in chunks(wire)])
        assert rest.count(b'"result":{"resultType":"complete",') == 1 and rest.endswith((b"\n\n", b"\r\n\r\n"))


async def chunks(wire: Wire) -> AsyncGenerator[bytes]:
    while data := await wire.chunk():
        yield data
