"""Shares of a real hive's sandboxes, as raw as HTTP is and by real clients: what they open, and that it is all."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import anyio.to_thread
import fastmcp
import pytest
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.exceptions import ToolError
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.exceptions import MCPError

from ash_mcp import Hive, Sandbox, Share, errors
from ash_mcp.sync import Hive as SyncHive
from tests.system.owners import LEGACY, MODERN, Owner, Two, open_two

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

ACCEPT: Final = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
META: Final[dict[str, Any]] = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {},
}
ERAS: Final = ("legacy", MODERN)
SOON: Final = 2.0
"""Within which a revoked share is gone everywhere, in seconds."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def two() -> AsyncGenerator[Two]:
    async with open_two() as two:
        yield two


@pytest.fixture(scope="module")
async def hive(two: Two) -> AsyncGenerator[Hive]:
    async with Hive(two.hive.url, two.ann.token) as hive:
        yield hive


@pytest.fixture
async def box(hive: Hive) -> AsyncGenerator[Sandbox]:
    """A sandbox of the test's own."""
    async with hive.spawn("echo") as box:
        yield box


@asynccontextmanager
async def sdk_client(share: Share, mode: Any, **more: Any) -> AsyncGenerator[Client]:
    async with create_mcp_http_client(headers=share.headers) as http:
        async with Client(
            streamable_http_client(share.url, http_client=http), mode=mode, cache=None, **more
        ) as client:
            yield client


def fast_client(share: Share, mode: Any) -> fastmcp.Client[Any]:
    return fastmcp.Client(StreamableHttpTransport(share.url, headers=share.headers), mode=mode)


@pytest.mark.parametrize("mode", ERAS)
async def test_real_clients_see_and_call_what_it_names_and_nothing_else(box: Sandbox, mode: str):
    share = await box.share(tools=["echo"])
    async with fast_client(share, mode) as client:
        assert [tool.name for tool in await client.list_tools()] == ["echo"]
        assert "hi" in str((await client.call_tool("echo", {"text": "hi"})).content)
        assert (await client.list_resources(), await client.list_prompts()) == ([], [])
        assert await client.list_resource_templates() == []
        for other in ("spawn", "call", "share", "whoami", f"{box.session}_echo", "ash_exec", "ash_tools", "Echo"):
            with pytest.raises(ToolError, match="there is no tool"):
                await client.call_tool(other, {})
    async with sdk_client(share, mode) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["echo"]
        assert not (await client.call_tool("echo", {"text": "hi"})).is_error
        for uri in (f"sandbox://{box.session}//etc/passwd", "sandbox://bobsprey/x", "file:///etc/passwd"):
            with pytest.raises(MCPError):
                await client.read_resource(uri)
        assert "spawn" not in (client.instructions or "")


@pytest.mark.parametrize("mode", ERAS)
async def test_all_listed_tools_are_those_of_the_owners_list(box: Sandbox, mode: str):
    share = await box.share()
    names = {tool.name for tool in await box.tools()}
    assert set(share.info.tools) == names
    async with fast_client(share, mode) as client:
        assert {tool.name for tool in await client.list_tools()} == names


BODIES: Final[dict[str, bytes]] = {
    "a batch": b'[{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"whoami","arguments":{}}}]',
    "a second name": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","name":"whoami",'
    b'"arguments":{"text":"x"}}}',
    "a second params": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":{}},'
    b'"params":{"name":"whoami","arguments":{}}}',
    "an escaped second key": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo",'
    b'"n\\u0061me":"whoami","arguments":{}}}',
    "a byte order mark": b'\xef\xbb\xbf{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"whoami"}}',
    "two messages": b'{"jsonrpc":"2.0","id":7,"method":"tools/list"}\n{"jsonrpc":"2.0","id":8,"method":"tools/call",'
    b'"params":{"name":"whoami","arguments":{}}}',
    "UTF-16": '{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"whoami"}}'.encode("utf-16"),
    "NaN": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":{"text":NaN}}}',
    "another name": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"whoami","arguments":{}}}',
    "a name with a space": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"whoami "}}',
    "a name that is a list": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":["whoami"]}}',
    "no id": b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"whoami","arguments":{}}}',
    "a name in capitals beside the name": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo",'
    b'"Name":"whoami","arguments":{"text":"x"}}}',
    "a method in capitals beside the method": b'{"jsonrpc":"2.0","id":7,"method":"tools/call","Method":"ping",'
    b'"params":{"name":"echo","arguments":{"text":"x"}}}',
    "another method": b'{"jsonrpc":"2.0","id":7,"method":"tools/Call","params":{"name":"whoami","arguments":{}}}',
}


