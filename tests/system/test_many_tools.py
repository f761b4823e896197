"""`tools/list` of a hive with many sandboxes: whole, in pages where it must, and just as the SDK would write it.

The sandboxes are stand-ins over the memory backend; all of the hive itself is real.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import mcp_types as types
import pytest
from fastmcp import Client as FastClient
from mcp.client import Client
from mcp.server.caching import CacheHint
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings

from ash_hub.bench.crowd import Crowd, open_crowd
from ash_hub.bench.standin import make_tools, standing_in
from ash_hub.face.expansion import listed_sandboxes
from ash_hub.face.hive_tools import listed_hive_tools
from ash_hub.spawning.recipes import Catalog
from ash_mcp.types import DEFAULT_SCOPE, Principal

OWN = [tool["name"] for tool in listed_hive_tools("")]
"""The hive's own tools, which come first in every list."""

pytestmark = pytest.mark.anyio

MODERN = "2026-07-28"
HANDSHAKE = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
EVENT_LIMIT = 1024 * 1024
ACCEPT = {"accept": "application/json, text/event-stream"}
ANN = Principal("ann")

# Whatever a list may hold that two ways of writing it might write differently.
RICH: list[dict[str, Any]] = [
    *make_tools(2),
    {"name": "a" * 90, "title": "Long", "description": "names are shortened", "inputSchema": {"type": "object"}},
    {
        "name": "käse.machen",
        "description": 'Ünïcödé \u2028 line, "quotes", \\ and "tools":[] \U0001f40d',
        "inputSchema": {
            "type": "object",
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "properties": {"n": {"type": "integer", "default": None, "maximum": 2**60}, "any": True},
            "required": ["n"],
            "additionalProperties": False,
            "x-null": None,
            "x-float": 0.1,
        },
        "outputSchema": {"type": "object", "properties": {"r": {"type": "string"}}, "title": "R"},
        "annotations": {"destructiveHint": True, "openWorldHint": True, "readOnlyHint": True, "title": "no"},
        "icons": [{"src": "https://example.test/x.png"}],
    },
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def crowded(tools: list[dict[str, Any]], sandboxes: int) -> AsyncGenerator[Crowd]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as name:
        socket = f"{name}/standin.sock"
        async with standing_in(socket, tools), open_crowd(Path(name), socket, "ann", "bob") as crowd:
            await crowd.spawn("ann", sandboxes)
            yield crowd


@pytest.fixture(scope="module")
async def fifty(anyio_backend: str) -> AsyncGenerator[Crowd]:
    async with crowded(make_tools(20), 50) as crowd:
        yield crowd


@pytest.fixture(scope="module")
async def sixty_large(anyio_backend: str) -> AsyncGenerator[Crowd]:
    async with crowded(make_tools(20, schema_bytes=2048), 60) as crowd:
        yield crowd


@pytest.fixture(scope="module")
async def rich(anyio_backend: str) -> AsyncGenerator[Crowd]:
    async with crowded(RICH, 3) as crowd:
        yield crowd


def bearer(crowd: Crowd, owner: str = "ann") -> dict[str, str]:
    return {"authorization": f"Bearer {crowd.tokens[owner]}"}


@asynccontextmanager
async def sdk_client(crowd: Crowd, query: str, mode: str) -> AsyncGenerator[Client]:
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    async with create_mcp_http_client(headers=bearer(crowd)) as http:
        transport = streamable_http_client(crowd.hive.url + query, http_client=http)
        async with Client(transport, mode=mode) as client:  # pyright: ignore[reportArgumentType]
            yield client


async def all_pages(client: Client) -> list[types.ListToolsResult]:
    pages: list[types.ListToolsResult] = []
    cursor: str | None = None
    with anyio.fail_after(20):
        while not pages or cursor is not None:
            pages.append(await client.list_tools(cursor=cursor))
            cursor = pages[-1].next_cursor
    return pages


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_fifty_sandboxes_of_twenty_tools_are_listed_whole_and_in_one_page(fifty: Crowd, mode: str) -> None:
    async with sdk_client(fifty, "?expand=all", mode) as client:
        (page,) = await all_pages(client)
    names = [tool.name for tool in page.tools]
    own = [tool["name"] for tool in listed_hive_tools("")]
    assert names == own + [f"sb{box}_tool_{number}" for box in range(1, 51) for number in range(20)]
    assert len(set(names)) == len(names) == 1000 + len(OWN)


async def test_who_does_not_ask_for_all_gets_whole_sandboxes_up_to_the_count(fifty: Crowd) -> None:
    async with sdk_client(fifty, "", "auto") as client:
        (page,) = await all_pages(client)
    assert {tool.name.partition("_")[0] for tool in page.tools if "_tool_" in tool.name} == {
        f"sb{box}" for box in range(45, 51)
    }
    async with sdk_client(fifty, "?expand=none", "auto") as client:
        assert len((await client.list_tools()).tools) == len(OWN)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_what_is_too_large_for_one_event_comes_in_pages_that_the_sdk_client_follows(
    sixty_large: Crowd, mode: str
) -> None:
    async with sdk_client(sixty_large, "?expand=all", mode) as client:
        pages = await all_pages(client)
    assert len(pages) > 2
    names = [tool.name for page in pages for tool in page.tools]
    assert names[len(OWN) :] == [f"sb{box}_tool_{number}" for box in range(1, 61) for number in range(20)]
    assert names[: len(OWN)] == OWN


async def test_fastmcps_client_follows_the_pages_by_itself(sixty_large: Crowd) -> None:
    from fastmcp.client.transports import StreamableHttpTransport

    transport = StreamableHttpTransport(sixty_large.hive.url + "?expand=all", headers=bearer(sixty_large))
    async with FastClient(transport) as client:
        names = [tool.name for tool in await client.list_tools()]
    assert len(names) == len(set(names)) == 1200 + len(OWN)


class Caller:
    """Speaks bare HTTP with a hive, or with an ASGI app."""

    def __init__(self, http: httpx.AsyncClient, url: str, headers: Mapping[str, str]) -> None:
        self.http = http
        self.url = url
        self.headers = {**ACCEPT, **headers}

    async def list(self, version: str, request_id: Any = 1, **params: Any) -> httpx.Response:
        headers = dict(self.headers)
        if version == MODERN:
            headers |= {"mcp-method": "tools/list", "mcp-protocol-version": MODERN}
            params["_meta"] = {
                "io.modelcontextprotocol/protocolVersion": MODERN,
                "io.modelcontextprotocol/clientCapabilities": {},
                **params.get("_meta", {}),
            }
        else:
            headers |= await self.opened(version)
        return await self.post({"id": request_id, "method": "tools/list", "params": params}, headers)

    async def opened(self, version: str) -> dict[str, str]:
        params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}
        answer = await self.post({"id": 0, "method": "initialize", "params": params}, self.headers)
        inside = {"mcp-session-id": answer.headers["mcp-session-id"], "mcp-protocol-version": version}
        told = await self.post({"method": "notifications/initialized"}, {**self.headers, **inside})
        assert told.status_code == 202
        return inside

    async def post(self, message: dict[str, Any], headers: Mapping[str, str]) -> httpx.Response:
        return await self.http.post(self.url, json={"jsonrpc": "2.0", **message}, headers=dict(headers), timeout=20)


