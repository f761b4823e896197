"""A sandbox's proxy whose policy is changed while connections are open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from ash_hub.egress.names import Address
from ash_hub.egress.policy import Policy
from tests.hub.egress.egress_parts import (
    WAIT_SECONDS,
    Names,
    Proxy,
    Wires,
    ask,
    connect,
    echo,
    error_of,
    get,
    proxying,
)

pytestmark = pytest.mark.anyio

NAMES = {"a.test": [["93.184.216.34"]], "b.test": [["93.184.216.35"]]}
ALIASES = ("a.test=10.0.0.7:443", "b.test=10.0.0.8:443")
"""Named addresses, so that a tunnel under a list need not speak TLS."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Tunnel:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def is_open(self) -> bool:
        """Say whether bytes still come back; one that is closed says so at once."""
        async with asyncio.timeout(WAIT_SECONDS):
            try:
                self.writer.write(b"ping")
                return await self.reader.readexactly(4) == b"ping"
            except (ConnectionError, asyncio.IncompleteReadError):
                return False


@asynccontextmanager
async def tunnel(it: Proxy, target: str) -> AsyncGenerator[Tunnel]:
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_unix_connection(it.path)
        writer.write(connect(target))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    try:
        yield Tunnel(reader, writer)
    finally:
        writer.transport.abort()


async def test_a_narrower_policy_ends_the_tunnels_that_it_refuses_and_no_other() -> None:
    async with proxying("internet", names=Names(NAMES), dialling=Wires(echo)) as it:
        async with tunnel(it, "a.test:443") as one, tunnel(it, "b.test:80") as two:
            assert await one.is_open() and await two.is_open()
            it.proxy.set_policy(Policy.parse("none"))
            assert not await one.is_open() and not await two.is_open()
            assert error_of(await ask(it.path, get("http://a.test/")))["reason"] == "no_network"
        assert it.reasons()[2:] == [("cut", "policy_changed")] * 2 + [("refused", "no_network")]
        assert {record["target"] for record in it.records[2:4]} == {"a.test:443", "b.test:80"}
        assert {record["policy"] for record in it.records[2:]} == {"none"}


async def test_a_tunnel_stays_where_the_new_policy_grants_the_same() -> None:
    hello = [f"{name}.test" for name in "ab"]
    async with proxying([*hello, *ALIASES], names=Names(NAMES), dialling=Wires(echo)) as it:
        async with tunnel(it, "a.test:443"), tunnel(it, "b.test:443"):
            it.proxy.set_policy(Policy.parse(["a.test"]))
            assert [record["target"] for record in it.records] == ["b.test:443"]


async def test_a_tunnel_whose_server_name_nobody_checked_ends_where_it_would_be_now() -> None:
    async with proxying("internet", names=Names(NAMES), dialling=Wires(echo)) as it:
        async with tunnel(it, "a.test:443") as it_was:
            assert await it_was.is_open()
            it.proxy.set_policy(Policy.parse(["a.test"]))
            assert not await it_was.is_open()


async def test_a_wider_policy_ends_nothing() -> None:
    async with proxying(["a.test"], names=Names(NAMES), dialling=Wires(echo)) as it:
        async with tunnel(it, "a.test:443"):
            it.proxy.set_policy(Policy.parse("internet"))
            async with tunnel(it, "b.test:443") as wider:
                assert await wider.is_open()
            assert it.reasons() == [("allowed", "policy")]


async def test_a_request_that_is_still_looked_up_is_not_dialled_under_the_policy_of_before() -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(name: str, *, as_host_does: bool) -> Sequence[Address]:
        asked.set()
        await go_on.wait()
        return await Names(NAMES)(name, as_host_does=as_host_does)

    wires = Wires(echo)
    async with proxying("internet", names=slow, dialling=wires) as it:
        request = asyncio.create_task(ask(it.path, connect("a.test:443")))
        async with asyncio.timeout(WAIT_SECONDS):
            await asked.wait()
            it.proxy.set_policy(Policy.parse("none"))
            go_on.set()
            assert await request == b""
    assert wires.dialled == [] and it.reasons() == [("cut", "policy_changed")]


async def test_a_request_whose_head_is_not_whole_is_decided_by_the_policy_of_now() -> None:
    async with proxying("internet", names=Names(NAMES), dialling=Wires(echo)) as it, asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_unix_connection(it.path)
        head = get("http://a.test/")
        writer.write(head[:20])
        while it.proxy.stats()["open"] == 0:
            await asyncio.sleep(0)
        it.proxy.set_policy(Policy.parse("none"))
        writer.write(head[20:])
        assert error_of(await reader.read(-1))["reason"] == "no_network"
        writer.close()
