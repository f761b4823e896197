"""A proxy whose policy may be acted on for a while only: at no step does anything go on after that."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress

import pytest

from ash_hub.egress.lease import Lease
from ash_hub.egress.limits import Limits
from ash_hub.egress.names import Address
from ash_hub.egress.policy import Policy
from tests.hub.egress.egress_parts import WAIT_SECONDS, Names, Wires, ask, connect, echo, error_of, get, proxying

pytestmark = pytest.mark.anyio

NAMES = {"a.test": [["93.184.216.34"]], "b.test": [["93.184.216.35"]]}
FOR_EVER = 1e9
SHORT_SECONDS = 0.3


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def now() -> float:
    return asyncio.get_running_loop().time()


async def lapsed(lease: Lease) -> None:
    """Return when a lease that was renewed for a short while does not hold any more."""
    with suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.05):
                await lease.held()
            await asyncio.sleep(0.02)


async def test_nothing_is_looked_up_before_there_is_an_answer() -> None:
    names, wires, lease = Names(NAMES), Wires(echo), Lease()
    async with proxying("internet", names=names, dialling=wires, lease=lease) as it:
        asked = asyncio.create_task(ask(it.path, get("http://a.test/")))
        await asyncio.sleep(SHORT_SECONDS)
        assert not names.asked and not it.records
        it.proxy.set_policy(Policy.parse("none"))
        lease.renew(FOR_EVER)
        assert error_of(await asked)["reason"] == "no_network"
        assert not names.asked and not wires.dialled


async def test_a_request_that_nobody_can_decide_on_is_told_so() -> None:
    async with proxying("internet", limits=Limits(connect_seconds=SHORT_SECONDS), lease=Lease()) as it:
        assert error_of(await ask(it.path, get("http://a.test/")))["reason"] == "hive_away"
        assert it.reasons() == [("failed", "hive_away")]


async def test_a_name_that_waits_for_its_turn_is_not_looked_up_after_the_lease() -> None:
    first, go_on, lease = asyncio.Event(), asyncio.Event(), Lease()
    asked: list[str] = []

    async def slow(name: str, *, as_host_does: bool) -> Sequence[Address]:
        asked.append(name)
        first.set()
        await go_on.wait()
        return await Names(NAMES)(name, as_host_does=as_host_does)

    async with proxying("internet", names=slow, limits=Limits(look_ups=1), dialling=Wires(), lease=lease) as it:
        lease.renew(now() + SHORT_SECONDS)
        one = asyncio.create_task(ask(it.path, get("http://a.test/")))
        await first.wait()
        other = asyncio.create_task(ask(it.path, get("http://b.test/")))
        await lapsed(lease)
        go_on.set()
        await asyncio.sleep(SHORT_SECONDS)
        assert asked == ["a.test"]
        lease.renew(FOR_EVER)
        assert {error_of(await each)["reason"] for each in (one, other)} == {"unreachable"}
        assert asked == ["a.test", "b.test"]


async def test_an_address_that_came_too_late_is_not_dialled() -> None:
    found, go_on, lease, wires = asyncio.Event(), asyncio.Event(), Lease(), Wires(echo)

    async def slow(name: str, *, as_host_does: bool) -> Sequence[Address]:
        found.set()
        await go_on.wait()
        return await Names(NAMES)(name, as_host_does=as_host_does)

    async with proxying("internet", names=slow, dialling=wires, lease=lease) as it:
        lease.renew(now() + SHORT_SECONDS)
        asked = asyncio.create_task(ask(it.path, connect("a.test:443")))
        await found.wait()
        await lapsed(lease)
        go_on.set()
        await asyncio.sleep(SHORT_SECONDS)
        assert not wires.dialled
        it.proxy.set_policy(Policy.parse("none"))
        lease.renew(FOR_EVER)
        assert await asked == b"" and not wires.dialled


async def test_what_is_open_stands_still_in_both_directions_and_goes_on() -> None:
    lease, server = Lease(), asyncio.Queue[asyncio.StreamWriter]()
    heard = bytearray()

    async def talk(connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        await server.put(writer)
        while data := await reader.read(100):
            heard.extend(data)

    async with proxying("internet", names=Names(NAMES), dialling=Wires(talk), lease=lease) as it:
        lease.renew(now() + SHORT_SECONDS)
        async with asyncio.timeout(WAIT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(it.path)
            writer.write(connect("a.test:443"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            there = await server.get()
            await lapsed(lease)
            writer.write(b"out")
            there.write(b"in")
            with suppress(TimeoutError):
                async with asyncio.timeout(SHORT_SECONDS):
                    pytest.fail(f"{await reader.read(1)!r} came in")
            assert not heard
            lease.renew(FOR_EVER)
            assert await reader.readexactly(2) == b"in"
            while bytes(heard) != b"out":
                await asyncio.sleep(0.01)
        for each in (writer, there):
            each.transport.abort()
