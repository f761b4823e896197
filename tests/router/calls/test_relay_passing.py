"""What passes through a direct door: bodies that are still coming, streams, and every kind of end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import pytest

from ash_mcp.errors import SandboxGone
from ash_router.caller.relay import RelayLimits
from ash_router.calls.passage import Passage
from tests.router.calls.test_relay_direct import BODY, direct, kind
from tests.router.relay_parts import Rig, failure, note_work, open_rig
from tests.router.sandbox_parts import (
    EVENT,
    STREAM_HEAD,
    Box,
    Script,
    chunk,
    open_script,
    read_request,
    response,
    says,
)

pytestmark = pytest.mark.anyio


def reads_all(into: list[bytes], seen: asyncio.Event) -> Script:
    """A sandbox that notes the raw request, says when the first bytes of its body are there, and answers its end."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = await reader.readuntil(b"\r\n\r\n")
        while not raw.endswith(b"end") and not raw.endswith(b"end\r\n0\r\n\r\n"):
            raw += await reader.read(65_536)
            seen.set()
        into.append(raw)
        writer.write(response(b"{}"))

    return script


async def test_a_body_passes_on_while_it_still_comes(rig: Rig):
    raw: list[bytes] = []
    seen = asyncio.Event()
    async with open_script(rig.directory, reads_all(raw, seen)) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(body=b"begin", framing="content-length: 8\r\n"))
        with anyio.fail_after(5):
            await seen.wait()
        await wire.send(b"end")
        assert (await wire.answer())[2] == b"{}"
    assert raw[0].endswith(b"\r\n\r\nbeginend")
    assert b"content-length: 8\r\n" in raw[0]
    assert b"transfer-encoding" not in raw[0]


async def test_a_chunked_body_is_framed_anew(rig: Rig):
    raw: list[bytes] = []
    seen = asyncio.Event()
    async with open_script(rig.directory, reads_all(raw, seen)) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(body=b"5;x=y\r\nbegin\r\n", framing="transfer-encoding: chunked\r\n"))
        with anyio.fail_after(5):
            await seen.wait()
        await wire.send(b"3\r\nend\r\n0\r\nash-token: forged\r\n\r\n")
        assert (await wire.answer())[2] == b"{}"
    assert raw[0].endswith(b"\r\n\r\n5\r\nbegin\r\n3\r\nend\r\n0\r\n\r\n")
    assert b"content-length" not in raw[0]


async def test_many_small_chunks_are_work_and_are_not_copied_for_each(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    works, copies, seen, chunks = note_work(monkeypatch), 0, asyncio.Event(), 4000
    taken = Passage.body

    def body(passage: Passage, data: bytes) -> None:
        nonlocal copies
        before = passage._pending, passage._kept  # pyright: ignore[reportPrivateUsage]
        taken(passage, data)
        after = passage._pending, passage._kept  # pyright: ignore[reportPrivateUsage]
        copies += sum(new is not old for new, old in zip(after, before, strict=True))

    monkeypatch.setattr(Passage, "body", body)
    async with open_script(rig.directory, reads_all([], seen)) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(body=b"1\r\nx\r\n", framing="transfer-encoding: chunked\r\n"))
        with anyio.fail_after(5):
            await seen.wait()
        await wire.send(b"1\r\nx\r\n" * chunks + b"3\r\nend\r\n0\r\n\r\n")
        assert (await wire.answer())[2] == b"{}"
    assert copies < chunks / 4
    assert sum(works) > 1.5


@pytest.mark.parametrize("gated", [False, True])
async def test_a_large_body_is_held_back_while_the_sandbox_does_not_read(rig: Rig, gated: bool):
    go_on, total = asyncio.Event(), 32 * 2**20
    got: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        while sum(got) < total:
            got.append(len(await reader.read(2**20)))
        writer.write(response(b"{}"))

    if gated:
        rig.admission.gate = asyncio.Event()
    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        wire.writer.write(direct(body=b"", framing=f"content-length: {total}\r\n"))
        wire.writer.write(b"x" * total)
        if rig.admission.gate is not None:
            await rig.take_in(lambda connection: connection.flow.read_paused)
            rig.admission.gate.set()
        left = -1
        while left != (left := wire.writer.transport.get_write_buffer_size()):  # type: ignore[attr-defined]
            await asyncio.sleep(0.1)
        assert left > total // 4
        go_on.set()
        assert (await wire.answer())[2] == b"{}"
    assert sum(got) == total


