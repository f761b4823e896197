"""The hub's own requests to a server without a runner: only while its address is surely its own, and within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.spawning import server_client
from ash_hub.spawning.sandbox_requests import MAX_LIST_BYTES
from ash_hub.spawning.server_client import ServerClient
from ash_mcp.errors import AshError, AshTimeout, ConnectFailed, RemoteProtocolError
from ash_mcp.types import Endpoint, SandboxId
from ash_router.bounds.limits import RelayLimits
from ash_router.upstream.proof import SandboxKeys
from tests.image_server import running_image
from tests.router.sandbox_parts import read_request, response

pytestmark = pytest.mark.anyio

HELLO = json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"protocolVersion": "2025-03-26"}}).encode()


def client_of(port: int, why: list[str | None] | None = None) -> ServerClient:
    endpoint = Endpoint(host="127.0.0.1", port=port, server_path="/serve")
    keys = SandboxKeys(Ed25519PrivateKey.generate())
    return ServerClient(endpoint, keys, SandboxId("sbx-a"), lambda: why[0] if why is not None else None)


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncGenerator[int]:
    """Give the port of a server that gives these answers, the last one again and again."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await read_request(reader)
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_nothing_is_sent_while_nobody_knows_whose_the_address_is() -> None:
    async with running_image() as image:
        why: list[str | None] = ["the cluster is away"]
        client = client_of(image.port, why)
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(client.wait_ready, 9)
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(ConnectFailed, match="the cluster is away"):
                    await client.list_tools(5)
                assert image.heads == []
                why[0] = None
        assert [tool["name"] for tool in await client.list_tools(5)] == ["add", "meet", "wait", "ash_exec"]


async def test_what_never_becomes_ready_is_waited_for_no_longer_than_asked() -> None:
    async with answering(response(b"", status="503 Busy")) as port:
        with anyio.fail_after(10), pytest.raises(AshTimeout, match=r"did not answer within 0\.6 s"):
            await client_of(port).wait_ready(0.6)


async def test_one_that_listens_long_before_it_answers_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "DEFAULT_LIMITS", RelayLimits(handshake_timeout_seconds=0.2))
    unanswered = list[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        if not unanswered:
            unanswered.append(writer)
            return
        writer.write(response(HELLO))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        with anyio.fail_after(10):
            await client_of(server.sockets[0].getsockname()[1]).wait_ready(9)
        assert len(unanswered) == 1
        unanswered[0].close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (response(b"{}"), "no MCP server answers at /serve of port"),
        (response(b'{"result": {"protocolVersion": "2026-07-28"}}'), "no MCP server answers at /serve"),
        (
            response(b'{"error": {"message": "go away"}}', status="401 No"),
            "wants a credential that the hive does not have: it answered 401",
        ),
        (response(HELLO + b" " * 2**20), "is larger than"),
        (b"SSH-2.0-x\r\n", "not HTTP"),
    ],
)
async def test_who_is_no_such_server_fails_at_once(answer: bytes, says: str) -> None:
    async with answering(answer) as port:
        with anyio.fail_after(10), pytest.raises(RemoteProtocolError, match=says):
            await client_of(port).wait_ready(8)


async def test_a_list_is_bounded_as_a_runners_is() -> None:
    tools = [{"name": "run", "description": "x" * MAX_LIST_BYTES, "inputSchema": {"type": "object"}}]
    listed = json.dumps({"jsonrpc": "2.0", "id": 2, "result": {"tools": tools}}).encode()
    async with answering(response(HELLO), response(b""), response(listed)) as port:
        with anyio.fail_after(10), pytest.raises(AshError, match=f"larger than {MAX_LIST_BYTES} bytes"):
            await client_of(port).list_tools(8)
