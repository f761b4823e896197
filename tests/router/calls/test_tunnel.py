"""WebSockets through the relay: handshake, bytes both ways, bounds and ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import anyio
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ash_mcp.errors import AshError
from ash_mcp.types import Endpoint, PrincipalLimits
from ash_router.admission.base import Admitted, Refusal
from ash_router.admission.door_paths import DoorKind, DoorPath
from ash_router.bounds.limits import RelayLimits
from ash_router.calls import tunnel
from ash_router.calls.direct import DirectRequest, direct_request_of
from ash_router.calls.door import Door, HeaderPolicy
from ash_router.http import websocket
from ash_router.http.heads import RequestHead
from ash_router.upstream import liveness
from tests.router.relay_parts import Rig, Wire, note_work, open_rig, route_to
from tests.router.sandbox_parts import Server, config, open_script, response

pytestmark = pytest.mark.anyio

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = (
    f"GET /s/sb1/socket/a?b=c HTTP/1.1\r\nhost: h\r\nconnection: keep-alive, Upgrade\r\nupgrade: WebSocket\r\n"
    f"sec-websocket-version: 13\r\nsec-websocket-key: {KEY}\r\nauthorization: Bearer x\r\ncookie: c\r\n"
).encode()
ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nset-cookie: c\r\nash-origin: hub\r\n\r\n"
)


def door(takes: Literal["taken", "required"] = "taken") -> Door:
    passed = frozenset({b"content-type"})
    headers = HeaderPolicy(websocket.REQUEST_HEADERS, passed)
    return Door(b"/_ash/socket", frozenset({"GET"}), headers, is_mcp=False, silent_seconds=0.01, websocket=takes)


def add_door(rig: Rig, monkeypatch: pytest.MonkeyPatch, *, takes: Literal["taken", "required"] = "taken") -> None:
    """Have the rig pass WebSockets to what is below `/s/sb1/socket`."""

    def find(admitted: Admitted, method: str, head: RequestHead) -> DirectRequest | Refusal | None:
        found = direct_request_of(rig.routes, admitted, DoorPath(DoorKind.MCP, "sb1"), method)
        if found is not None:
            found.door, found.rest = door(takes), head.target.removeprefix(b"/s/sb1/socket")
        return found

    monkeypatch.setattr(rig.relay, "direct_request", find)


@pytest.fixture(autouse=True)
def the_door(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    add_door(rig, monkeypatch)


Serve = Callable[[dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


@asynccontextmanager
async def open_server(directory: Path, serve: Serve) -> AsyncGenerator[Path]:
    """A sandbox with a real WebSocket server, of uvicorn and the library websockets."""
    socket = directory / "ws.sock"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await serve(scope, receive, send)

    async with Server(config(app, uds=str(socket), ws="websockets-sansio")).running():
        yield socket


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "websocket.accept", "subprotocol": (scope["subprotocols"] or [None])[0]})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") == "close":
            await send({"type": "websocket.close", "code": 4321, "reason": "as asked"})
            return
        await send({**message, "type": "websocket.send"})


def client(rig: Rig, **more: Any) -> connect:
    return connect(f"ws://127.0.0.1:{rig.port}/s/sb1/socket/a?b=c", proxy=None, **more)


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> list[str]:
    """Answer a handshake as a sandbox, and return its head."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    writer.write(ACCEPTED)
    return head


async def unmoved(*_: Any) -> None:
    """A sandbox that is never asked."""


async def opened(wire: Wire) -> dict[str, str]:
    await wire.send(HANDSHAKE + b"\r\n")
    status, headers = await wire.head()
    assert status == 101
    return headers


async def test_messages_pass_both_ways_and_the_closing_too(rig: Rig, tmp_path: Path):
    async with open_server(tmp_path, echo) as socket:
        await rig.bind("sb1", socket)
        async with client(rig, subprotocols=["one", "two"]) as ours:
            assert ours.subprotocol == "one"
            for sent in ("text", b"bytes", "x" * 300_000, b"y" * 900_000, ""):
                await ours.send(sent)
                assert await ours.recv() == sent
            await (await ours.ping())
            await ours.send("close")
            with pytest.raises(ConnectionClosed) as closed:
                await ours.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "as asked")
        assert len(rig.relay.services.streams) == len(rig.relay.tunnels) == 0


