"""One sandbox can slow the egress proxy down for itself, and for no other."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ash_hub.egress import exchange
from ash_hub.egress.refusal import Refusal
from ash_hub.egress.tls import read_hello
from ash_hub.egress.wire import End, read_head, read_line
from tests.hub.egress.egress_parts import (
    WAIT_SECONDS,
    Names,
    Wires,
    ask,
    built_hello,
    connect,
    error_of,
    get,
    proxying,
)
from tests.hub.egress.test_egress_process import Process, asked, process

pytestmark = pytest.mark.anyio

LINES = 1000
NEVER = 3600.0
"""Seconds; longer than any test waits for an answer."""
PUBLIC = "93.184.216.34"


class Turns:
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.count += 1


@pytest.mark.parametrize(("read", "ending"), [(read_line, b"\r\n"), (read_head, b"\r\n\r\n")])
async def test_what_has_come_already_is_read_in_turn_with_others(read: Any, ending: bytes) -> None:
    turns, reader = Turns(), asyncio.StreamReader()
    reader.feed_data((b"a" + ending) * LINES)
    counting = asyncio.create_task(turns.run())
    end = End(reader, None)  # pyright: ignore[reportArgumentType] - nothing is written
    for _ in range(LINES):
        await read(end)
    counting.cancel()
    with suppress(asyncio.CancelledError):
        await counting
    assert turns.count >= LINES - 1


async def test_of_a_name_s_many_addresses_only_the_first_are_looked_at() -> None:
    names, wires = Names({"many.example": [["10.0.0.1"] * 1000 + [PUBLIC]]}), Wires()
    async with proxying("internet", names=names, dialling=wires) as it:
        assert error_of(await ask(it.path, get("http://many.example/")))["reason"] == "private"
    assert wires.dialled == []


def test_a_hello_of_very_many_extensions_is_not_read() -> None:
    assert read_hello(built_hello(*((kind, b"") for kind in range(100, 160)))) is not None
    with pytest.raises(Refusal):
        read_hello(built_hello(*((kind, b"") for kind in range(100, 5000)), records=2))


@contextmanager
def two_sandboxes(
    folder: Path, policy: list[str], *launcher: str
) -> Generator[tuple[Process, socket.socket, socket.socket]]:
    """Start the proxy for a sandbox that floods it, under a policy, and for another."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        it = stack.enter_context(process(*launcher))
        assert it.told()["ready"] is True
        for number, listener in enumerate(listeners):
            listener.bind(str(folder / f"p{number}"))
            listener.listen(200)
            it.tell(
                {
                    "op": "add",
                    "id": f"sbx-{number}",
                    "policy": policy if number == 0 else "none",
                    "limits": {"head_seconds": NEVER},
                },
                listener,
            )
        yield it, listeners[0], listeners[1]


def connections(listener: socket.socket, count: int, stack: ExitStack) -> Iterator[socket.socket]:
    for _ in range(count):
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(WAIT_SECONDS)
        client.connect(listener.getsockname())
        yield client


def answered(other: socket.socket) -> None:
    """Require that a sandbox is answered."""
    assert error_of(asked(other, get("http://example.com/")))["reason"] == "no_network"


def flood(client: socket.socket) -> None:
    with suppress(OSError):
        while True:
            client.sendall(b"1\r\na\r\n" * LINES)


def drain(connection: socket.socket) -> None:
    with suppress(OSError):
        while connection.recv(65_536):
            pass


def shut(ends: list[socket.socket]) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def test_a_flood_of_small_chunks_keeps_no_other_sandbox_waiting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:
        port = server.getsockname()[1]
        head = get(f"http://127.0.0.1:{port}/", "Transfer-Encoding: chunked").replace(b"GET", b"POST", 1)
        _, greedy, other = stack.enter_context(two_sandboxes(tmp_path, [f"127.0.0.1:{port}"]))
        ends: list[socket.socket] = []
        threads: list[Thread] = []
        for client in connections(greedy, 8, stack):
            client.sendall(head)
            reading, _ = server.accept()
            stack.enter_context(reading)
            reading.settimeout(WAIT_SECONDS)
            assert reading.recv(65_536)
            ends += client, reading
            for thread in (Thread(target=flood, args=(client,)), Thread(target=drain, args=(reading,))):
                thread.start()
                stack.callback(thread.join)
                threads.append(thread)
        stack.callback(shut, ends)
        for _ in range(3):
            answered(other)
        assert all(thread.is_alive() for thread in threads)  # the flood goes on


def test_a_sandbox_that_takes_all_descriptors_leaves_some_to_others(tmp_path: Path) -> None:
    descriptors = 120
    launcher = "prlimit", f"--nofile={descriptors}:{descriptors}"
    with ExitStack() as stack:
        it, greedy, other = stack.enter_context(two_sandboxes(tmp_path, ["example.com"], *launcher))
        held = list(connections(greedy, descriptors, stack))
        for _ in range(3):
            answered(other)
        assert select.select(held, [], [], 0)[0] == []  # all of these are still there
        it.tell({"op": "stats", "n": 1})
        while "stats" not in (told := it.told()):
            pass
        assert told["stats"]["sbx-0"]["open"] == descriptors // 4
        # There is room for those that wait as soon as others have ended.
        for client in held[:-1]:
            client.close()
        held[-1].sendall(get("http://evil.org/"))
        assert b"not_listed" in held[-1].recv(65_536)


async def test_a_sandbox_that_is_let_go_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_CLOSE_SECONDS", 2 * WAIT_SECONDS)
    names = Names({"example.com": [[PUBLIC]]})

    async def endless(connection: socket.socket) -> None:
        with suppress(OSError):
            while True:
                await asyncio.get_running_loop().sock_sendall(connection, bytes(65_536))

    async with asyncio.timeout(WAIT_SECONDS) as bound:
        async with proxying("internet", names=names, dialling=Wires(endless)) as it:
            reader, writer = await asyncio.open_unix_connection(it.path, limit=1024)
            writer.write(connect("example.com:443"))
            await reader.readuntil(b"\r\n\r\n")
            before = 0
            while not before or before != it.proxy.stats()["bytes"]:  # until nothing more finds room
                before = it.proxy.stats()["bytes"]
                await asyncio.sleep(0.05)
        assert not bound.expired()  # the proxy's own end takes the cancellation for its own
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
