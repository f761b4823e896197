"""What bounds the use of the egress proxy: sizes, times, connections, and how much is told of it."""

from __future__ import annotations

import asyncio
import json

import pytest

from ash_hub.egress.audit import Audit, Record
from ash_hub.egress.limits import Limits
from tests.hub.egress.egress_parts import (
    WAIT_SECONDS,
    Names,
    Wires,
    ask,
    connect,
    echo,
    error_of,
    get,
    proxying,
    silent,
)

pytestmark = pytest.mark.anyio

PUBLIC = "93.184.216.34"


async def test_a_head_that_is_too_long_or_too_slow_is_refused() -> None:
    async with proxying("internet", limits=Limits(head_bytes=1024)) as it:
        long = await ask(it.path, get("http://example.com/", "X: " + "a" * 5000))
    async with proxying("internet", limits=Limits(head_seconds=0.1)) as it:
        slow = await ask(it.path, b"GET http://exam")
    assert error_of(long)["reason"] == "head_too_long" and b" 431 " in long
    assert error_of(slow)["reason"] == "slow_request"


async def test_connections_over_the_limit_are_told_so_and_room_comes_back() -> None:
    names, limits = Names({"example.com": [[PUBLIC]]}), Limits(connections=2)
    async with proxying("internet", names=names, dialling=Wires(echo), limits=limits) as it:
        async with asyncio.timeout(WAIT_SECONDS):
            held = [await asyncio.open_unix_connection(it.path) for _ in range(2)]
            for reader, writer in held:
                writer.write(connect("example.com:443"))
                await reader.readuntil(b"\r\n\r\n")
            crowded = await ask(it.path, get("http://example.com/"))
            assert error_of(crowded)["reason"] == "too_many_connections" and b" 429 " in crowded
            for reader, writer in held:
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            while it.proxy.stats()["open"]:
                await asyncio.sleep(0.001)
        assert it.proxy.stats() == {"open": 0, "accepted": 3, "bytes": 0, "look_ups": 0}


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(idle_seconds=0.05), "idle_seconds"),
        (Limits(total_seconds=0.05), "total_seconds"),
        (Limits(connection_bytes=1000), "connection_bytes"),
        (Limits(sandbox_bytes=1000), "sandbox_bytes"),
    ],
)
async def test_a_connection_that_reaches_a_limit_is_cut(limits: Limits, reason: str) -> None:
    names = Names({"example.com": [[PUBLIC]]})
    async with proxying("internet", names=names, dialling=Wires(silent), limits=limits) as it:
        then = bytes(2000) if reason.endswith("bytes") else b"x"
        async with asyncio.timeout(WAIT_SECONDS):
            answer = b""
            while not answer:
                try:
                    answer = await ask(it.path, connect("example.com:443"), then=then)
                except asyncio.IncompleteReadError:
                    assert reason.endswith("seconds")  # over before the tunnel was there: the machine is busy
    assert answer == b"HTTP/1.1 200 Connection established\r\n\r\n"
    assert it.reasons()[-2:] == [("allowed", "policy"), ("cut", reason)]


def test_a_flood_of_decisions_is_told_in_part_and_counted_in_whole() -> None:
    sent: list[Record] = []

    def send(record: Record) -> bool:
        sent.append(record)
        return True

    audit = Audit(send, sandbox="sbx-test")
    for _ in range(1000):
        audit({"decision": "refused"})
    assert 200 <= len(sent) < 1000
    assert json.dumps(sent[0])


def test_a_record_that_finds_no_room_is_counted_in_the_next() -> None:
    sent: list[Record] = []
    room = iter([False, False, True])

    def send(record: Record) -> bool:
        if there := next(room):
            sent.append(record)
        return there

    audit = Audit(send)
    for _ in range(3):
        audit({})
    assert [record["omitted"] for record in sent] == [2]
