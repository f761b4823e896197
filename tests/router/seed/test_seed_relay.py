"""Routes of the seed's: codes and bodies as its gateway has them, and requests and answers that pass as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import Endpoint
from ash_router.bounds.limits import RelayLimits
from ash_router.seed.seed_passage import SEED_DOOR, forwarded_lines, rest_of
from ash_router.seed.seed_relay import SeedRelay
from ash_router.seed.uuid_admission import UuidAdmission
from tests.router.relay_parts import Wire
from tests.router.sandbox_parts import (
    EVENT,
    STREAM_HEAD,
    Script,
    Server,
    box_server,
    chunk,
    config,
    read_request,
    response,
    says,
)

pytestmark = pytest.mark.anyio

UUID = "trainer-0b6a1c9e-3d52-4c27-9a53-5a5f5ad1e0b1"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


class Hashes:
    """The seed's routes, as a test has them."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.away = False

    async def find(self, uuid: str) -> Endpoint | None:
        if self.away:
            raise ConnectFailed("Redis is away")
        port = self.ports.get(uuid)
        return None if port is None else Endpoint(host="127.0.0.1", port=port, proves=False)

    async def unready(self) -> str | None:
        return "redis not ready" if self.away else None


@dataclass
class Door:
    """A router for these routes, and what the servers behind it were asked."""

    port: int
    hashes: Hashes
    relay: SeedRelay
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list[tuple[str, dict[str, str], bytes]])
    connections: list[asyncio.Task[Any]] = field(default_factory=list[asyncio.Task[Any]])

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Wire]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Wire(reader, writer)
        finally:
            writer.close()

    @asynccontextmanager
    async def serving(self, script: Script, uuid: str = UUID) -> AsyncGenerator[None]:
        """Play the sandbox of a uuid."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.connections.append(task)
            try:
                await script(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.hashes.ports[uuid] = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self.connections:
                task.cancel()

    def notes(self, answer: bytes) -> Script:
        """Return a script that notes the request before it answers."""

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line = (await reader.readline()).decode().rstrip()
            lines = list[str]()
            while text := (await reader.readline()).decode("latin-1").rstrip():
                lines.append(text)
            headers = dict(text.split(": ", 1) for text in lines)
            length = int(headers.get("content-length", 0))
            self.asked.append((line, headers, await reader.readexactly(length)))
            writer.write(answer)
            await writer.drain()
            await reader.read()

        return script


@asynccontextmanager
async def opened(limits: RelayLimits | None = None, answer_seconds: float = 30) -> AsyncGenerator[Door]:
    hashes, relay = Hashes(), SeedRelay(limits or RelayLimits(), answer_seconds)

    async def healthz(_: Any) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/healthz", healthz)])
    protocol, bare = relay.protocol(UuidAdmission(hashes)), {"server_header": False, "date_header": False}
    server = Server(config(app, http=protocol, host="127.0.0.1", port=0, **bare))
    async with server.running():
        yield Door(server.servers[0].sockets[0].getsockname()[1], hashes, relay)
        await relay.aclose()


@pytest.fixture
async def door() -> AsyncGenerator[Door]:
    async with opened() as door:
        yield door


def asks(
    path: str = "/mcp", *, uuid: str | None = UUID, more: str = "", body: bytes = b"{}", by: str = "POST"
) -> bytes:
    named = "" if uuid is None else f"X-Session-ID: {uuid}\r\n"
    return (
        f"{by} {path} HTTP/1.1\r\nhost: gateway:80\r\n{named}{more}content-length: {len(body)}\r\n\r\n".encode() + body
    )


async def answered(door: Door, request: bytes) -> tuple[int, str, bytes]:
    async with door.connect() as wire:
        await wire.send(request)
        status, headers, body = await wire.answer()
        return status, headers.get("content-type", ""), body


TEXT = "text/plain; charset=utf-8"


async def test_without_a_uuid_and_with_an_unknown_one_it_says_what_the_seed_said(door: Door):
    for path in ("/mcp", "/", "/spawn", "/s/sb1/mcp", "/metrics", "/openapi.json"):
        assert await answered(door, asks(path, uuid=None)) == (400, TEXT, b"missing session header\n")
        assert await answered(door, asks(path, uuid="  ")) == (400, TEXT, b"missing session header\n")
        assert await answered(door, asks(path)) == (404, TEXT, b"route not found\n")
    door.hashes.away = True
    assert await answered(door, asks()) == (502, TEXT, b"route lookup error\n")


async def test_it_answers_probes_itself(door: Door):
    assert await answered(door, asks("/healthz", uuid=None, by="GET", body=b"")) == (200, TEXT, b"ok")


async def test_what_the_caller_sends_reaches_the_server_as_it_is(door: Door):
    sent = (
        "Authorization: Bearer its-own\r\nCookie: a=b\r\nAccept-Encoding: gzip\r\nX-Any: thing\r\n"
        "Ash-Token: forged\r\nAsh-Seed-Router: 0\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\nTE: trailers\r\n"
        "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Host: elsewhere\r\n"
    )
    async with door.serving(door.notes(response(b"yes"))):
        assert (await answered(door, asks("/mcp/more?a=%2F", more=sent, body=b"hello")))[0] == 200
    ((line, headers, body),) = door.asked
    assert (line, body) == ("POST /mcp/more?a=%2F HTTP/1.1", b"hello")
    assert headers == {
        "host": f"127.0.0.1:{door.hashes.ports[UUID]}",
        "content-length": "5",
        "x-session-id": UUID,
        "authorization": "Bearer its-own",
        "cookie": "a=b",
        "accept-encoding": "gzip",
        "x-any": "thing",
        "ash-seed-router": "1",
        "connection": "close",
        "x-forwarded-for": "192.0.2.7, 127.0.0.1",
        "x-forwarded-proto": "http",
        "x-forwarded-host": "gateway:80",
    }


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_every_method_passes(door: Door, method: str):
    async with door.serving(door.notes(response(b"yes"))):
        assert (await answered(door, asks(by=method, body=b"")))[0] == 200
        assert door.asked[0][0] == f"{method} /mcp HTTP/1.1"


HEADS = {
    "a length": b"HTTP/1.1 200 OK\r\nx-any: thing\r\ncontent-length: 5\r\n\r\n",
    "none": b"HTTP/1.1 405 Method Not Allowed\r\nallow: POST\r\n\r\n",
    "a stream": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
}
CHUNKED = b"\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answer", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("body", [b"", b"hello"], ids=["as it should be", "with a body all the same"])
async def test_a_head_passes_without_a_body(door: Door, answer: bytes, body: bytes):
    async with door.serving(door.notes(answer + body)), door.connect() as wire:
        for number in range(2):  # the connection is good for more
            await wire.send(asks(by="HEAD", body=b""))
            with anyio.fail_after(10):
                assert await wire.reader.readexactly(len(answer)) == answer
            assert door.asked[number][0] == "HEAD /mcp HTTP/1.1"
        await wire.send(asks("/healthz", uuid=None, by="GET", body=b""))
        assert (await wire.answer())[2] == b"ok"


async def test_a_head_whose_body_would_come_in_chunks_says_nothing_of_them(door: Door):
    async with door.serving(says(HEADS["none"].replace(b"\r\n\r\n", CHUNKED))), door.connect() as wire:
        await wire.send(asks(by="HEAD", body=b""))
        with anyio.fail_after(10):
            assert await wire.reader.readexactly(len(HEADS["none"])) == HEADS["none"]


async def test_a_head_that_is_refused_or_fails_has_no_body_either(door: Door):
    for uuid, status in ((None, 400), (UUID, 404)):
        async with door.connect() as wire:
            await wire.send(asks(uuid=uuid, by="HEAD", body=b""))
            assert (await wire.head())[0] == status
            assert await wire.ended()

    async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with door.serving(breaks_off), door.connect() as wire:
        await wire.send(asks(by="HEAD", body=b""))
        assert (await wire.head())[0] == 502
        await wire.send(asks("/healthz", uuid=None, by="GET", body=b""))
        assert (await wire.answer())[2] == b"ok"


ANSWERS = {
    "a redirect": b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /mcp/\r\ncontent-length: 0\r\n\r\n",
    "a challenge": b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer\r\ncontent-length: 2\r\n\r\nno",
    "a compressed one": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\nset-cookie: a=b\r\ncontent-length: 1\r\n\r\nz",
    "one without content": b"HTTP/1.1 204 No Content\r\nx-any: thing\r\n\r\n",
    "one that changed nothing": b"HTTP/1.1 304 Not Modified\r\netag: a\r\n\r\n",
    "a failure": b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 3\r\n\r\nbad",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
async def test_what_the_server_answers_reaches_the_caller_as_it_is(door: Door, answer: bytes):
    said = answer.replace(b"\r\n", b"\r\nash-origin: hub\r\nkeep-alive: timeout=5\r\n", 1)
    async with door.serving(says(said)), door.connect() as wire:
        for _ in range(2):  # the connection is good for more
            await wire.send(asks())
            with anyio.fail_after(10):
                assert await wire.reader.readexactly(len(answer)) == answer
        assert not wire.received()


async def test_a_stream_passes_as_it_comes_and_ends_with_its_server(door: Door):
    more, goes = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENT))
        await more.wait()
        writer.write(chunk(EVENT))
        await goes.wait()

    async with door.serving(script), door.connect() as wire:
        await wire.send(asks(by="GET", body=b""))
        status, headers = await wire.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream") and "ash-nonce" not in headers
        assert await wire.chunk() == EVENT
        more.set()
        assert await wire.chunk() == EVENT
        goes.set()
        assert await wire.ended()  # and no last chunk, which would say that it is whole


async def test_a_body_that_comes_in_pieces_passes_in_pieces(door: Door):
    got = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readuntil(b"one\r\n") == b"3\r\none\r\n"
        got.set()
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(response(b"yes"))
        await reader.read()

    head = f"POST /mcp HTTP/1.1\r\nhost: g\r\nx-session-id: {UUID}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    async with door.serving(script), door.connect() as wire:
        await wire.send(head + chunk(b"one"))
        with anyio.fail_after(10):
            await got.wait()
        await wire.send(chunk(b"two") + b"0\r\n\r\n")
        assert (await wire.answer())[::2] == (200, b"yes")


async def test_no_connection_to_a_server_is_kept(door: Door):
    async with door.serving(says(response(b"yes"))), door.connect() as wire:
        for number in (1, 2):
            await wire.send(asks())
            assert (await wire.answer())[0] == 200
            assert len(door.connections) == number
        with anyio.fail_after(10):
            await asyncio.gather(*door.connections)  # each was closed


async def test_a_dead_server_is_a_bad_gateway(door: Door):
    async with door.serving(says(b"")):
        pass  # its port is nobody's now
    assert await answered(door, asks()) == (502, TEXT, b"bad gateway\n")


GARBAGE: dict[str, Callable[[], Script]] = {
    "says nothing": lambda: says(b"", then_close=True),
    "says what is not HTTP": lambda: says(b"SSH-2.0-OpenSSH\r\n"),
}


@pytest.mark.parametrize("script", GARBAGE.values(), ids=GARBAGE.keys())
async def test_a_server_that_is_none_is_a_bad_gateway(door: Door, script: Callable[[], Script]):
    async with door.serving(script()):
        assert await answered(door, asks()) == (502, TEXT, b"bad gateway\n")


async def test_a_slow_server_is_a_gateway_timeout_and_a_slow_stream_is_not():
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def slow_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENT))
        with anyio.fail_after(60):
            await late.wait()
        writer.write(b"0\r\n\r\n")

    late = asyncio.Event()
    async with opened(RelayLimits(body_timeout_seconds=0.2), answer_seconds=0.2) as door:
        async with door.serving(silent), door.serving(slow_stream, "slow"), AsyncExitStack() as wires:
            with anyio.fail_after(60):
                while True:
                    wire = await wires.enter_async_context(door.connect())
                    await wire.send(asks(uuid="slow"))
                    status, _ = await wire.head()
                    if status != 504:  # on a busy machine even the head may be late
                        break
            assert status == 200
            assert await answered(door, asks()) == (504, TEXT, b"gateway timeout\n")
            late.set()
            assert (await wire.chunk(), await wire.reader.readline()) == (EVENT, b"0\r\n")


async def test_one_sandbox_has_so_many_calls_at_once(door: Door):
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        asked.set()
        await reader.read()

    asked = asyncio.Event()
    async with opened(RelayLimits(max_in_flight_per_owner=1)) as door, door.serving(silent), door.connect() as wire:
        await wire.send(asks())
        with anyio.fail_after(10):
            await asked.wait()
        assert (await answered(door, asks()))[0] == 429
        async with door.serving(says(response(b"yes")), "other"):
            assert (await answered(door, asks(uuid="other")))[0] == 200


async def test_the_seeds_client_speaks_mcp_through_it(door: Door):
    box, _ = box_server()
    inner = Server(config(box.http_app(path="/mcp", host_origin_protection=False), host="127.0.0.1", port=0))
    async with inner.running():
        door.hashes.ports[UUID] = inner.servers[0].sockets[0].getsockname()[1]
        transport = StreamableHttpTransport(f"http://127.0.0.1:{door.port}/mcp", headers={"X-Session-ID": UUID})
        async with Client(transport) as client:
            assert "add" in [tool.name for tool in await client.list_tools()]
            assert (await client.call_tool("add", {"a": 1, "b": 2})).data == 3


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        ("/", "/mcp"),
        ("/mcp", "/mcp"),
        ("/mcp/", "/mcp/"),
        ("/mcp?a=b", "/mcp?a=b"),
        ("/?a", "/mcp?a"),
        ("/x", "/mcp/x"),
        ("/mcp/x?a=b", "/mcp/x?a=b"),
    ],
)
def test_what_a_server_is_asked_for_is_below_mcp(asked: str, target: str):
    assert SEED_DOOR.target + rest_of(asked.encode()) == target.encode()


def test_the_callers_address_stands_behind_those_that_came():
    headers = [(b"x-forwarded-for", b"192.0.2.7"), (b"x-forwarded-for", b"192.0.2.8")]
    told = b"x-forwarded-for: 192.0.2.7, 192.0.2.8, 198.51.100.1\r\nx-forwarded-proto: https\r\n"
    assert forwarded_lines(headers, "198.51.100.1", "https") == told
