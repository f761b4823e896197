"""What the caller of a long call hears while its sandbox is silent."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastmcp import Client, FastMCP
from fastmcp.client.transports import StreamableHttpTransport

from ash_router.caller.relay import RelayLimits
from tests.router.relay_parts import Wire, failure, legacy, modern, open_rig, tool_call
from tests.router.sandbox_parts import STREAM_HEAD, chunk, open_box, open_script, read_request, response

pytestmark = pytest.mark.anyio

COMMENT = b": the call goes on\n\n"
RESULT = b'{"jsonrpc":"2.0","id":1,\r\n"result":{}}'


def call(token: str | None = None) -> bytes:
    return modern("sb1_add", call_body("sb1_add", token))


def direct_call(token: str | None = None) -> bytes:
    return modern("add", call_body("add", token), more="x-session-id: sb1\r\n")


def call_body(name: str, token: str | None) -> bytes:
    message = json.loads(tool_call(name))
    if token is not None:
        message["params"]["_meta"]["progressToken"] = token
    return json.dumps(message).encode()


class Silence:
    """A sandbox that sends some bytes, and others when the test says so."""

    def __init__(self, first: bytes, then: bytes) -> None:
        self._parts = first, then
        self.over = asyncio.Event()

    async def script(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, then = self._parts
        await read_request(reader)
        writer.write(first)
        await writer.drain()
        await self.over.wait()
        writer.write(then)
        await writer.drain()


@asynccontextmanager
async def asked(folder: Path, silence: Silence, request: bytes) -> AsyncGenerator[Wire]:
    limits = RelayLimits(quiet_seconds=0.04)
    async with (
        open_rig(folder, limits=limits) as rig,
        open_script(folder, silence.script) as socket,
        rig.connect() as wire,
    ):
        await rig.bind("sb1", socket)
        await wire.send(request)
        yield wire


async def until(wire: Wire, wanted: bytes) -> list[bytes]:
    """Read up to a chunk; return those before it, which come where the sandbox did not get to send it at once."""
    before: list[bytes] = []
    while (piece := await wire.chunk()) != wanted:
        assert piece, "the stream ended without it"
        before.append(piece)
    return before


async def rest(wire: Wire) -> bytes:
    body = b""
    while piece := await wire.chunk():
        body += piece
    return body


def progress(event: bytes) -> dict[str, Any]:
    message = json.loads(event.removeprefix(b"event: message\ndata: "))
    assert message["method"] == "notifications/progress"
    return message["params"]


@pytest.mark.parametrize("asks", [call, direct_call])
async def test_before_the_answer_a_stream_is_begun_whose_last_event_the_answer_is(
    tmp_path: Path, asks: Callable[[], bytes]
):
    silence = Silence(b"", response(RESULT))
    async with asked(tmp_path, silence, asks()) as wire:
        status, headers = await wire.head()
        assert (status, headers["content-type"], headers["ash-origin"]) == (200, "text/event-stream", "sandbox")
        assert [await wire.chunk(), await wire.chunk()] == [COMMENT, COMMENT]
        silence.over.set()
        body = (await rest(wire)).replace(COMMENT, b"")
    assert body == b'event: message\ndata: {"jsonrpc":"2.0","id":1,  "result":{}}\n\n'


@pytest.mark.parametrize("asks", [call, direct_call])
async def test_who_gave_a_token_gets_progress_that_grows(tmp_path: Path, asks: Callable[[str], bytes]):
    silence, began = Silence(b"", response(RESULT)), time.monotonic()
    async with asked(tmp_path, silence, asks("token")) as wire:
        await wire.head()
        first, second = progress(await wire.chunk()), progress(await wire.chunk())
        silence.over.set()
        assert b'"result":{}' in await rest(wire)
    assert first["progressToken"] == second["progressToken"] == "token"
    said = re.fullmatch(r"running for (\d+) s", first["message"])
    assert said is not None and int(said[1]) <= time.monotonic() - began
    assert 0 < first["progress"] < second["progress"] < 1


@pytest.mark.parametrize("asks", [call, direct_call])
async def test_it_grows_from_what_the_sandbox_has_reported(tmp_path: Path, asks: Callable[[str], bytes]):
    report = (
        b'data: {"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":3.5}}\n\n'
    )
    silence = Silence(STREAM_HEAD + chunk(report), chunk(b"data: {}\n\n") + b"0\r\n\r\n")
    async with asked(tmp_path, silence, asks("token")) as wire:
        await wire.head()
        assert all(progress(early)["progress"] < 1 for early in await until(wire, report))
        assert 3.5 < progress(await wire.chunk())["progress"] < 3.6
        silence.over.set()
        assert (await rest(wire)).endswith(b"data: {}\n\n")


@pytest.mark.parametrize("asks", [call, direct_call])
async def test_an_event_that_has_begun_is_not_cut_in_two(tmp_path: Path, asks: Callable[[], bytes]):
    silence = Silence(STREAM_HEAD + chunk(b"data: {"), chunk(b"}\n\n"))
    async with asked(tmp_path, silence, asks()) as wire:
        await wire.head()
        assert set(await until(wire, b"data: {")) <= {COMMENT}
        await asyncio.sleep(0.1)  # more than once the time after which something would come
        silence.over.set()
        assert (await rest(wire)).startswith(b"}\n\n")


@pytest.mark.parametrize("asks", [call, direct_call])
async def test_a_sandbox_that_dies_after_that_leaves_a_typed_failure(tmp_path: Path, asks: Callable[[], bytes]):
    silence = Silence(b"", b"")
    async with asked(tmp_path, silence, asks()) as wire:
        _, headers = await wire.head()
        assert await wire.chunk() == COMMENT
        silence.over.set()
        body = (await rest(wire)).replace(COMMENT, b"").removeprefix(b"event: message\ndata: ")
    assert failure(body)["kind"] == "stream_broken"
    assert json.loads(body)["result"]["_meta"]["ash-nonce"] == headers["ash-nonce"]


@pytest.mark.parametrize("asks", [call, direct_call])
async def test_what_is_no_message_cannot_follow_it(tmp_path: Path, asks: Callable[[], bytes]):
    silence = Silence(b"", b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nno")
    async with asked(tmp_path, silence, asks()) as wire:
        await wire.head()
        silence.over.set()
        body = (await rest(wire)).replace(COMMENT, b"").removeprefix(b"event: message\ndata: ")
    assert "HTTP 502" in json.loads(body)["result"]["content"][0]["text"]


@pytest.mark.parametrize("asks", [call, direct_call])
async def test_who_takes_no_stream_waits_for_the_answer(tmp_path: Path, asks: Callable[[], bytes]):
    silence = Silence(b"", response(RESULT))
    request = asks().replace(b"application/json, text/event-stream", b"application/json")
    async with asked(tmp_path, silence, request) as wire:
        await asyncio.sleep(0.1)
        silence.over.set()
        assert (await wire.answer())[2] == RESULT


async def test_at_a_sandboxs_own_endpoint_a_session_is_told_nothing_before_the_sandboxs_own_head(tmp_path: Path):
    silence = Silence(b"", b"HTTP/1.1 404 Not Found\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nno")
    request = legacy(call_body("add", "token"), "mine", more="x-session-id: sb1\r\n")
    async with asked(tmp_path, silence, request) as wire:
        await asyncio.sleep(0.1)  # more than once the time after which something would come
        silence.over.set()
        status, _, body = await wire.answer()
    assert (status, body) == (404, b"no")


async def test_at_a_sandboxs_own_endpoint_a_sessions_stream_carries_comments(tmp_path: Path):
    silence = Silence(STREAM_HEAD, chunk(b"data: {}\n\n") + b"0\r\n\r\n")
    request = legacy(call_body("add", None), "mine", more="x-session-id: sb1\r\n")
    async with asked(tmp_path, silence, request) as wire:
        await wire.head()
        assert [await wire.chunk(), await wire.chunk()] == [COMMENT, COMMENT]
        silence.over.set()
        assert (await rest(wire)).replace(COMMENT, b"") == b"data: {}\n\n"


async def test_no_answer_is_begun_for_a_call_too_long_to_keep_since_its_failure_needs_its_id(tmp_path: Path):
    silence = Silence(b"", response(RESULT))
    body = tool_call("add", {"text": "x" * 70_000})
    async with asked(tmp_path, silence, modern("add", body, more="x-session-id: sb1\r\n")) as wire:
        await asyncio.sleep(0.1)
        silence.over.set()
        assert (await wire.answer())[2] == RESULT


async def test_an_answer_of_known_length_passes_as_it_is(tmp_path: Path):
    head = STREAM_HEAD.replace(b"transfer-encoding: chunked", b"content-length: 10")
    silence = Silence(head, b"data: {}\n\n")
    async with asked(tmp_path, silence, direct_call()) as wire:
        await wire.head()
        await asyncio.sleep(0.1)
        silence.over.set()
        with anyio.fail_after(10):
            assert await wire.reader.readexactly(10) == b"data: {}\n\n"


async def test_a_stream_that_only_listens_carries_none(tmp_path: Path):
    silence = Silence(STREAM_HEAD, chunk(b"data: {}\n\n"))
    request = b"GET /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\naccept: text/event-stream\r\n\r\n"
    async with asked(tmp_path, silence, request) as wire:
        await wire.head()
        await asyncio.sleep(0.1)
        silence.over.set()
        assert await wire.chunk() == b"data: {}\n\n"


@pytest.mark.parametrize(("headers", "name"), [({}, "sb1_silent"), ({"x-session-id": "sb1"}, "silent")])
@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_real_clients_of_both_eras_hear_of_a_silent_call_and_get_its_result(
    tmp_path: Path, mode: Any, headers: dict[str, str], name: str
):
    server, heard, told = FastMCP("box"), asyncio.Event(), list[float]()

    @server.tool
    async def silent() -> str:  # pyright: ignore[reportUnusedFunction]
        await heard.wait()
        return "done"

    async def note(done: float, total: float | None, message: str | None) -> None:
        told.append(done)
        if len(told) == 2:
            heard.set()

    limits = RelayLimits(quiet_seconds=0.04)
    async with open_rig(tmp_path, limits=limits) as rig, open_box(tmp_path, server=server) as box:
        await rig.bind("sb1", box.socket)
        way = StreamableHttpTransport(rig.url, headers=headers)
        async with Client(way, mode=mode, progress_handler=note, timeout=20) as client:
            assert (await client.call_tool(name)).data == "done"
    assert told == sorted(set(told))