async def test_only_what_is_listed_passes_of_both_heads(rig: Rig, tmp_path: Path):
    seen: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await accept(reader, writer))
        await reader.read()

    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        headers = await opened(wire)
    assert headers["sec-websocket-accept"] == "s3ppLMBiTxaQ9kYGzzhZRbK+xOo=".lower()
    assert headers["ash-origin"] == "sandbox"
    assert "set-cookie" not in headers
    names = {line.partition(":")[0] for line in seen[0][1:]}
    assert seen[0][0] == "GET /_ash/socket/a?b=c HTTP/1.1"
    assert names == {
        "ash-token",
        "connection",
        "host",
        "sec-websocket-key",
        "sec-websocket-version",
        "upgrade",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
    }


@pytest.mark.parametrize("early", [b"", b"early"], ids=["after-it", "in-one-read"])
async def test_bytes_pass_unchanged_whoever_speaks_first(rig: Rig, tmp_path: Path, early: bytes):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ACCEPTED + b"first")
        writer.write(b"got " + await reader.readexactly(5))
        await reader.read()

    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(HANDSHAKE + b"\r\n" + early)
        status, _ = await wire.head()
        assert status == 101
        assert await wire.reader.readexactly(5) == b"first"
        await wire.send(b"" if early else b"early")
        assert await wire.reader.readexactly(9) == b"got early"


async def test_who_does_not_wait_for_a_slow_verdict_is_refused(rig: Rig, tmp_path: Path):
    gate = rig.admission.gate = asyncio.Event()
    async with open_script(tmp_path, unmoved) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(HANDSHAKE + b"\r\n")
        await rig.admission.waits.wait()
        await wire.send(b"GET / HTTP/1.1\r\n\r\n")
        await rig.take_in(lambda connection: connection._pipelined)
        gate.set()
        assert (await wire.head())[0] == 400


async def test_a_sandbox_that_refuses_is_heard_and_the_connection_ends(rig: Rig, tmp_path: Path):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response(b"no", status="404 Not Found"))
        await reader.read()

    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(HANDSHAKE + b"\r\n")
        status, headers, body = await wire.answer()
        assert (status, headers["connection"], body) == (404, "close", b"no")
        assert await wire.ended()


