"""The direct doors: a sandbox's own endpoint, by `X-Session-ID` and by path."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anyio
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport

from ash_mcp.errors import SandboxGone
from ash_mcp.types import DEFAULT_SCOPE, Principal
from tests.router.relay_parts import Rig, tool_call
from tests.router.sandbox_parts import (
    Box,
    open_script,
    read_request,
    response,
)

pytestmark = pytest.mark.anyio

ERAS = ["legacy", "2026-07-28"]
BODY = tool_call("add", {"a": 1, "b": 2})


def direct(
    path: str = "/s/sb1/mcp", body: bytes = BODY, *, more: str = "", method: str = "POST", framing: str | None = None
) -> bytes:
    framing = f"content-length: {len(body)}\r\n" if framing is None else framing
    head = f"{method} {path} HTTP/1.1\r\nhost: hive.example:1\r\ncontent-type: application/json\r\n{framing}{more}\r\n"
    return head.encode() + body


def kind(body: bytes) -> str:
    return json.loads(body)["error"]["kind"]


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("door", ["name", "id", "path", "path of id"])
async def test_a_client_speaks_with_the_sandbox_itself(rig: Rig, box: Box, mode: Any, door: str):
    sandbox_id = next(iter(rig.routes.of(Principal("me"), DEFAULT_SCOPE))).sandbox_id
    name = sandbox_id if "id" in door else "sb1"
    url = rig.url.replace("/mcp", f"/s/{name}/mcp") if "path" in door else rig.url
    headers = {} if "path" in door else {"X-Session-ID": name}
    async with Client(StreamableHttpTransport(url, headers=headers), mode=mode) as client:
        assert {tool.name for tool in await client.list_tools()} >= {"add", "echo", "wait"}
        assert (await client.call_tool("add", {"a": 2, "b": 3})).data == 5
        assert [prompt.name for prompt in await client.list_prompts()] == ["greet"]
        assert "hello ann" in str(await client.get_prompt("greet", {"name": "ann"}))
    assert len(rig.ledger) == 0
    assert rig.held == []
    with anyio.fail_after(5):
        while len(rig.relay.services.streams):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "path",
    [
        "/s/sb9/mcp",
        "/s/theirs/mcp",
        "/s/sb1%2F..%2Fsb1/mcp",
        "/s/sb1/_ash/health",
        "/s/sb1/mcp/../_ash/health",
        "/s/sb1/mcp/%2e%2e/_ash/health",
        "/s/sb1/mcp%2f..%2f_ash/health",
        "/s/sb1//mcp",
        "/s//mcp",
        "/s/../mcp/x",
        "/s/sb1/mcp/x",
        "/s/sb1/mcp;x",
        "/s/sb1%00/mcp",
        "/s/sb1%0d%0a/mcp",
        "/s/%2573b1/mcp",
        "//s/sb1/mcp",
        "/S/sb1/mcp",
        "/mcp/../_ash/health",
    ],
)
async def test_no_other_path_leads_into_a_sandbox(rig: Rig, box: Box, path: str):
    await rig.bind("theirs", box.socket, owner="somebody")
    async with rig.connect() as wire:
        await wire.send(direct(path))
        _, headers, _ = await wire.answer()
    assert headers["ash-origin"] == "hub"
    assert box.heads == []


@pytest.mark.parametrize("path", ["/s/sb1/mcp", "/s/sb1/mcp/", "/s/%73b1/%6dcp", "/s/sb1/mcp?x=/../_ash/claim"])
async def test_whatever_its_spelling_a_door_leads_to_the_endpoint_only(rig: Rig, path: str):
    lines: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(await reader.readline())
        writer.write(response(b"{}"))

    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(path))
        assert (await wire.answer())[2] == b"{}"
    assert lines == [b"POST /mcp HTTP/1.1\r\n"]


@pytest.mark.parametrize("name", ["sb9", "theirs", "their id", "a b", "../x", "", "x" * 100, "\xff"])
async def test_a_sandbox_that_the_caller_does_not_have_is_route_not_found(rig: Rig, box: Box, name: str):
    theirs = await rig.bind("theirs", box.socket, owner="somebody")
    name = theirs.sandbox_id if name == "their id" else name
    async with rig.connect() as wire:
        named = b"\r\nx-session-id: " + name.encode("latin-1") + b"\r\n\r\n"
        await wire.send(direct("/mcp").replace(b"\r\n\r\n", named, 1))
        status, headers, body = await wire.answer()
    assert (status, headers["ash-origin"], kind(body)) == (404, "hub", "sandbox_not_found")
    assert json.loads(body)["error"]["message"] == "route not found"
    assert box.heads == []


@pytest.mark.parametrize("more", ["x-session-id: sb2\r\n", "x-session-id: sb1\r\nx-session-id: sb1\r\n"])
async def test_a_request_that_names_two_sandboxes_is_refused(rig: Rig, box: Box, more: str):
    async with rig.connect() as wire:
        await wire.send(direct(more=more))
        status, _, body = await wire.answer()
    assert (status, kind(body)) == (400, "bad_request")
    assert box.heads == []


async def test_a_sandbox_that_has_ended_says_why(rig: Rig):
    rig.ended["sb7"] = SandboxGone("sandbox sb7 was idle too long", reason="idle")
    async with rig.connect() as wire:
        await wire.send(direct("/s/sb7/mcp"))
        status, _, body = await wire.answer()
    assert (status, kind(body)) == (410, "sandbox_gone")


@pytest.mark.parametrize("method", ["PUT", "HEAD", "OPTIONS", "PATCH"])
async def test_another_method_is_not_allowed(rig: Rig, box: Box, method: str):
    async with rig.connect() as wire:
        await wire.send(direct(method=method))
        status, headers = await wire.head()
    assert (status, headers["allow"]) == (405, "delete, get, post")
    assert box.heads == []


async def test_a_sandbox_is_told_for_whom_the_hive_asks_and_nothing_secret(rig: Rig):
    heads: list[dict[str, str]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await read_request(reader))[0])
        writer.write(response(b"{}", more="mcp-session-id: theirs\r\nset-cookie: a=b\r\n"))

    more = (
        "x-forwarded-for: 6.6.6.6\r\nx-forwarded-proto: gopher\r\nauthorization: Bearer x\r\ncookie: c=d\r\n"
        "ash-token: forged\r\nmcp-session-id: mine\r\nlast-event-id: 7\r\nx-forwarded-host: evil\r\n"
    )
    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(more=more))
        _, headers, _ = await wire.answer()
    assert headers["mcp-session-id"] == "theirs"
    assert (headers["ash-origin"], "set-cookie" in headers) == ("sandbox", False)
    (head,) = heads
    assert head.pop("ash-token").count(".") == 2
    assert head == {
        ":method": "POST", "host": "sandbox", "content-length": str(len(BODY)), "content-type": "application/json",
        "mcp-session-id": "mine", "last-event-id": "7", "x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "http",
        "x-forwarded-host": "hive.example:1",
    }  # fmt: skip
