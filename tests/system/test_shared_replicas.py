"""Shares where several processes are one hive: two real hives, and a router alone, on one Redis that is emptied."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import fastmcp
import httpx
import pytest
from fastmcp.client.transports import StreamableHttpTransport
from pydantic import SecretStr

from ash_hub.app import Hive as HiveProcess
from ash_hub.app import open_hive
from ash_hub.bench.wire import modern_call
from ash_hub.router_alone import Router, open_router
from ash_hub.settings import HubSettings
from ash_mcp import Hive, Sandbox, Share
from tests.balancer import alternating
from tests.redis_server import RedisServer
from tests.system.crash_parts import Home, home

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy]

SOON: Final = 2.0
ERAS: Final = ("legacy", "2026-07-28")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def place(redis: RedisServer) -> Iterator[Home]:
    with home(ASH_HUB_REDIS_URL=redis.url) as place:
        yield place


@pytest.fixture
def urls(place: Home) -> tuple[str, str]:
    return place.start(), place.start()


@pytest.fixture
async def box(urls: tuple[str, str]) -> AsyncGenerator[Sandbox]:
    """A sandbox, as the first of the hives has it."""
    async with Hive(urls[0]) as hive:
        yield await hive.spawn("echo")


def door(share: Share, hive: str) -> str:
    """Return the URL of a share's door at another process."""
    return hive.removesuffix("/mcp") + "/s/" + share.url.partition("/s/")[2]


async def called(share: Share, url: str) -> httpx.Response:
    raw = modern_call("tools/call", {"name": "echo", "arguments": {"text": "hi"}}, share.headers)
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
    sent = {key: value for key, value in lines if key.lower() not in ("host", "content-length")}
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.post(door(share, url), content=body, headers=sent)


async def refused_after(share: Share, *urls: str) -> float:
    """Return how long every process took to refuse a share, in seconds."""
    began = time.monotonic()
    with anyio.fail_after(30):
        for url in urls:
            while (await called(share, url)).status_code != 401:
                await anyio.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("mode", ERAS)
async def test_what_one_gives_all_take_at_once_and_refuse_soon(urls: tuple[str, str], box: Sandbox, mode: Any):
    share, other = await box.share(tools=["echo"]), await box.share()
    transport = StreamableHttpTransport(door(share, urls[1]), headers=share.headers)
    async with fastmcp.Client(transport, mode=mode) as client:
        assert [tool.name for tool in await client.list_tools()] == ["echo"]
        assert "hi" in str(await client.call_tool("echo", {"text": "hi"}))
        async with Hive(urls[1]) as second:
            twin = await second.attach(box.id)
            assert [info.id for info in await twin.shares()] == [share.id, other.id]
            await twin.revoke_shares(share.id)
        assert await refused_after(share, *urls) < SOON
        with anyio.fail_after(SOON), pytest.raises(Exception, match=r"401|Unauthorized|unknown, revoked"):
            while True:  # on one connection a verdict holds for a quarter of a second
                await client.call_tool("echo", {"text": "hi"})
    for url in urls:
        assert (await called(other, url)).status_code == 200


async def test_a_session_of_a_guest_is_good_through_a_balancer_and_ends_with_the_share(
    urls: tuple[str, str], box: Sandbox
):
    share = await box.share()
    ports = [int(url.split(":")[2].split("/")[0]) for url in urls]
    async with alternating(ports) as balanced:
        transport = StreamableHttpTransport(door(share, f"http://127.0.0.1:{balanced}/mcp"), headers=share.headers)
        async with fastmcp.Client(transport, mode="legacy") as client:
            for number in range(6):
                assert str(number) in str(await client.call_tool("echo", {"text": str(number)}))
                assert "spawn" not in {tool.name for tool in await client.list_tools()}

            async def call() -> None:
                failed.append(await client.call_tool("slow", {"steps": 600, "seconds": 60}, raise_on_error=False))

            failed: list[Any] = []
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.sleep(0.5)
                await box.revoke_shares()
                with anyio.fail_after(SOON):
                    while not failed:
                        await anyio.sleep(0.02)
                group.cancel_scope.cancel()
            assert failed[0].is_error and "revoked" in str(failed[0].content)


async def test_an_emptied_redis_gives_back_no_revoked_share_and_loses_no_living_one(
    place: Home, urls: tuple[str, str], box: Sandbox, redis: RedisServer
):
    kept, revoked = await box.share(), await box.share()
    await box.revoke_shares(revoked.id)
    assert await refused_after(revoked, *urls) < SOON
    for _ in range(2):
        redis.ask("FLUSHALL")
        for _ in range(30):
            for url in urls:
                # 503 while it may be that the store only lacks it
                assert (await called(revoked, url)).status_code in (401, 503)
                assert (await called(kept, url)).status_code == 200
            await anyio.sleep(0.1)
    third = place.start()
    assert (await called(kept, third)).status_code == 200
    assert await refused_after(revoked, *urls, third) < 20