@pytest.mark.parametrize(
    "said",
    [
        ACCEPTED.replace(b"upgrade: websocket", b"upgrade: h2c"),
        ACCEPTED.replace(b"sec-websocket-accept", b"x"),
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
    ids=["another-protocol", "no-accept", "nothing"],
)
async def test_a_sandbox_that_switches_to_something_else_is_a_typed_failure(rig: Rig, tmp_path: Path, said: bytes):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await reader.read()

    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(HANDSHAKE + b"\r\n")
        status, headers, body = await wire.answer()
        assert (status, headers["ash-origin"]) == (502, "hub")
        assert b"remote_protocol" in body


async def test_a_sandbox_cannot_switch_where_nobody_asked(rig: Rig, tmp_path: Path):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ACCEPTED + b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await reader.read()

    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(b"GET /s/sb1/socket/a HTTP/1.1\r\nhost: h\r\n\r\n")
        status, headers, body = await wire.answer()
        assert (status, headers["ash-origin"]) == (502, "hub"), body


async def test_a_door_for_websockets_alone_says_so(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_door(rig, monkeypatch, takes="required")
    async with open_script(tmp_path, unmoved) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(b"GET /s/sb1/socket/a HTTP/1.1\r\nhost: h\r\n\r\n")
        status, headers, _ = await wire.answer()
        assert (status, headers["upgrade"]) == (426, "websocket")


async def test_what_is_typed_and_its_echo_are_no_work_of_their_own(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with open_server(tmp_path, echo) as socket:
        await rig.bind("sb1", socket)
        works = note_work(monkeypatch)
        async with client(rig, compression=None) as ours:
            for sent in ("k", "x" * 1000):
                await ours.send(sent)
                assert await ours.recv() == sent
            assert works == [1]
            await ours.send("x" * 10_000)
            await ours.recv()
            assert len(works) > 2


async def test_it_counts_as_an_open_stream_and_not_as_a_call(rig: Rig, tmp_path: Path):
    rig.admission.limits["me"] = PrincipalLimits(streams=1, calls=1)
    async with open_server(tmp_path, echo) as socket:
        await rig.bind("sb1", socket)
        async with client(rig):
            assert len(rig.relay.services.streams) == 1
            assert len(rig.ledger) == 0
            with pytest.raises(InvalidStatus) as refused:
                async with client(rig):
                    pass
            assert refused.value.response.status_code == 429
        async with client(rig):
            pass


async def swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> AsyncGenerator[Rig]:
    monkeypatch.setattr(tunnel, "_CHECK_SECONDS", 0.0)
    async with open_rig(tmp_path, limits=RelayLimits(quiet_seconds=0.05, **more)) as rig:
        add_door(rig, monkeypatch)
        yield rig


@pytest.fixture
async def swift_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Rig]:
    """A rig that looks at credentials and deadlines all the time."""
    async for rig in swift(tmp_path, monkeypatch):
        yield rig


async def closes(ours: ClientConnection) -> None:
    with anyio.fail_after(10), pytest.raises(ConnectionClosed):
        await ours.recv()


async def test_typing_keeps_a_sandbox_from_idling(swift_rig: Rig, tmp_path: Path):
    async with open_server(tmp_path, echo) as socket:
        route = await swift_rig.bind("sb1", socket)
        async with client(swift_rig) as ours:
            assert swift_rig.ledger.last_call(route.sandbox_id) is None
            await ours.send("ls")
            with anyio.fail_after(10):
                while swift_rig.ledger.last_call(route.sandbox_id) is None:
                    await asyncio.sleep(0)


@pytest.mark.parametrize("later", [False, True], ids=["at-once", "looked-up"])
async def test_it_ends_when_its_credential_is_revoked(
    swift_rig: Rig, tmp_path: Path, later: bool, monkeypatch: pytest.MonkeyPatch
):
    async with open_server(tmp_path, echo) as socket:
        await swift_rig.bind("sb1", socket)
        async with client(swift_rig) as ours:
            await ours.send("hello")
            assert await ours.recv() == "hello"
            refusal = Refusal(AshError("revoked"), status=401)

            async def refuse() -> Refusal:
                return refusal

            def admit(_: Any) -> Any:
                return refuse() if later else refusal

            monkeypatch.setattr(swift_rig.admission, "admit", admit)
            await closes(ours)


async def test_it_lives_on_while_nobody_can_say_whether_the_credential_is_good(
    swift_rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = asyncio.Event()

    def away(_: Any) -> Refusal:
        asked.set()
        return Refusal(AshError("away"), status=503)

    async with open_server(tmp_path, echo) as socket:
        await swift_rig.bind("sb1", socket)
        async with client(swift_rig) as ours:
            monkeypatch.setattr(swift_rig.admission, "admit", away)
            with anyio.fail_after(10):
                await asked.wait()
            await ours.send("still")
            assert await ours.recv() == "still"


async def test_it_ends_with_its_sandbox_though_the_connection_stands(rig: Rig, tmp_path: Path):
    async with open_server(tmp_path, echo) as socket:
        route = await rig.bind("sb1", socket)
        async with client(rig) as ours:
            rig.relay.forget(route.sandbox_id)
            await closes(ours)


async def test_it_ends_when_the_sandbox_dies(rig: Rig, tmp_path: Path):
    async with open_server(tmp_path, echo) as socket:
        await rig.bind("sb1", socket)
        async with client(rig) as ours:
            await ours.send("hello")
            assert await ours.recv() == "hello"
            for upstream in list(rig.relay.services.upstreams._open):  # pyright: ignore[reportPrivateUsage]
                upstream._transport.abort()  # type: ignore[union-attr]  # pyright: ignore[reportPrivateUsage]
            await closes(ours)


async def test_it_ends_when_the_hive_drains(rig: Rig, tmp_path: Path):
    async with open_server(tmp_path, echo) as socket:
        await rig.bind("sb1", socket)
        async with client(rig) as ours:
            await ours.send("hello")
            assert await ours.recv() == "hello"
            for connection in list(rig.server.server_state.connections):
                connection.shutdown()  # as uvicorn does when it stops
            await closes(ours)


async def test_the_sandbox_learns_that_the_caller_has_left(rig: Rig, tmp_path: Path):
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept(reader, writer)
        try:
            await reader.read()
        finally:
            left.set()

    async with open_script(tmp_path, serve) as socket:
        await rig.bind("sb1", socket)
        async with rig.connect() as wire:
            await opened(wire)
        with anyio.fail_after(10):
            await left.wait()


async def test_one_on_which_nobody_says_anything_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async for rig in swift(tmp_path, monkeypatch, idle_stream_seconds=0.3):
        async with open_server(tmp_path, echo) as socket:
            await rig.bind("sb1", socket)
            async with client(rig, ping_interval=None) as ours:
                await closes(ours)
            async with client(rig, ping_interval=None) as ours:
                until = asyncio.get_running_loop().time() + 0.6
                while asyncio.get_running_loop().time() < until:
                    await (await ours.ping())
                await ours.send("pings have kept it")
                assert await ours.recv() == "pings have kept it"


async def test_one_whose_callers_host_has_vanished_ends(
    swift_rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def vanished(*_: Any) -> bool:
        return True

    async with open_server(tmp_path, echo) as socket:
        await swift_rig.bind("sb1", socket)
        async with client(swift_rig) as ours:
            monkeypatch.setattr(liveness, "is_silent", vanished)
            await closes(ours)


async def test_a_handshake_that_is_not_answered_fails_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async for rig in swift(tmp_path, monkeypatch, handshake_timeout_seconds=0.1):
        async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
            await rig.bind("sb1", socket)
            await wire.send(HANDSHAKE + b"\r\n")
            assert (await wire.answer())[0] == 504


async def test_nobody_listens_is_a_typed_failure(rig: Rig, tmp_path: Path):
    await rig.bind("sb1", tmp_path / "nothing.sock")
    async with rig.connect() as wire:
        await wire.send(HANDSHAKE + b"\r\n")
        status, headers, _ = await wire.answer()
        assert (status, headers["ash-origin"], headers["connection"]) == (502, "hub", "close")


async def test_a_slow_side_stops_the_other(rig: Rig, tmp_path: Path):
    most = 32 * 1024 * 1024  # more than all buffers on the way
    sent = {"sandbox": 0, "caller": 0}
    read_on = asyncio.Event()

    async def pour(writer: asyncio.StreamWriter, who: str) -> None:
        while sent[who] < most:
            writer.write(bytes(65_536))
            await writer.drain()
            sent[who] += 65_536

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept(reader, writer)
        pouring = asyncio.ensure_future(pour(writer, "sandbox"))
        await read_on.wait()
        assert len(await reader.readexactly(most)) == most
        await pouring
        await reader.read()

    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await opened(wire)
        reading = cast("asyncio.Transport", wire.writer.transport)
        reading.pause_reading()
        pouring = asyncio.ensure_future(pour(wire.writer, "caller"))
        await rig.take_in(lambda caller: caller._exchange._caller_paused and caller._exchange._paused)
        assert max(sent.values()) < most
        read_on.set()
        reading.resume_reading()
        with anyio.fail_after(20):
            assert len(await wire.reader.readexactly(most)) == most
            await pouring


async def test_whoever_cannot_prove_to_be_the_sandbox_gets_no_handshake(rig: Rig, tmp_path: Path):
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(response(b'{"proof": "none"}'))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener, rig.connect() as wire:
        route = route_to(tmp_path / "unused")
        there = Endpoint(host="127.0.0.1", port=listener.sockets[0].getsockname()[1], sandbox=route.sandbox_id)
        await rig.routes.bind(replace(route, endpoint=there))
        await wire.send(HANDSHAKE + b"\r\n")
        assert (await wire.answer())[0] == 502
    assert len(asked) == 1
    assert "upgrade" not in asked[0]