@pytest.mark.parametrize("behind", [b"GET / HTTP/1.1\r\nhost: hub\r\n\r\n", b"x"])
@pytest.mark.parametrize("framing", ["content-length: 3\r\n", "transfer-encoding: chunked\r\n"])
async def test_what_comes_in_one_piece_with_a_request_behind_it_is_answered(rig: Rig, framing: str, behind: bytes):
    body = b"3\r\nend\r\n0\r\n\r\n" if "chunked" in framing else b"end"
    async with open_script(rig.directory, reads_all([], asyncio.Event())) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(body=body + behind, framing=framing))
        assert (await wire.answer())[2] == b"{}"
        assert await wire.ended()


async def test_a_request_that_is_answered_early_ends_its_connections(rig: Rig):
    connections: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response(b"{}"))
        await reader.read()

    async with open_script(rig.directory, script) as socket:
        await rig.bind("sb1", socket)
        for _ in range(2):
            async with rig.connect() as wire:
                await wire.send(direct(body=b"part", framing="content-length: 100\r\n"))
                _, headers, body = await wire.answer()
                assert (headers["connection"], body) == ("close", b"{}")
                assert await wire.ended()
    assert len(connections) == 2


async def test_a_body_that_breaks_its_framing_is_refused_and_the_sandbox_left(rig: Rig):
    begun, ended = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"begin")
        begun.set()
        await reader.read()
        ended.set()

    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(body=b"5\r\nbegin\r\n", framing="transfer-encoding: chunked\r\n"))
        with anyio.fail_after(30):
            await begun.wait()
        await wire.send(b"zz\r\n")
        assert (await wire.answer())[0] == 400
        with anyio.fail_after(5):
            await ended.wait()
    assert len(rig.ledger) == 0


@pytest.mark.parametrize(
    "framing", ["content-length: 2001\r\nexpect: 100-continue\r\n", "transfer-encoding: chunked\r\n"]
)
async def test_a_body_over_its_limit_is_refused_and_the_sandbox_left(tmp_path: Path, framing: str):
    begun, hung_up = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.set()
        try:
            await reader.read()
        finally:
            hung_up.set()

    limits = RelayLimits(max_direct_body_bytes=2000, linger_seconds=0.1)
    is_chunked = "chunked" in framing
    async with open_rig(tmp_path, limits=limits) as rig, open_script(tmp_path, script) as socket:
        await rig.bind("sb1", socket)
        async with rig.connect() as wire:
            await wire.send(direct(body=b"7d0\r\n" + b"a" * 2000 + b"\r\n" if is_chunked else b"", framing=framing))
            if is_chunked:
                with anyio.fail_after(5):
                    await begun.wait()
                await wire.send(b"1\r\na\r\n")
            status, headers, body = await wire.answer()
            assert (status, headers["ash-origin"], kind(body)) == (413, "hub", "capacity_exceeded")
            assert await wire.ended()
        if is_chunked:
            with anyio.fail_after(5):
                await hung_up.wait()
        assert len(rig.ledger) == 0


async def test_a_body_that_does_not_go_on_is_a_timeout(tmp_path: Path):
    async with (
        open_rig(tmp_path, limits=RelayLimits(body_timeout_seconds=0.1, linger_seconds=0.1)) as rig,
        open_script(tmp_path, says(response(b"{}"))) as socket,
        rig.connect() as wire,
    ):
        await rig.bind("sb1", socket)
        await wire.send(direct(body=b"part", framing="content-length: 100\r\n"))
        status, _, body = await wire.answer()
        assert (status, kind(body)) == (408, "timeout")
        assert await wire.ended()
        assert len(rig.ledger) == 0


async def test_requests_of_all_kinds_share_a_connection(rig: Rig, box: Box):
    async with rig.connect() as wire:
        for _ in range(3):
            await wire.send(direct("/s/sb1/mcp", b"{}"))
            assert (await wire.answer())[1]["ash-origin"] == "sandbox"
            await wire.send(b"GET /plain HTTP/1.1\r\nhost: hub\r\n\r\n")
            assert (await wire.answer())[1]["ash-origin"] == "hub"


# Ends.


