"""Places in uvloop's epoll: taken before uvloop asks, and kept while nothing is read."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from ash_router.bounds import epoll_watches


class Reader(asyncio.Protocol):
    def __init__(self) -> None:
        self.got = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.got.set()


def on_uvloop(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await test()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


def watched() -> set[int]:
    """Return the descriptors in the running loop's epoll."""
    epoll = cast("Any", asyncio.get_running_loop())._get_backend_id()
    lines = Path(f"/proc/self/fdinfo/{epoll}").read_text().splitlines()
    return {int(line.split()[1]) for line in lines if line.startswith("tfd:")}


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def came(descriptor: int) -> None:
    """Return when there is something to read, and the loop has had the time to see it."""
    await asyncio.to_thread(select.select, [descriptor], [], [])
    await turns()


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_a_connection_has_its_place_before_the_loop_watches_it_and_keeps_it_while_it_is_paused(tmp_path: Path) -> None:
    async def test() -> None:
        with listening(tmp_path / "s") as listener:
            ours = epoll_watches.connected(tmp_path / "s")
            assert ours.fileno() in watched()
            theirs, _ = listener.accept()
            loop = asyncio.get_running_loop()
            transport, reader = await loop.create_unix_connection(Reader, sock=ours)
            await turns()
            epoll_watches.pause(transport)
            with theirs:
                theirs.send(b"x")
                await came(ours.fileno())
                assert ours.fileno() in watched() and not reader.got.is_set()
                epoll_watches.resume(transport)
                await reader.got.wait()
            transport.abort()

    on_uvloop(test)


def test_where_there_is_no_place_no_connection_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def take_reserved(self, descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def test() -> None:
        monkeypatch.setattr(epoll_watches, "_places", Full)
        with listening(tmp_path / "s") as listener:
            with pytest.raises(OSError, match="No space left"):
                epoll_watches.connected(tmp_path / "s")
            theirs, _ = listener.accept()
            with theirs:
                assert theirs.recv(1) == b""

    on_uvloop(test)


def test_a_reserved_place_is_given_up_for_a_connection_and_put_by_again(tmp_path: Path) -> None:
    async def test() -> None:
        with listening(tmp_path / "s"), epoll_watches.connected(tmp_path / "s") as first:
            places = cast("Any", epoll_watches)._places()
            real, refused = places.epoll, [2]

            class Full:
                """Refuses as often as it is told to."""

                def register(self, descriptor: int, mask: int) -> None:
                    if refused[0]:
                        refused[0] -= 1
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    real.register(descriptor, mask)

            held = len(places._held)
            places.epoll = Full()
            with epoll_watches.connected(tmp_path / "s") as second:
                assert {first.fileno(), second.fileno()} <= watched()
            assert refused == [0] and len(places._held) == held

    on_uvloop(test)


def test_who_is_turned_away_hears_why_although_it_has_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoll_watches, "_LINGER_SECONDS", 0.01)

    class Refusing(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            epoll_watches.turn_away(cast("asyncio.Transport", transport), b"no room")

    async def test() -> None:
        server = await asyncio.get_running_loop().create_unix_server(Refusing, str(tmp_path / "s"))
        async with server:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "s"))
                client.send(b"a question")
                await came(client.fileno())
                assert client.recv(99) == b"no room" and client.recv(1) == b""
            while cast("Any", epoll_watches)._lingering:
                await asyncio.sleep(0.01)

    on_uvloop(test)
