"""A flood of one principal's requests that are there already does not come before another's one."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_router.calls.passage import Passage
from tests.router.relay_parts import Rig, modern, open_rig, tool_call
from tests.router.sandbox_parts import STREAM_HEAD, chunk, open_script, read_request, response

pytestmark = pytest.mark.anyio

FLOOD = 60
LENGTH = re.compile(rb"content-length: (\d+)")
ANSWER = response(json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"content": [], "isError": False}}).encode())


def by_name(who: str) -> bytes:
    return modern("sb1_add", tool_call("sb1_add", {"who": who}), more=f"x-principal: {who}\r\n")


def by_header(who: str) -> bytes:
    return modern("add", tool_call("add", {"who": who}), more=f"x-principal: {who}\r\nx-session-id: sb1\r\n")


def stream(who: str) -> bytes:
    more = f"x-principal: {who}\r\nx-session-id: sb1\r\nlast-event-id: {who}\r\n"
    return f"GET /mcp HTTP/1.1\r\nhost: hub\r\n{more}\r\n".encode()


def of_the_hive(who: str) -> bytes:
    return f"GET /plain HTTP/1.1\r\nhost: hub\r\nx-principal: {who}\r\n\r\n".encode()


@contextmanager
def connections(rig: Rig, count: int) -> Generator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", rig.port))) for _ in range(count)]


async def send_all(rig: Rig, wires: Sequence[socket.socket], requests: Sequence[bytes]) -> None:
    """Have the hive find all these requests in one look, each on a connection of its own."""
    await until(lambda: len(rig.server.server_state.connections) == len(wires))
    for wire, request in zip(wires, requests, strict=True):
        wire.sendall(request)  # without a turn of the loop between two


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not holds():
            await asyncio.sleep(0)


@pytest.mark.parametrize("kind", [by_name, by_header, stream])
async def test_a_call_reaches_its_sandbox_before_anothers_flood(tmp_path: Path, kind: Callable[[str], bytes]) -> None:
    order: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            asked = await reader.readuntil(b"\r\n\r\n")
            if (length := LENGTH.search(asked)) is not None:
                asked += await reader.readexactly(int(length[1]))
            order.append("bob" if b"bob" in asked else "ann")
            writer.write(ANSWER if length is not None else STREAM_HEAD + chunk(b":\n\n"))

    async with open_rig(tmp_path) as rig, open_script(tmp_path, note) as its_socket:
        for who in ("ann", "bob"):
            await rig.bind("sb1", its_socket, owner=who)
        with connections(rig, FLOOD + 1) as wires:
            await send_all(rig, wires, [*map(kind, ["ann"] * FLOOD), kind("bob")])
            await until(lambda: len(order) > FLOOD)
    assert order.index("bob") < 8


async def test_a_request_to_the_hive_begins_before_anothers_flood(tmp_path: Path) -> None:
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        order.append(dict(scope["headers"])[b"x-principal"].decode())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with open_rig(tmp_path, app=app) as rig:
        with connections(rig, FLOOD + 1) as wires:
            await send_all(rig, wires, [*map(of_the_hive, ["ann"] * FLOOD), of_the_hive("bob")])
            await until(lambda: len(order) > FLOOD)
    assert order.index("bob") < 8


async def test_who_leaves_while_it_waits_for_its_turn_reaches_nobody(tmp_path: Path) -> None:
    order: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            order.append("ann")
            writer.write(ANSWER)

    async with open_rig(tmp_path) as rig, open_script(tmp_path, note) as its_socket:
        await rig.bind("sb1", its_socket, owner="ann")
        with connections(rig, FLOOD) as wires:
            await send_all(rig, wires, [by_name("ann")] * FLOOD)
            await until(lambda: len(rig.relay.services.turns) > FLOOD // 2)
        await until(lambda: not rig.ledger.in_flight.get("ann", 0))
        assert len(rig.relay.services.turns) == 0
    assert len(order) < FLOOD


async def test_a_call_reaches_its_sandbox_before_anothers_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, read, open_bodies = 30, 0, 0
    came = asyncio.Event()

    def body(passage: Passage, data: bytes) -> None:
        nonlocal read
        read += len(data)
        taken(passage, data)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_bodies
        if b"PUT" not in await reader.readuntil(b"\r\n\r\n"):
            came.set()
        open_bodies += 1
        while await reader.read(2**20):
            pass
        writer.close()

    taken = Passage.body
    monkeypatch.setattr(Passage, "body", body)
    put = b"PUT /s/sb1/files/f HTTP/1.1\r\nhost: hub\r\nx-principal: ann\r\ncontent-length: 100000000\r\n\r\nx"
    async with open_rig(tmp_path) as rig, open_script(tmp_path, take) as its_socket:
        for who in ("ann", "bob"):
            await rig.bind("sb1", its_socket, owner=who)
        with connections(rig, uploads + 1) as wires:
            await send_all(rig, wires, [put] * uploads + [b""])
            await until(lambda: open_bodies == uploads and len(rig.relay.services.turns) == 0)
            sent = 0
            for wire in wires[:uploads]:
                wire.setblocking(False)
                sent += wire.send(bytes(2**22))
            wires[-1].sendall(by_header("bob"))
            read = 0
            with anyio.fail_after(20):
                await came.wait()
            # of each connection one part was read, of up to 256 KiB, and of what was left some parts in their turns
            assert read < uploads * 2**18 + 2**21 and read < sent / 2, (read, sent)
            assert len(rig.relay.services.turns) > 0
            for wire in wires:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close resets it
        await until(lambda: not rig.ledger.in_flight)
        assert len(rig.relay.services.turns) == 0
        assert read < sent