async def test_a_sandbox_that_cannot_be_reached_is_a_bad_gateway(rig: Rig):
    await rig.bind("sb1", rig.directory / "nobody.sock")
    async with rig.connect() as wire:
        for _ in range(2):
            await wire.send(direct())
            status, headers, body = await wire.answer()
            assert (status, headers["ash-origin"], kind(body)) == (502, "hub", "connect_failed")
            assert "connection" not in headers


async def test_a_sandbox_that_does_not_answer_in_time_is_a_gateway_timeout(tmp_path: Path):
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with (
        open_rig(tmp_path, limits=RelayLimits(idle_stream_seconds=0.1)) as rig,
        open_script(tmp_path, script) as socket,
        rig.connect() as wire,
    ):
        await rig.bind("sb1", socket)
        await wire.send(direct())
        status, _, body = await wire.answer()
    assert (status, kind(body)) == (504, "timeout")


def dies_in_stream() -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENT))
        await writer.drain()

    return script


async def test_a_sandbox_that_dies_in_a_calls_stream_ends_it_with_a_typed_failure(rig: Rig):
    rig.explanation = SandboxGone("killed", reason="process_died")
    async with open_script(rig.directory, dies_in_stream()) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct())
        _, headers, body = await wire.answer()
    assert body.startswith(EVENT)
    event = body[len(EVENT) :].removeprefix(b"event: message\ndata: ")
    assert failure(event)["kind"] == "sandbox_gone"
    assert json.loads(event)["result"]["_meta"]["ash-nonce"] == headers["ash-nonce"]


async def test_a_sandbox_that_dies_in_a_list_is_an_error_of_the_protocol(rig: Rig):
    body = json.dumps({"jsonrpc": "2.0", "id": "l", "method": "tools/list"}).encode()
    async with open_script(rig.directory, dies_in_stream()) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(direct(body=body))
        event = (await wire.answer())[2][len(EVENT) :].removeprefix(b"event: message\ndata: ")
    message = json.loads(event)
    assert (message["id"], message["error"]["data"]["kind"]) == ("l", "stream_broken")


@pytest.fixture
async def listening(rig: Rig) -> AsyncGenerator[asyncio.Event]:
    """A sandbox `sb1` with a stream that never ends, and when its reader left."""
    left = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM_HEAD + chunk(EVENT))
        await reader.read()
        left.set()

    async with open_script(rig.directory, script) as socket:
        await rig.bind("sb1", socket)
        yield left


async def test_a_stream_that_listens_is_no_call(rig: Rig, listening: asyncio.Event):
    async with rig.connect() as wire:
        await wire.send(direct(body=b"", method="GET"))
        assert (await wire.head())[0] == 200
        assert await wire.chunk() == EVENT
        assert len(rig.ledger) == 0
        assert rig.ledger.total == 0
        assert len(rig.relay.services.streams) == 1
    with anyio.fail_after(5):
        await listening.wait()
    assert len(rig.relay.services.streams) == 0


@pytest.mark.parametrize("gracefully", [False, True])
async def test_stopping_ends_streams_that_listen(rig: Rig, listening: asyncio.Event, gracefully: bool):
    async with rig.connect() as wire:
        await wire.send(direct(body=b"", method="GET"))
        await wire.head()
        await wire.chunk()
        if gracefully:
            rig.server.graceful = True
            rig.server.stop()
        else:
            await rig.relay.aclose()
        assert await wire.chunk() == b""
        with anyio.fail_after(5):
            await listening.wait()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_one_principals_calls_and_streams_are_bounded(tmp_path: Path, method: str):
    limits = RelayLimits(max_in_flight_per_owner=1, max_streams_per_owner=1)
    async with open_rig(tmp_path, limits=limits) as rig, open_script(tmp_path, dies_never) as socket:
        await rig.bind("sb1", socket)
        await rig.bind("sb1", socket, owner="ann")
        async with rig.connect() as first, rig.connect() as second, rig.connect() as other:
            body = BODY if method == "POST" else b""
            await first.send(direct(body=body, method=method))
            assert (await first.head())[0] == 200
            await second.send(direct(body=body, method=method))
            status, headers, answer = await second.answer()
            assert (status, headers["retry-after"], kind(answer)) == (429, "1", "capacity_exceeded")
            await other.send(direct(body=body, method=method, more="x-principal: ann\r\n"))
            assert (await other.head())[0] == 200


async def dies_never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(STREAM_HEAD + chunk(EVENT))
    await asyncio.Event().wait()
