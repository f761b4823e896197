"""The bridge between a host's lines and a server over HTTP, in both eras of MCP."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from ash_mcp.settings import ClientSettings
from tests.ash_mcp.bridge.bridge_parts import ENVELOPE, SmallServer, bridged, found_at

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def running() -> Iterator[SmallServer]:
    with SmallServer().serving() as server:
        yield server


@pytest.fixture
def server(running: SmallServer) -> SmallServer:
    running.hanging.clear()
    running.let_go.clear()
    running.headers.clear()
    return running


async def _until(event: object) -> None:
    wait = getattr(event, "wait")  # noqa: B009 (any event of threading)
    assert await anyio.to_thread.run_sync(wait, 10)


async def test_a_handshake_era_call_is_answered_in_its_session(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        await host.shake_hands()
        await host.call(1, "echo", text="héllo\u2028")
        answer = await host.read(id=1)
        assert answer["result"]["content"][0]["text"] == '{"text": "h\\u00e9llo\\u2028"}'
        assert server.headers[-1]["mcp-protocol-version"] == "2025-11-25"
    assert server.methods[-1] == "DELETE", "the end of stdin ends the session"


async def test_what_the_server_says_unasked_reaches_a_handshake_era_host(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        await host.shake_hands()
        await host.call(1, "change")
        await host.read(method="notifications/tools/list_changed")


async def test_progress_comes_before_the_answer(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        await host.call_modern("a", "progress", meta={"progressToken": "token"})
        await host.read(id="a")
        (progress,) = host.unread
        assert progress["method"] == "notifications/progress"
        assert progress["params"]["progressToken"] == "token"


async def test_a_stateless_request_carries_headers_that_mirror_it(server: SmallServer) -> None:
    async with bridged(found_at(server.url), ClientSettings(token="key", scope="run42")) as host:
        await host.request(1, "tools/call", name="näme", arguments={}, _meta=ENVELOPE)
        assert "result" in await host.read(id=1)
    sent = server.headers[-1]
    assert sent["mcp-protocol-version"] == "2026-07-28"
    assert (sent["mcp-method"], sent["mcp-name"]) == ("tools/call", "=?base64?bsOkbWU=?=")
    assert (sent["authorization"], sent["ash-scope"]) == ("Bearer key", "run42")
    assert "mcp-session-id" not in sent


@pytest.mark.parametrize("modern", [True, False])
async def test_cancelling_a_call_stops_it_at_the_server(server: SmallServer, modern: bool) -> None:
    async with bridged(found_at(server.url)) as host:
        if modern:
            await host.call_modern(7, "hang")
        else:
            await host.shake_hands()
            await host.call(7, "hang")
        await _until(server.hanging)
        await host.notify("notifications/cancelled", requestId=7)
        await _until(server.let_go)


async def test_a_cancelled_stateless_call_is_not_answered(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        await host.call_modern(7, "hang")
        await _until(server.hanging)
        await host.notify("notifications/cancelled", requestId=7)
        await host.call_modern(8, "echo")
        await host.read(id=8)
        assert not host.unread


async def test_a_subscription_brings_list_changes_and_does_not_hold_up_the_end(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        wanted = {"toolsListChanged": True}
        await host.request("sub", "subscriptions/listen", notifications=wanted, _meta=ENVELOPE)
        await host.read(method="notifications/subscriptions/acknowledged")
        await host.call_modern(1, "change")
        await host.read(method="notifications/tools/list_changed")
        ending = anyio.current_time()
    assert anyio.current_time() - ending < 5


async def test_a_change_before_the_hive_knows_of_a_subscription_is_told_when_it_does(server: SmallServer) -> None:
    server.listens_after = "change"
    async with bridged(found_at(server.url)) as host:
        await host.request("sub", "subscriptions/listen", notifications={"toolsListChanged": True}, _meta=ENVELOPE)
        await host.read(method="notifications/subscriptions/acknowledged")
        await host.call_modern(1, "change")
        await host.read(id=1)
        await host.read(method="notifications/tools/list_changed")


async def test_a_lost_session_is_opened_again_and_the_host_told_to_list_anew(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        await host.shake_hands()
        await host.call(1, "echo")
        await host.read(id=1)
        lost = server.headers[-1]["mcp-session-id"]
        del server.sessions[lost]
        await host.call(2, "echo", still="there")
        assert "result" in await host.read(id=2)
        await host.read(method="notifications/tools/list_changed")
        assert lost not in server.sessions


async def test_answers_are_awaited_after_the_end_of_stdin(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        await host.call_modern(1, "progress")
        host.inlet.close()
        assert "result" in await host.read(id=1)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{not json", -32700),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1}', -32600),
        (b"[" * 100_000, -32700),
    ],
)
async def test_a_line_that_is_no_message_is_refused(server: SmallServer, line: bytes, code: int) -> None:
    async with bridged(found_at(server.url)) as host:
        await host.write(line)
        assert (await host.read())["error"]["code"] == code
        await host.call_modern(1, "echo")
        assert "result" in await host.read(id=1)


async def test_a_refused_request_is_answered_under_its_own_id(server: SmallServer) -> None:
    async with bridged(found_at(server.url)) as host:
        meta = {**ENVELOPE, "io.modelcontextprotocol/protocolVersion": "2099-01-01"}
        await host.request("far", "tools/list", _meta=meta)
        answer = await host.read(id="far")
        assert answer["error"]["code"] == -32022
        await host.request("half", "tools/call", name="\ud800", _meta=ENVELOPE)
        assert (await host.read(id="half"))["error"]["code"] == -32602