@asynccontextmanager
async def caller(crowd: Crowd, query: str = "", owner: str = "ann") -> AsyncGenerator[Caller]:
    async with httpx.AsyncClient(trust_env=False) as http:
        yield Caller(http, crowd.hive.url + query, bearer(crowd, owner))


@asynccontextmanager
async def sdk_server(tools: list[dict[str, Any]], like: types.Implementation) -> AsyncGenerator[Caller]:
    """Serve a list by the SDK alone."""

    async def listing(ctx: Any, params: Any) -> dict[str, Any]:
        del ctx, params
        return {"tools": tools, "resultType": "complete"}

    server = Server[Any](
        like.name, version=like.version, title=like.title, cache_hints={"tools/list": CacheHint(ttl_ms=0)}
    )
    server.add_request_handler("tools/list", types.PaginatedRequestParams, listing)
    unguarded = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    manager = StreamableHTTPSessionManager(server, security_settings=unguarded)
    async with manager.run(), httpx.AsyncClient(transport=httpx.ASGITransport(manager.handle_request)) as http:
        yield Caller(http, "http://sdk/mcp", {})


def message(answer: httpx.Response) -> dict[str, Any]:
    """Return what was answered, read as an event stream is: by its lines and no other line ends."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return json.loads(answer.content)
    (data,) = [line[6:] for line in re.split(rb"\r\n|\n|\r", answer.content) if line.startswith(b"data: ")]
    return json.loads(data)


def as_dicts(crowd: Crowd, *, sandboxes: bool) -> list[dict[str, Any]]:
    """Return what is to be listed, made without any of the bytes that are kept."""
    shown = crowd.hive.sandboxes.registry.of(ANN, DEFAULT_SCOPE) if sandboxes else []
    recipes = "Recipes: " + "; ".join(f"{recipe.name} ({recipe.description})" for recipe in Catalog.load(())) + "."
    tools = listed_hive_tools(recipes)
    for sandbox in listed_sandboxes(shown, lambda _: None, most=None):
        assert sandbox.toolset is not None
        listed = sandbox.toolset.listing(sandbox.session, 50).tools
        tools += [tool.to_json(f"{sandbox.session}_{name}") for name, tool in listed]
    return tools


@pytest.mark.parametrize("query", ["?expand=all", "?expand=none", ""])
@pytest.mark.parametrize("version", [*HANDSHAKE, MODERN])
@pytest.mark.parametrize("request_id", [7, 'x"tools":[]y'])
async def test_the_answer_is_the_one_that_the_sdk_would_write(
    rich: Crowd, version: str, query: str, request_id: Any
) -> None:
    async with sdk_client(rich, "", "auto") as client:
        like = client.server_info
    assert like is not None
    expected_tools = as_dicts(rich, sandboxes=query != "?expand=none")
    async with caller(rich, query) as ours, sdk_server(expected_tools, like) as sdk:
        answer, expected = await ours.list(version, request_id), await sdk.list(version, request_id)
    assert message(answer) == message(expected)
    assert (answer.status_code, answer.headers["content-type"]) == (200, expected.headers["content-type"])
    assert len(message(answer)["result"]["tools"]) == len(expected_tools)
    if "content-length" in expected.headers:
        assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
async def test_no_page_is_longer_than_a_client_takes(sixty_large: Crowd, version: str) -> None:
    sizes: list[int] = []
    cursor: dict[str, str] = {}
    async with caller(sixty_large, "?expand=all") as ours:
        while not sizes or cursor:
            answer = await ours.list(version, **cursor)
            sizes.append(len(answer.content))
            following = message(answer)["result"].get("nextCursor")
            cursor = {"cursor": following} if following is not None else {}
    assert max(sizes) < EVENT_LIMIT and len(sizes) == -(-sum(sizes) // (960 * 1024))


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
@pytest.mark.parametrize("cursor", ["nonsense", "", "bnVsbA==", "x" * 3000])
async def test_a_bad_cursor_is_told_so(rich: Crowd, version: str, cursor: str) -> None:
    async with caller(rich, "?expand=all") as ours:
        answer = await ours.list(version, cursor=cursor)
    error = message(answer)["error"]
    assert error["code"] == -32602 and "list again without one" in error["message"]
    assert answer.status_code == (400 if version == MODERN else 200)


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
async def test_a_cursor_of_another_shows_only_ones_own(sixty_large: Crowd, version: str) -> None:
    async with caller(sixty_large, "?expand=all") as ann, caller(sixty_large, "?expand=all", "bob") as bob:
        cursor = message(await ann.list(version))["result"]["nextCursor"]
        assert message(await bob.list(version, cursor=cursor))["result"]["tools"] == []


async def test_a_request_that_disagrees_with_itself_is_refused_as_ever(rich: Crowd) -> None:
    async with caller(rich) as ours:
        ours.headers["mcp-name"] = "a"  # no part of a list
        assert (await ours.list(MODERN)).status_code == 200
        body: dict[str, Any] = {"id": 1, "method": "tools/list", "params": {}}
        head = {**ours.headers, "mcp-protocol-version": MODERN}
        for headers in ({**head, "mcp-method": "tools/call"}, {**head, "mcp-method": "tools/list"}, head):
            answer = await ours.post(body, headers)
            assert answer.status_code == 400 and "error" in answer.json()


async def test_a_session_that_is_unknown_or_anothers_has_no_list(rich: Crowd) -> None:
    body: dict[str, Any] = {"id": 1, "method": "tools/list", "params": {}}
    async with caller(rich) as ann, caller(rich, owner="bob") as bob:
        inside = await ann.opened("2025-11-25")
        good = await ann.post(body, {**ann.headers, **inside})
        foreign = await bob.post(body, {**bob.headers, **inside})
        unknown = await ann.post(body, {**ann.headers, **inside, "mcp-session-id": "f" * 32})
    assert good.status_code == 200 and len(message(good)["result"]["tools"]) > 6
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.content == unknown.content


async def test_lists_at_once_do_not_mix(rich: Crowd) -> None:
    found: dict[str, list[int]] = {"all": [], "none": []}

    async def ask(ours: Caller, expand: str, inside: Mapping[str, str]) -> None:
        for number in range(10):
            body: dict[str, Any] = {"id": f"{expand}{number}", "method": "tools/list", "params": {}}
            said = message(await ours.post(body, {**ours.headers, **inside}))
            assert said["id"] == f"{expand}{number}"
            found[expand].append(len(said["result"]["tools"]))

    async with caller(rich, "?expand=all") as first, caller(rich, "?expand=none") as second:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for ours, expand_to in ((first, "all"), (second, "none")):
                    inside = await ours.opened("2025-11-25")
                    group.start_soon(ask, ours, expand_to, inside)
                    group.start_soon(ask, ours, expand_to, inside)
    assert set(found["all"]) == {len(OWN) + 3 * len(RICH)} and set(found["none"]) == {len(OWN)}