async def test_a_share_is_gone_with_its_sandbox_everywhere(urls: tuple[str, str], box: Sandbox):
    share = await box.share()
    assert (await called(share, urls[1])).status_code == 200
    await box.destroy()
    assert await refused_after(share, *urls) < SOON
    async with Hive(urls[1]) as second:
        again = await second.spawn("echo", session=box.session)
        assert again.id != box.id
        for url in urls:
            assert (await called(share, url)).status_code == 401


async def ticket(url: str, box: Sandbox, tool: str = "download_url") -> str:
    """Return path and query of a new ticket of a hive's, for a file."""
    async with fastmcp.Client(url) as client:
        made = await client.call_tool(tool, {"session": box.id, "path": "f"})
    assert made.structured_content is not None
    return str(made.structured_content["url"]).removeprefix(url.removesuffix("/mcp"))


async def used(target: str, url: str) -> tuple[int, str]:
    async with httpx.AsyncClient(timeout=20) as http:
        got = await http.get(url.removesuffix("/mcp") + target)
        return got.status_code, got.text if got.status_code == 200 else ""


async def test_a_ticket_is_good_once_on_any_replica_and_gone_with_an_emptied_store(
    urls: tuple[str, str], box: Sandbox, redis: RedisServer
):
    await box.files.write("f", "x")
    target = await ticket(urls[0], box)
    assert await used(target, urls[1]) == (200, "x")
    for url in urls:
        assert (await used(target, url))[0] == 401
    lost, left = await ticket(urls[1], box), await ticket(urls[0], box)
    redis.ask("FLUSHALL")
    for url in urls:
        assert (await used(lost, url))[0] == 401
    assert await used(await ticket(urls[1], box), urls[0]) == (200, "x")
    await box.destroy()
    for url in urls:
        assert (await used(left, url))[0] == 401


def settings(folder: Path, redis: RedisServer, run: str) -> HubSettings:
    return HubSettings(port=0, state_dir=folder / "s", run_dir=folder / run, redis_url=SecretStr(redis.url))


async def test_a_router_alone_takes_a_guests_calls_and_refuses_them_as_soon(folder: Path, redis: RedisServer):
    hive: HiveProcess
    router: Router
    async with (
        open_hive(settings(folder, redis, "r")) as hive,
        open_router(settings(folder, redis, "q")) as router,
        Hive(hive.url) as client,
    ):
        box = await client.spawn("echo")
        share, narrow = await box.share(), await box.share(tools=["whoami"])
        assert (await called(share, router.url)).status_code == 200
        refused = await called(narrow, router.url)
        assert (refused.status_code, refused.json()["error"]["kind"]) == (404, "tool_not_found")
        assert "there is no tool 'echo'; there are: whoami" in refused.json()["error"]["message"]
        async with httpx.AsyncClient(trust_env=False) as http:
            hello: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
            listed = await http.post(door(share, router.url), json=hello, headers=share.headers)
        assert (listed.status_code, listed.json()["error"]["kind"]) == (501, "unsupported")
        await box.revoke_shares(share.id)
        assert await refused_after(share, router.url, hive.url) < SOON


SERVE: Final = "mkdir -p www && echo seen > www/index.html && exec python3 -m http.server 8000 -d www -b 127.0.0.1"


async def served(client: Hive) -> tuple[Sandbox, Share]:
    """Return a sandbox that serves at a port, and a share of that."""
    box = await client.spawn("general", ports=[8000])
    await box.background(SERVE)
    return box, await box.share(ports=[8000])


async def seen(http: httpx.AsyncClient, url: str, share: Share) -> tuple[int, int]:
    """Return how the door of a shared port and its preview's host answer at one process."""
    parts, host = urlsplit(url), urlsplit(share.previews[8000]).hostname
    base, port = f"http://{parts.netloc}", f"/s/{share.url.split('/s/')[1].removesuffix('/mcp')}/ports/8000/"
    headers = {"host": f"{host}:{parts.port}", "cookie": f"ash-preview={share.token}"}
    by_door = await http.get(base + port, headers=share.headers)
    return by_door.status_code, (await http.get(base, headers=headers)).status_code


async def opened_and_closed(box: Sandbox, share: Share, *urls: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        with anyio.fail_after(20):
            while (await seen(http, urls[0], share))[0] == 502:
                await anyio.sleep(0.05)
        assert [await seen(http, url, share) for url in urls] == [(200, 200)] * len(urls)
        await box.revoke_shares(share.id)
        with anyio.fail_after(SOON):
            while [await seen(http, url, share) for url in urls] != [(401, 401)] * len(urls):
                await anyio.sleep(0.05)


async def test_a_port_is_reached_through_every_hive_and_closed_at_each(urls: tuple[str, str]):
    async with Hive(urls[0]) as client:
        await opened_and_closed(*await served(client), *urls)


async def test_a_router_alone_leads_to_ports_as_well(folder: Path, redis: RedisServer):
    hive: HiveProcess
    router: Router
    async with (
        open_hive(settings(folder, redis, "r")) as hive,
        open_router(settings(folder, redis, "q")) as router,
        Hive(hive.url) as client,
    ):
        await opened_and_closed(*await served(client), hive.url, router.url)
