"""What the bridge does when the hive dies, is not there, or comes back elsewhere."""

from __future__ import annotations

import anyio
import pytest

from tests.ash_mcp.bridge.bridge_parts import SmallServer, bridged, found_at

pytestmark = pytest.mark.anyio


async def _until(event: object) -> None:
    wait = getattr(event, "wait")  # noqa: B009 (any event of threading)
    assert await anyio.to_thread.run_sync(wait, 10)


async def test_a_hive_that_dies_ends_open_requests_with_a_typed_error_and_the_next_one_finds_another() -> None:
    with SmallServer().serving() as first, SmallServer().serving() as second:
        async with bridged(found_at(first.url, second.url)) as host:
            await host.shake_hands()
            await host.call(1, "hang")
            await _until(first.hanging)
            first.hanging.clear()
            await host.call_modern(2, "hang")
            await _until(first.hanging)
            first.die()
            for request_id in (1, 2):
                error = (await host.read(id=request_id))["error"]
                assert (error["code"], error["data"]["kind"]) == (-32073, "stream_broken")
                assert error["data"]["retryable"] is False
            await host.call(3, "echo", again=True)
            assert "result" in await host.read(id=3)
            await host.read(method="notifications/tools/list_changed")
            await host.call_modern(4, "echo")
            assert "result" in await host.read(id=4)
            assert len(second.sessions) == 1


async def test_without_a_hive_every_request_says_why_and_the_hive_is_looked_for_once() -> None:
    asked = 0

    async def find() -> str:
        nonlocal asked
        asked += 1
        await anyio.wait_all_tasks_blocked()
        return await found_at()()

    async with bridged(find) as host:
        for request_id in range(5):
            await host.call_modern(request_id, "echo")
        for request_id in range(5):
            error = (await host.read(id=request_id))["error"]
            assert (error["message"], error["data"]["kind"]) == ("no hive anywhere", "connect_failed")
            assert error["data"]["retryable"] is True
    assert asked == 1


async def test_a_hive_that_comes_up_later_is_found_by_the_next_request() -> None:
    with SmallServer().serving() as server:
        running = False

        async def find() -> str:
            return await found_at(*[server.url] * running)()

        async with bridged(find) as host:
            await host.call_modern(1, "echo")
            assert "error" in await host.read(id=1)
            running = True
            await host.call_modern(2, "echo")
            assert "result" in await host.read(id=2)


async def test_messages_without_a_session_go_nowhere_and_harm_nothing() -> None:
    with SmallServer().serving() as server:
        async with bridged(found_at(server.url)) as host:
            await host.notify("notifications/initialized")
            await host.notify("notifications/cancelled", requestId="unknown")
            await host.write({"jsonrpc": "2.0", "id": 9, "result": {}})
            await host.call(1, "echo")
            assert (await host.read(id=1))["error"]["code"] == -32600
