"""How a sandbox's answer reaches the caller: framing, streams, failures, hostile heads, slow readers."""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import pytest

from ash_mcp.types import Endpoint
from ash_router.upstream.pool import ConnectionPool
from tests.router.relay_parts import CALL, Rig, answer_to, failure, modern, tool_call
from tests.router.sandbox_parts import EVENT, STREAM_HEAD, Script, chunk, open_script, read_request, response, says

pytestmark = pytest.mark.anyio


async def test_an_answer_with_a_length_keeps_it(rig: Rig):
    status, headers, body = await answer_to(rig, says(response(b'{"x":1}')))
    assert (status, body) == (200, b'{"x":1}')
    assert headers["content-length"] == "7"
    assert headers["ash-origin"] == "sandbox"
    assert len(headers["ash-nonce"]) == 32


async def test_every_answer_has_its_own_nonce(rig: Rig):
    async with open_script(rig.directory, says(response(b"{}"))) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        nonces: set[str] = set()
        for _ in range(3):
            await wire.send(CALL)
            nonces.add((await wire.answer())[1]["ash-nonce"])
    assert len(nonces) == 3


async def test_an_answer_in_chunks_is_whole(rig: Rig):
    parts = [STREAM_HEAD.replace(b"text/event-stream", b"application/json"), chunk(b'{"a":'), chunk(b"1}")]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for part in [*parts, b"0\r\nash-origin: hub\r\n\r\n"]:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)

    status, headers, body = await answer_to(rig, script)
    assert (status, body) == (200, b'{"a":1}')
    assert headers["ash-origin"] == "sandbox"


async def test_an_answer_that_ends_with_its_connection_is_whole(rig: Rig):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
    _, headers, body = await answer_to(rig, says(head + b'{"a":1}', then_close=True))
    assert body == b'{"a":1}'
    assert headers["transfer-encoding"] == "chunked"


async def test_an_interim_answer_is_skipped(rig: Rig):
    _, _, body = await answer_to(rig, says(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + response(b"{}")))
    assert body == b"{}"


@pytest.mark.parametrize("status", ["202 Accepted", "204 No Content", "404 Not Found", "500 Oh"])
async def test_another_status_of_the_sandbox_is_passed_on(rig: Rig, status: str):
    answered, headers, _ = await answer_to(rig, says(response(b"", status=status)))
    assert answered == int(status[:3])
    assert headers["ash-origin"] == "sandbox"
    assert ("content-length" in headers) == (answered != 204)


async def test_a_sandbox_cannot_speak_in_the_hives_name_or_act_on_its_origin(rig: Rig):
    forged = (
        "ash-origin: hub\r\nAsh-Nonce: guess\r\nset-cookie: a=b\r\nmcp-session-id: x\r\nserver: me\r\n"
        "access-control-allow-origin: *\r\nconnection: x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=1\r\n"
        "www-authenticate: Bearer\r\nlocation: http://x\r\nretry-after: 3\r\n"
    )
    _, headers, _ = await answer_to(rig, says(response(b"{}", more=forged)))
    assert headers["ash-origin"] == "sandbox"
    assert headers["ash-nonce"] != "guess"
    ours = {"date", "server"}
    assert set(headers) - ours == {"content-type", "content-length", "ash-origin", "ash-nonce", "retry-after"}


@pytest.mark.parametrize(
    "hostile",
    [
        response(b"", status="302 Found", more="location: http://127.0.0.1/\r\n"),
        response(b"", status="401 Unauthorized", more="www-authenticate: Bearer\r\n"),
        response(b"{}", more="content-encoding: gzip\r\n"),
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 999 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 5000,
        b"garbage",
    ],
)
async def test_an_answer_that_cannot_be_passed_on_is_a_typed_failure_of_the_hubs(rig: Rig, hostile: bytes):
    status, headers, body = await answer_to(rig, says(hostile))
    assert status == 200
    assert headers["ash-origin"] == "hub"
    assert "ash-nonce" in headers
    message = json.loads(body)
    assert (message["id"], message["result"]["resultType"]) == ("seven", "complete")
    assert failure(body)["kind"] == "remote_protocol_error"
    assert failure(body)["retryable"] is False


async def test_the_first_event_is_passed_on_before_the_second_is_sent(rig: Rig):
    go_on = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENT))
        await writer.drain()
        await go_on.wait()
        writer.write(chunk(EVENT) + b"0\r\n\r\n")

    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(CALL)
        _, headers = await wire.head()
        assert headers["content-type"] == "text/event-stream"
        assert await wire.chunk() == EVENT
        go_on.set()
        assert await wire.chunk() == EVENT
        assert await wire.chunk() == b""
        assert len(rig.ledger) == 0


def counting(connections: list[int], script: Script) -> Script:
    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        await script(reader, writer)

    return counted