@pytest.fixture(scope="module")
async def echo_only(hive: Hive) -> AsyncGenerator[Share]:
    async with hive.spawn("echo") as box:
        yield await box.share(tools=["echo"])


@pytest.mark.parametrize("header", ["echo", "whoami"])
@pytest.mark.parametrize("body", BODIES)
async def test_no_body_calls_another_tool(echo_only: Share, body: str, header: str):
    share = echo_only
    async with create_mcp_http_client(headers={**share.headers, **ACCEPT}) as http:
        stateless = {"mcp-protocol-version": MODERN, "mcp-method": "tools/call", "mcp-name": header}
        answer = await http.post(share.url, content=BODIES[body], headers=stateless)
        assert answer.headers["ash-origin"] == "hub", "no sandbox saw it"
        session = {"mcp-session-id": await greet(share), "mcp-protocol-version": LEGACY}
        answer = await http.post(share.url, content=BODIES[body], headers=session)
        assert answer.headers["ash-origin"] == "hub"
        await http.delete(share.url, headers=session)


async def raw(two: Two, target: str, token: str | None, more: Sequence[str] = ()) -> tuple[int, str]:
    """POST `tools/list` of the stateless era to a target as it is written; return status and body."""
    host, port = two.hive.url.split("/")[2].split(":")
    body = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": {"_meta": META}})
    lines = [
        f"POST {target} HTTP/1.1",
        f"Host: {host}:{port}",
        "Content-Type: application/json",
        "Connection: close",
    ]
    lines += ["Accept: application/json, text/event-stream", f"MCP-Protocol-Version: {MODERN}", *more]
    lines += ["Mcp-Method: tools/list", f"Content-Length: {len(body)}"]
    lines += [f"Authorization: Bearer {token}"] if token is not None else []
    async with await anyio.connect_tcp(host, int(port)) as stream:
        await stream.send(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        answer = b""
        with anyio.fail_after(20):
            async for part in stream:
                answer += part
    head, _, said = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), said.decode()


@pytest.fixture(scope="module")
async def tokens(hive: Hive) -> dict[str, str]:
    """Of shares of `annsprey` and, `another share's`, of `annsother`. `door_table.py` has what each opens."""
    box, other = await hive.attach("annsprey"), await hive.spawn("echo", session="annsother")
    good, revoked, others = await box.share(), await box.share(), await other.share()
    await box.revoke_shares(revoked.id)
    return {"good": good.token, "revoked": revoked.token, "another share's": others.token}


async def test_nobody_learns_from_a_refusal_which_sandboxes_there_are(two: Two, tokens: dict[str, str]):
    for name in ("good", "revoked", "another share's"):
        seen = [await raw(two, f"/s/{box}/mcp", tokens[name]) for box in ("bobsprey", "nobody", "annsdead")]
        assert len(set(seen)) == 1, name


async def test_x_session_id_names_its_own_sandbox_or_nothing(two: Two, hive: Hive, tokens: dict[str, str]):
    own, other = (await hive.attach("annsprey")).id, (await hive.attach("annsother")).id
    for named, opens in ((own, True), ("annsprey", True), (other, False), ("bobsprey", False), ("nobody", False)):
        status, said = await raw(two, "/mcp", tokens["good"], [f"X-Session-ID: {named}"])
        assert (status == 200, '"tools":[{' in said) == (opens, opens), named
    status, _ = await raw(two, f"/s/{own}/mcp", tokens["good"], [f"X-Session-ID: {other}"])
    assert status == 403
    for method, path in (("GET", "/"), ("POST", "/spawn"), ("DELETE", f"/deprovision/{own}"), ("GET", "/metrics")):
        answer = await Owner(two.hive, tokens["good"], two.bob.client).http(method, path)
        assert answer.status == 403, path


