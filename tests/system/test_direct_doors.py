"""The direct doors of a real hive: a sandbox's own endpoint, with nothing of the hive in the way."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport

from ash_mcp.client import Hive

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_a_sandbox_is_reached_by_header_and_by_path_and_says_when_it_has_ended(hive_url: str, mode: Any) -> None:
    base = hive_url.removesuffix("/mcp")
    async with Hive(hive_url) as hive:
        async with hive.spawn("echo") as box:
            doors = [
                StreamableHttpTransport(hive_url, headers={"X-Session-ID": box.id}),
                StreamableHttpTransport(hive_url, headers={"X-Session-ID": box.session}),
                StreamableHttpTransport(f"{base}/s/{box.id}/mcp"),
                StreamableHttpTransport(f"{base}/s/{box.session}/mcp"),
            ]
            for door in doors:
                async with Client(door, mode=mode) as client:
                    assert "echo" in {tool.name for tool in await client.list_tools()}
                    result = await client.call_tool("echo", {"text": "hello"})
                    assert "hello" in str(result.content)
            async with httpx.AsyncClient() as http:
                inside = await http.get(f"{base}/s/{box.id}/_ash/health")
                assert (inside.status_code, inside.headers["ash-origin"]) == (404, "hub")
        async with httpx.AsyncClient() as http:
            gone = await http.post(f"{base}/s/{box.id}/mcp", json={})
            assert (gone.status_code, gone.json()["error"]["kind"]) == (410, "sandbox_gone")
            unknown = await http.post(f"{base}/s/sbx-nobody/mcp", json={})
            assert (unknown.status_code, unknown.json()["error"]["message"]) == (404, "route not found")
