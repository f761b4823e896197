"""What a host is told while the hive still starts, or cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from ash_mcp.bridge.hive_face import HiveFace
from ash_mcp.errors import ConnectFailed
from tests.ash_mcp.bridge.bridge_parts import ENVELOPE, SmallServer, bridged

pytestmark = pytest.mark.anyio

CHANGED = "notifications/tools/list_changed"
FACE = HiveFace.load()


@pytest.fixture(scope="module")
def running() -> Iterator[SmallServer]:
    with SmallServer().serving() as server:
        yield server


@pytest.fixture
def server(running: SmallServer) -> SmallServer:
    running.called.clear()
    return running


class Starting:
    """A hive that is found when the test says so."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._there = anyio.Event()

    def let_go(self) -> None:
        self._there.set()

    async def find(self) -> str:
        await self._there.wait()
        return self._url


async def test_a_handshake_era_host_is_greeted_and_shown_the_hives_tools_before_there_is_one(
    server: SmallServer,
) -> None:
    hive = Starting(server.url)
    async with bridged(hive.find) as host:
        greeting = (await host.shake_hands())["result"]
        assert (greeting["serverInfo"]["name"], greeting["protocolVersion"]) == ("ash", "2025-11-25")
        await host.request(1, "tools/list")
        assert (await host.read(id=1))["result"]["tools"][0]["name"] == "spawn"
        await host.call(2, "echo", text="early")
        await host.request(3, "ping")
        assert (await host.read(id=3))["result"] == {}
        assert not host.unread and not server.called
        hive.let_go()
        assert (await host.read(id=2))["result"]["content"][0]["text"] == '{"text": "early"}'
        await host.read(method=CHANGED)
        await host.request(4, "tools/list")
        assert [tool["name"] for tool in (await host.read(id=4))["result"]["tools"]] == ["echo"]


async def test_a_stateless_host_is_told_on_its_subscription_that_the_list_differs(server: SmallServer) -> None:
    hive = Starting(server.url)
    async with bridged(hive.find) as host:
        await host.request("who", "server/discover", _meta=ENVELOPE)
        assert "2026-07-28" in (await host.read(id="who"))["result"]["supportedVersions"]
        await host.request(1, "tools/list", _meta=ENVELOPE)
        assert (await host.read(id=1))["result"]["resultType"] == "complete"
        await host.request("sub", "subscriptions/listen", notifications={"toolsListChanged": True}, _meta=ENVELOPE)
        granted = await host.read(method="notifications/subscriptions/acknowledged")
        assert granted["params"] == {
            "notifications": {"toolsListChanged": True},
            "_meta": {"io.modelcontextprotocol/subscriptionId": "sub"},
        }
        await host.call_modern(2, "echo")
        hive.let_go()
        told = await host.read(method=CHANGED)
        assert told["params"]["_meta"] == {"io.modelcontextprotocol/subscriptionId": "sub"}
        assert "result" in await host.read(id=2)
        await host.call_modern(3, "change")
        await host.read(id=3)
        await host.read(method=CHANGED)  # of the hive's own subscription, whose acknowledgement is not told again
        # once more where the hive opened that only after the call had come
        assert {message["method"] for message in host.unread} <= {CHANGED}


async def test_a_list_that_was_right_is_not_told_again(server: SmallServer, monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = FACE.handshake["tools/list"]["tools"]
    monkeypatch.setattr(server, "tools", own)
    hive = Starting(server.url)
    async with bridged(hive.find) as host:
        await host.shake_hands()
        await host.request(1, "tools/list")
        await host.read(id=1)
        hive.let_go()
        await host.call(2, "echo")
        await host.read(id=2)
        await host.request(3, "tools/list")
        assert len((await host.read(id=3))["result"]["tools"]) == len(own)
        assert not host.unread


async def test_a_hive_that_answers_in_time_is_asked_itself(server: SmallServer) -> None:
    async def find() -> str:
        return server.url

    async with bridged(find, list_seconds=10) as host:
        await host.shake_hands()
        await host.request(1, "tools/list")
        assert [tool["name"] for tool in (await host.read(id=1))["result"]["tools"]] == ["echo"]
        assert not host.unread


@pytest.mark.parametrize(
    ("asked", "agreed"), [("2024-11-05", "2024-11-05"), ("2025-06-18", "2025-06-18"), ("1999-01-01", "2025-11-25")]
)
async def test_the_bridge_agrees_on_a_version_as_the_hive_does(server: SmallServer, asked: str, agreed: str) -> None:
    hive = Starting(server.url)
    async with bridged(hive.find) as host:
        client = {"name": "test", "version": "1"}
        await host.request(1, "initialize", protocolVersion=asked, capabilities={}, clientInfo=client)
        assert (await host.read(id=1))["result"]["protocolVersion"] == agreed
        await host.notify("notifications/initialized")
        hive.let_go()
        await host.call(2, "echo")
        assert "result" in await host.read(id=2)
        assert server.headers[-1]["mcp-protocol-version"] == agreed


async def test_where_no_hive_can_start_calls_say_why_and_one_that_starts_after_all_is_used(
    server: SmallServer,
) -> None:
    works = False

    async def find() -> str:
        if not works:
            raise ConnectFailed("the hive could not start. Run `ash doctor`")
        return server.url

    async with bridged(find, list_seconds=10) as host:
        await host.shake_hands()
        await host.request(1, "tools/list")
        assert len((await host.read(id=1))["result"]["tools"]) > 1
        await host.call(2, "echo")
        assert "ash doctor" in (await host.read(id=2))["error"]["message"]
        works = True
        await host.call(3, "echo")
        assert "result" in await host.read(id=3)
        await host.read(method=CHANGED)


async def test_a_call_that_is_cancelled_before_there_is_a_hive_never_runs(server: SmallServer) -> None:
    hive = Starting(server.url)
    async with bridged(hive.find) as host:
        await host.shake_hands()
        await host.call(1, "echo")
        await host.notify("notifications/cancelled", requestId=1)
        await host.call(2, "progress")
        hive.let_go()
        assert "result" in await host.read(id=2)
    assert server.called == ["progress"]


async def test_an_initialize_without_a_version_is_refused(server: SmallServer) -> None:
    async with bridged(Starting(server.url).find) as host:
        await host.request(1, "initialize")
        assert (await host.read(id=1))["error"]["code"] == -32602