async def test_one_share_is_not_the_other_in_a_session_of_the_handshake_era(two: Two, box: Sandbox):
    first, second = await box.share(), await box.share()
    path = first.url.removeprefix(two.hive.url.removesuffix("/mcp"))
    opened = await greet(first)
    for token, where, status in (
        (first.token, path, 200),
        (second.token, path, 404),
        (two.ann.token, "/mcp", 404),
        (two.ann.token, path, 404),
    ):
        caller = Owner(two.hive, token, two.bob.client, opened)
        assert (await caller.ask(LEGACY, "tools/list", {}, where)).status == status, (where, status)


async def greet(share: Share) -> str:
    """Open a session of the handshake era and return its id."""
    async with create_mcp_http_client(headers={**share.headers, **ACCEPT}) as http:
        hello = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "g", "version": "1"}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
        return (await http.post(share.url, json=message)).headers["mcp-session-id"]


@pytest.mark.parametrize("mode", ERAS)
async def test_a_revoked_share_is_gone_soon_with_its_calls(two: Two, box: Sandbox, mode: str):
    share = await box.share()
    failed: list[Any] = []

    async def call(client: Client) -> None:
        failed.append(await client.call_tool("slow", {"steps": 600, "seconds": 60.0}))

    async with sdk_client(share, mode) as client, anyio.create_task_group() as group:
        group.start_soon(call, client)
        await anyio.sleep(0.5)
        assert not failed
        await box.revoke_shares(share.id)
        with anyio.fail_after(SOON):
            while not failed:
                await anyio.sleep(0.02)
        assert failed[0].is_error and "revoked" in str(failed[0].content)
        status, _ = await raw(two, share.url.removeprefix(two.hive.url.removesuffix("/mcp")), share.token)
        assert status == 401
        group.cancel_scope.cancel()


@pytest.mark.parametrize("era", [LEGACY, MODERN])
async def test_a_listening_stream_of_a_guest_ends_with_the_share(box: Sandbox, era: str):
    share = await box.share(ttl_seconds=3)
    async with create_mcp_http_client(headers={**share.headers, **ACCEPT}) as http:
        if era == LEGACY:
            headers = {"mcp-session-id": await greet(share), "mcp-protocol-version": LEGACY}
            request = http.build_request("GET", share.url, headers={**headers, "accept": "text/event-stream"})
        else:
            params: Any = {"notifications": {"toolsListChanged": True}, "_meta": META}
            headers = {"mcp-protocol-version": MODERN, "mcp-method": "subscriptions/listen"}
            message = {"jsonrpc": "2.0", "id": 8, "method": "subscriptions/listen", "params": params}
            request = http.build_request("POST", share.url, headers=headers, json=message)
        answer = await http.send(request, stream=True)
        assert answer.status_code == 200
        with anyio.fail_after(3 + SOON):
            await answer.aread()
        await answer.aclose()


async def test_a_guest_has_its_own_quota_and_the_owner_keeps_theirs(box: Sandbox):
    share = await box.share()
    results: list[Any] = []

    async def call() -> None:
        async with sdk_client(share, MODERN) as client:
            results.append(await client.call_tool("slow", {"steps": 1, "seconds": 3.0}))

    async with anyio.create_task_group() as group:
        for _ in range(36):
            group.start_soon(call)
        await anyio.sleep(1)
        assert not (await box.call("echo", text="hi")).is_error
    refused = [result for result in results if result.is_error]
    assert 0 < len(refused) < 36 and all("a share allows here" in str(result.content) for result in refused)


async def test_a_spawn_hands_its_sandbox_over_at_once(two: Two, hive: Hive):
    async with hive.spawn("echo", share={"tools": ["echo"], "ttl_seconds": 100}) as box:
        share = box.spawn_share
        assert share is not None and share.info.tools == ("echo",) and share.info.expires_at is not None
        assert [info.id for info in await box.shares()] == [share.id]
        async with fast_client(share, MODERN) as client:
            assert [tool.name for tool in await client.list_tools()] == ["echo"]
    async with hive.spawn("echo", share=True) as box:
        assert box.spawn_share is not None and set(box.spawn_share.info.tools) == {it.name for it in await box.tools()}
    made = (await two.ann.call("spawn", {"recipe": "echo", "session": "handed", "share": {}})).result
    assert made["structuredContent"]["share"]["token"] in made["content"][0]["text"]
    await two.ann.call("destroy", {"session": "handed"})


