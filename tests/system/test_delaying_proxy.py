"""The proxy that stands for distance: how late, in which order, and what a cut is to those at both ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Final

import anyio
import pytest

from tests.delaying_proxy import DelayingProxy, delaying

pytestmark = pytest.mark.anyio

DELAY: Final = 0.1
SLACK: Final = 1.0
"""Of a busy machine."""
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
async def proxy() -> AsyncGenerator[DelayingProxy]:
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        async with delaying(server.sockets[0].getsockname()[1], delay_seconds=DELAY) as proxy:
            yield proxy


@pytest.fixture
async def ends(proxy: DelayingProxy) -> AsyncGenerator[Ends]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    yield reader, writer
    writer.transport.abort()


async def round_trip(ends: Ends, words: bytes) -> float:
    start = time.monotonic()
    with anyio.fail_after(30):
        ends[1].write(words)
        assert await ends[0].readexactly(len(words)) == words
    return time.monotonic() - start


async def test_an_answer_comes_after_both_ways_and_the_delay_can_be_set(proxy: DelayingProxy, ends: Ends) -> None:
    for seconds in (DELAY, 0.3):
        proxy.delay_seconds = seconds
        took = [await round_trip(ends, b"hello") for _ in range(3)]
        assert 2 * seconds <= min(took) < 2 * seconds + SLACK  # a busy machine adds to some


async def test_chunks_wait_beside_each_other_and_stay_in_order(proxy: DelayingProxy, ends: Ends) -> None:
    proxy.jitter_seconds = 0.05
    sent = [b"%04d" % number for number in range(100)]
    start = time.monotonic()
    for chunk in sent:
        ends[1].write(chunk)
        await anyio.sleep(0.002)
    with anyio.fail_after(30):
        assert await ends[0].readexactly(400) == b"".join(sent)
    assert time.monotonic() - start < 10  # one after the other they would take 20 s


async def test_distance_takes_no_bandwidth(ends: Ends) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(ends[1].drain)
        took = [await round_trip(ends, bytes(16 * 2**20)) for _ in range(3)]
        assert min(took) < 2 * DELAY + 2 * SLACK


async def test_the_end_of_what_is_sent_passes_and_comes_last(ends: Ends) -> None:
    ends[1].write(b"last words")
    ends[1].write_eof()
    with anyio.fail_after(30):
        assert await ends[0].read() == b"last words"


async def test_a_closed_cut_ends_connections_and_refuses_new_ones_until_it_heals(
    proxy: DelayingProxy, ends: Ends
) -> None:
    await round_trip(ends, b"hello")
    ends[1].write(b"on its way")
    await proxy.cut("closed")
    with anyio.fail_after(30):
        assert await ends[0].read() == b""
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
    await proxy.heal()
    again = await asyncio.open_connection("127.0.0.1", proxy.port)
    await round_trip(again, b"hello")
    again[1].close()


async def test_a_silent_cut_holds_what_is_sent_and_answers_nobody_until_it_heals(
    proxy: DelayingProxy, ends: Ends
) -> None:
    await round_trip(ends, b"hello")
    await proxy.cut("silent")
    new = await asyncio.open_connection("127.0.0.1", proxy.port)
    for _, writer in (ends, new):
        writer.write(b"held")
    for reader, _ in (ends, new):
        with pytest.raises(TimeoutError), anyio.fail_after(3 * DELAY):
            await reader.read(1)
    await proxy.heal()
    for reader, _ in (ends, new):
        with anyio.fail_after(30):
            assert await reader.readexactly(4) == b"held"
    new[1].close()


async def test_a_silent_cut_can_become_a_closed_one(proxy: DelayingProxy, ends: Ends) -> None:
    await round_trip(ends, b"hello")
    await proxy.cut("silent")
    ends[1].write(b"lost")
    await proxy.cut("closed")
    with anyio.fail_after(30):
        assert await ends[0].read() == b""
    await proxy.heal()