@pytest.mark.parametrize(("reusable", "connections"), [(True, 1), (False, 3)])
async def test_a_connection_to_a_sandbox_is_used_again_while_it_is_good(rig: Rig, reusable: bool, connections: int):
    made: list[int] = []
    more = "" if reusable else "connection: close\r\n"
    async with open_script(rig.directory, counting(made, says(response(b"{}", more=more)))) as socket:
        await rig.bind("sb1", socket)
        async with rig.connect() as wire:
            for _ in range(3):
                await wire.send(CALL)
                assert (await wire.answer())[2] == b"{}"
    assert len(made) == connections


@pytest.mark.parametrize("then_close", [False, True])
async def test_an_idle_connection_that_ended_or_spoke_is_not_used(rig: Rig, then_close: bool):
    made: list[int] = []
    answered, over = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(response(b"{}"))
            await writer.drain()
            await answered.acquire()
            if then_close:
                writer.close()
                await writer.wait_closed()
            else:
                writer.write(response(b'{"forged":1}'))
                await writer.drain()
            over.release()
            if then_close:
                return

    async with open_script(rig.directory, counting(made, script)) as socket:
        await rig.bind("sb1", socket)
        async with rig.connect() as wire:
            for _ in range(3):
                await wire.send(CALL)
                assert (await wire.answer())[2] == b"{}"
                answered.release()
                with anyio.fail_after(5):
                    await over.acquire()
    assert len(made) == 3


async def test_a_call_is_never_sent_twice(rig: Rig):
    requests: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await read_request(reader))[1])
        writer.write(response(b"{}"))
        requests.append((await read_request(reader))[1])

    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(CALL)
        assert (await wire.answer())[2] == b"{}"
        await wire.send(CALL)
        assert failure((await wire.answer())[2])["kind"] == "stream_broken"
    assert len(requests) == 2


async def test_forgetting_a_sandbox_closes_its_idle_connections(rig: Rig):
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(response(b"{}"))
        await reader.read()
        closed.set()

    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        route = await rig.bind("sb1", socket)
        await wire.send(CALL)
        await wire.answer()
        rig.relay.forget(route.sandbox_id)
        with anyio.fail_after(10):
            await closed.wait()


async def test_a_tool_name_cannot_end_its_header_line(rig: Rig):
    heads: list[dict[str, str]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await read_request(reader))[0])
        writer.write(response(b"{}"))

    arguments = {"session": "sb1", "tool": "a\r\nash-forged: 1"}
    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(modern("call", tool_call("call", arguments)))
        assert (await wire.answer())[2] == b"{}"
    assert "ash-forged" not in heads[0]
    assert heads[0]["mcp-name"].startswith("=?base64?")


BIG = 64 * 1024 * 1024


@pytest.fixture
async def flood(rig: Rig) -> AsyncGenerator[list[int]]:
    """A sandbox that answers with a stream of 64 MiB, and how much of it was taken so far."""
    sent: list[int] = []
    block = chunk(b"x" * 65_536)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD)
        while sum(sent) < BIG:
            writer.write(block)
            await writer.drain()
            sent.append(65_536)
        writer.write(b"0\r\n\r\n")

    async with open_script(rig.directory, script) as socket:
        await rig.bind("sb1", socket)
        yield sent


async def test_a_slow_reader_does_not_grow_memory(rig: Rig, flood: list[int]):
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=65_536)
    tracemalloc.start()
    try:
        writer.write(CALL)
        with anyio.fail_after(30):
            before = -1
            while before != sum(flood) or not flood:  # until nothing moves any more
                before = sum(flood)
                await asyncio.sleep(0.1)
            assert before < BIG
            total = 0
            while data := await reader.read(2**20):
                total += len(data)
                if data.endswith(b"0\r\n\r\n"):
                    break
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        writer.close()
    assert total > BIG
    assert peak < 8 * 1024 * 1024


async def test_a_caller_who_asks_on_without_reading_is_stopped(rig: Rig):
    answered: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(response(b"x" * 50_000))
            await writer.drain()
            answered.append(1)

    async with open_script(rig.directory, script) as socket:
        await rig.bind("sb1", socket)
        _, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1000)
        for _ in range(800):
            writer.write(CALL)
            with anyio.move_on_after(0.3) as patience:
                before = len(answered)
                while len(answered) == before or len(rig.ledger):
                    await asyncio.sleep(0.001)
            if patience.cancelled_caught:
                break
        writer.close()
    assert len(answered) < 600


def test_an_idle_connection_is_known_to_be_over_before_the_loop_says_so(tmp_path: Path):
    async def check(speaks: bool) -> bool:
        path = tmp_path / f"{speaks}.sock"
        upstreams = ConnectionPool(
            connect_timeout_seconds=1,
            max_idle=1,
            idle_seconds=1,
            max_head_bytes=1000,
            max_headers=10,
            silent_seconds=9,
        )
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            connection = await upstreams.connect(Endpoint(unix=str(path)))
            far_end, _ = listener.accept()
            was_alive = connection.alive
            if speaks:
                far_end.send(b"x")
            far_end.close()
            is_alive = connection.alive
            upstreams.close()
        return was_alive and not is_alive

    assert asyncio.run(check(False))
    assert asyncio.run(check(True))