async def test_a_spawn_that_cannot_share_leaves_nothing_but_what_was_there_before(two: Two, hive: Hive):
    asked = {"recipe": "echo", "session": "unshared", "share": {"tool_names": ["nothing"]}}
    refused = await two.ann.call("spawn", asked)
    assert refused.result["isError"] and "lists no tool 'nothing'" in refused.body
    assert "unshared" not in [info.session for info in await hive.list()]
    keyed = {"recipe": "echo", "session": "unshared", "idempotency_key": "k"}
    assert (await two.ann.call("spawn", keyed)).result["structuredContent"]["session"] == "unshared"
    assert (await two.ann.call("spawn", {**keyed, "share": {"tool_names": ["nothing"]}})).result["isError"]
    assert "unshared" in [info.session for info in await hive.list()]
    await two.ann.call("destroy", {"session": "unshared"})
    several = await two.ann.call("spawn", {"recipe": "echo", "count": 2, "share": {}})
    assert several.result["isError"] and "share goes with a spawn of one" in several.body


async def test_its_owner_lists_and_revokes_and_a_guest_shares_no_further(two: Two, box: Sandbox):
    share = await box.share(tools=["echo"], ttl_seconds=100)
    assert [info.id for info in await box.shares()] == [share.id]
    assert share.token not in repr(share) and share.url.endswith(f"/s/{box.id}/mcp")
    path = share.url.removeprefix(two.hive.url.removesuffix("/mcp"))
    guest = Owner(two.hive, share.token, two.bob.client)
    for name, arguments in (("share", {"session": box.id}), ("call", {"session": box.id, "tool": "echo"})):
        assert "there is no tool" in (await guest.call(name, arguments, path=path)).body
    with pytest.raises(errors.ToolNotFound):
        await box.share(tools=["nothing"])
    with pytest.raises(errors.NotFound):
        await box.revoke_shares("nobody")
    answer = await two.bob.call("share", {"session": box.id, "action": "revoke"})
    assert answer.result["isError"] and [info.id for info in await box.shares()] == [share.id]
    assert await box.revoke_shares() == [share.id]
    assert await box.shares() == []
    for arguments in ({"action": "list", "tool_names": ["echo"]}, {"share_ids": ["x"]}, {"ttl_seconds": 0}):
        assert (await two.ann.call("share", {"session": box.id, **arguments})).result["isError"]


async def test_the_blocking_twin_shares_too(two: Two, box: Sandbox):
    def work() -> None:
        with SyncHive(two.hive.url, two.ann.token) as hive:
            twin = hive.attach(box.id)
            share = twin.share(tools=["echo"], ttl_seconds=60)
            assert [info.id for info in twin.shares()] == [share.id]
            assert twin.revoke_shares(share.id) == [share.id]

    await anyio.to_thread.run_sync(work)


async def test_no_log_has_a_token_and_the_audit_says_who_shared_and_which_share_called(
    two: Two, box: Sandbox, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("DEBUG"):
        share = await box.share(tools=["echo"])
        path = share.url.removeprefix(two.hive.url.removesuffix("/mcp"))
        guest = Owner(two.hive, share.token, two.bob.client)
        await guest.call("echo", {"text": "hi"}, path=path)
        await guest.call("whoami", {}, path=path)
        await guest.http("POST", "/spawn")
        await box.revoke_shares(share.id)
        await guest.call("echo", {"text": "hi"}, path=path)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("ash")]
    assert not any(share.token[16:] in line for line in ours)
    audited = [json.loads(line.getMessage()) for line in caplog.records if line.name == "ash.audit"]
    assert [line["share"] for line in audited if line["event"] in ("share", "unshare")] == [share.id, share.id]
    assert {"event": "request", "who": f"share:{share.id}", "what": "whoami"}.items() <= next(
        line for line in audited if line["event"] == "request"
    ).items()
