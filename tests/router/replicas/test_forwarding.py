"""A session that lives on one replica works through another: its requests are forwarded, one hop, as they come."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastmcp import Client

from ash_mcp.types import Endpoint
from ash_router.caller.relay import RelayLimits
from ash_router.replicas import forwarding, membership
from ash_router.replicas.forwarding import REACH_SECONDS
from tests.balancer import alternating
from tests.router.relay_parts import Wire, failure, legacy, modern, tool_call
from tests.router.replicas.replica_parts import Pair, open_pair
from tests.router.sandbox_parts import EVENT, STREAM_HEAD, Box, chunk, open_box, open_script, read_request
from tests.router.sessions.test_relay_server_requests import asking_server, backwards
from tests.router.sessions.test_relay_sessions import add, message, session

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:The .* capability is deprecated")]

LIST = message("tools/list", {}, 2)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a replica that lives takes longer to be reached than it may in a hive."""
    monkeypatch.setattr(forwarding, "CONNECT_SECONDS", 30.0)
    monkeypatch.setattr(forwarding, "REACH_SECONDS", 30.0)
    monkeypatch.setattr(membership, "ASK_SECONDS", 30.0)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncGenerator[Pair]:
    async with open_pair(tmp_path) as pair:
        yield pair


@pytest.fixture
async def box(pair: Pair, tmp_path: Path) -> AsyncGenerator[Box]:
    """A sandbox to which only the owner of the session has a route, so that no other replica can call it."""
    async with open_box(tmp_path) as box:
        await pair.owner.rig.bind("sb1", box.socket)
        yield box


@asynccontextmanager
async def through_other(pair: Pair) -> AsyncGenerator[tuple[Wire, str]]:
    """Open a session on its owner, and a connection to the other replica."""
    async with session(pair.owner.rig) as (_, session_id), pair.other.rig.connect() as wire:
        yield wire, session_id


async def ask(wire: Wire, data: bytes) -> tuple[int, dict[str, str], bytes]:
    await wire.send(data)
    return await wire.answer()


def said(body: bytes) -> Any:
    """The JSON of an answer, which may be one event."""
    return json.loads(next((line[6:] for line in body.splitlines() if line.startswith(b"data: {")), body))


# What passes.


async def test_a_sessions_id_names_its_replica_and_its_request_is_answered_by_that_one(pair: Pair):
    async with through_other(pair) as (wire, session_id):
        assert session_id.startswith(f"{pair.owner.replicas.id}.")
        for _ in range(2):
            status, headers, body = await ask(wire, legacy(LIST, session_id))
            assert (status, headers["ash-origin"], headers["mcp-session-id"]) == (200, "hub", session_id)
            assert {tool["name"] for tool in said(body)["result"]["tools"]} == {"call", "hello"}
    assert [method for method, _ in pair.owner.requests] == ["POST", "POST"]
    assert len(pair.other.rig.sessions) == 0


async def test_a_call_keeps_the_word_of_the_owner_on_who_answered(pair: Pair, box: Box):
    async with through_other(pair) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert b'"structuredContent":{"result":3}' in await wire.chunk()
    assert box.ran == ["add"]
    assert head.count(b"ash-origin: sandbox\r\n") == head.count(b"ash-origin") == 1
    assert head.count(b"ash-nonce: ") == 1
    assert head.count(b"mcp-session-id: " + session_id.encode()) == 1


async def test_the_owner_learns_who_asks_and_nothing_that_it_need_not_know(pair: Pair):
    async with through_other(pair) as (wire, session_id):
        secrets = "authorization: Bearer x\r\ncookie: y\r\nash-voucher: z\r\nash-scope: q\r\nx-principal: me\r\n"
        await ask(wire, legacy(LIST, session_id, more=secrets))
    (_, headers) = pair.owner.requests[0]
    assert set(headers) == {
        "host",
        "content-length",
        "content-type",
        "accept",
        "mcp-session-id",
        "mcp-protocol-version",
        "ash-voucher",
    }
    assert len(headers["ash-voucher"]) == 1 and headers["ash-voucher"] != ["z"]


class EventApp:
    """A hive's app with one session, all of whose answers are streams that say what it is told to."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes] = asyncio.Queue()
        self.left = asyncio.Event()
        self.seen: list[tuple[str, str | None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        headers = dict(scope["headers"])
        self.seen.append((scope["method"], headers.get(b"last-event-id", b"").decode() or None))
        if b"mcp-session-id" not in headers:
            body = b'{"result":{"protocolVersion":"2025-06-18"}}'
            given = [(b"content-type", b"application/json"), (b"mcp-session-id", b"of-the-sdk")]
            await send({"type": "http.response.start", "status": 200, "headers": given})
            await send({"type": "http.response.body", "body": body})
            return
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        )
        async with anyio.create_task_group() as group:
            group.start_soon(self._tell, send)
            while (await receive())["type"] != "http.disconnect":
                continue
            self.left.set()
            group.cancel_scope.cancel()

    async def _tell(self, send: Any) -> None:
        while True:
            event = await self.events.get()
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _live(self, receive: Any, send: Any) -> None:
        for done in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{done}.complete"})


async def test_a_stream_passes_event_by_event_and_the_owner_learns_that_its_listener_left(tmp_path: Path):
    app = EventApp()
    async with open_pair(tmp_path, app=app) as pair, session(pair.owner.rig) as (_, session_id):
        async with pair.other.rig.connect() as wire:
            await wire.send(legacy(b"", session_id, method="GET", more="last-event-id: 41\r\n"))
            assert (await wire.head())[0] == 200
            for event in (b"data: one\n\n", b"data: two\n\n"):
                app.events.put_nowait(event)
                assert await wire.chunk() == event
            assert len(pair.other.rig.relay.services.streams) == 1
            assert len(pair.other.rig.ledger) == 0
        with anyio.fail_after(5):
            await app.left.wait()
        assert len(pair.other.rig.relay.services.streams) == 0
    assert app.seen[-1] == ("GET", "41")


async def test_ending_a_session_through_another_replica_ends_it(pair: Pair):
    async with through_other(pair) as (wire, session_id):
        assert (await ask(wire, legacy(b"", session_id, method="DELETE")))[0] == 200
        assert len(pair.owner.rig.sessions) == 0
        assert (await ask(wire, legacy(LIST, session_id)))[0] == 404


async def test_a_cancellation_through_another_replica_reaches_the_sandbox(pair: Pair, box: Box):
    async with through_other(pair) as (wire, session_id), pair.other.rig.connect() as calling:
        await calling.send(legacy(message("tools/call", {"name": "sb1_wait"}, 9), session_id))
        with anyio.fail_after(5):
            await box.waiting.wait()
        assert len(pair.other.rig.ledger) == 1
        cancelled = message("notifications/cancelled", {"requestId": 9})
        assert (await ask(wire, legacy(cancelled, session_id)))[0] == 202
        with anyio.fail_after(5):
            await box.cancelled.wait()


async def test_a_caller_that_leaves_is_missed_by_the_owner(pair: Pair, box: Box):
    async with session(pair.owner.rig) as (_, session_id):
        async with pair.other.rig.connect() as wire:
            await wire.send(legacy(message("tools/call", {"name": "sb1_wait"}, 9), session_id))
            with anyio.fail_after(5):
                await box.waiting.wait()
            assert (len(pair.owner.rig.ledger), len(pair.other.rig.ledger)) == (1, 1)
        with anyio.fail_after(5):
            while len(pair.owner.rig.ledger) or len(pair.other.rig.ledger):
                await asyncio.sleep(0.01)


async def test_many_calls_of_many_sessions_get_each_its_own_answer_while_others_leave(pair: Pair, box: Box):
    async def calls(number: int) -> None:
        async with session(pair.owner.rig) as (_, session_id):
            for turn in range(8):
                value = f"{number}/{turn}"
                async with pair.other.rig.connect() as wire:
                    params = {"name": "sb1_echo", "arguments": {"value": value}}
                    await wire.send(legacy(message("tools/call", params, turn), session_id))
                    if turn % 3 == 1:
                        continue  # and leaves
                    answer = said((await wire.answer())[2])
                    while "error" in answer:  # on a machine that is busy the owner counts as slow
                        assert answer["error"]["data"]["retryable"], answer
                        answer = said((await ask(wire, legacy(message("tools/call", params, turn), session_id)))[2])
                    assert (answer["id"], answer["result"]["structuredContent"]) == (turn, {"value": value})

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(calls, number)
        while len(pair.owner.rig.ledger) or len(pair.other.rig.ledger):
            await asyncio.sleep(0.01)


async def test_what_a_sandbox_asks_of_a_client_is_answered_through_any_replica(pair: Pair, tmp_path: Path):
    async with open_box(tmp_path, "asker", asking_server()) as asker, _alternating(pair) as url:
        await pair.owner.rig.bind("sb1", asker.socket)
        await pair.other.rig.bind("sb1", asker.socket)
        async with Client(url, mode="legacy", elicitation_handler=backwards) as client:
            for _ in range(4):
                assert (await client.call_tool("sb1_greet")).data == "hello ?uoy era ohw"
    assert pair.owner.requests or pair.other.requests


async def test_a_request_that_names_no_other_replica_goes_the_ordinary_way(pair: Pair):
    own = f"{pair.other.replicas.id}.unknown"
    for name in (own, "0123456789abcdef0123456789abcdef", "toolonganame.x", "ABCDEFGH.x", "abcdefgh.", "abcdefgh"):
        async with pair.other.rig.connect() as wire:
            assert (await ask(wire, legacy(LIST, name)))[0] == 404
    async with through_other(pair) as (wire, session_id):
        body = tool_call("hello")
        status, _, answer = await ask(wire, modern("hello", body, more=f"mcp-session-id: {session_id}\r\n"))
        assert status == 200 and b"hello from the hub" in answer
        assert (await ask(wire, legacy(b"", session_id, method="PUT")))[0] == 404
    assert pair.owner.requests == pair.other.requests == []


async def test_the_sdks_own_id_opens_no_session(pair: Pair):
    async with session(pair.owner.rig) as (wire, session_id):
        assert (await ask(wire, legacy(LIST, session_id.partition(".")[2])))[0] == 404
        assert (await ask(wire, legacy(LIST, session_id)))[0] == 200


# Who may.


async def test_another_principals_session_is_none_through_another_replica(pair: Pair):
    async with through_other(pair) as (wire, session_id):
        theirs = await ask(wire, legacy(LIST, session_id, more="x-principal: ann\r\n"))
        nobodys = await ask(wire, legacy(LIST, f"{pair.owner.replicas.id}.unknown"))
    assert theirs[0] == 404
    assert theirs[2] == nobodys[2]


async def test_a_forwarded_request_is_not_forwarded_again(pair: Pair):
    async with session(pair.owner.rig) as (_, session_id):
        admitted = pair.owner.rig.sessions.admitted(session_id.partition(".")[2])
        assert admitted is not None
        voucher = pair.owner.vouchers.write(pair.other.replicas.id, admitted).decode()
        async with pair.other.connect_inside() as wire:
            status, headers, _ = await ask(wire, legacy(LIST, session_id, more=f"ash-voucher: {voucher}\r\n"))
        assert (status, headers["ash-origin"]) == (404, "hub")
    assert pair.owner.requests == []
    assert len(pair.other.requests) == 1


async def test_a_voucher_from_outside_is_not_read(pair: Pair, box: Box):
    async with through_other(pair) as (wire, session_id):
        admitted = pair.owner.rig.sessions.admitted(session_id.partition(".")[2])
        assert admitted is not None
        voucher = pair.other.vouchers.write(pair.owner.replicas.id, admitted).decode()
        more = f"ash-voucher: {voucher}\r\nx-principal: ann\r\n"
        assert (await ask(wire, legacy(LIST, session_id, more=more)))[0] == 404
        async with pair.owner.rig.connect() as outside:
            assert (await ask(outside, legacy(LIST, session_id, more=more)))[0] == 404
            direct = legacy(LIST, more=f"x-session-id: sb1\r\nash-voucher: {voucher}\r\n")
            await ask(outside, direct)
    assert box.heads and not any("ash-voucher" in head for head in box.heads)


# What an owner that is gone costs.

TRIES = 5
"""How often a time is measured: a busy machine adds to some, and a wait of the product's to all."""


async def test_an_unknown_or_dead_owner_is_a_session_that_nobody_knows_within_a_second(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forwarding, "REACH_SECONDS", REACH_SECONDS)
    async with through_other(pair) as (wire, session_id):
        unknown = await ask(wire, legacy(LIST, f"{pair.owner.replicas.id}.unknown"))
        pair.owner.die()
        for name in ("abcdefgh.unknown", session_id):
            for method, body in (("POST", LIST), ("GET", b""), ("DELETE", b"")):
                took: list[float] = []
                for _ in range(TRIES):
                    began_at = time.monotonic()
                    status, headers, answer = await ask(wire, legacy(body, name, method=method))
                    took.append(time.monotonic() - began_at)
                    assert (status, headers["ash-origin"], headers["content-type"]) == (404, "hub", "application/json")
                    assert json.loads(answer) == json.loads(unknown[2])
                assert min(took) < 1, f"{method} {name}"
    assert json.loads(unknown[2])["error"]["message"] == "Session not found"
    assert len(pair.other.rig.ledger) == len(pair.other.rig.relay.services.streams) == 0


async def test_a_session_whose_owner_is_silent_is_not_gone_while_that_one_is_announced(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
):
    assert REACH_SECONDS <= 0.9
    monkeypatch.setattr(forwarding, "REACH_SECONDS", 0.3)
    with _deaf_port() as port:
        await pair.store.announce_replica("gone0000", {"address": f"127.0.0.1:{port}"}, 60)
        async with pair.other.rig.connect() as wire:
            took: list[float] = []
            for _ in range(TRIES):
                began_at = time.monotonic()
                status, _, answer = await ask(wire, legacy(LIST, "gone0000.x"))
                took.append(time.monotonic() - began_at)
                assert status != 404 and b"cannot be reached now; try again" in answer
            assert 0.3 <= min(took) < 1


def streams_without_end(begun: asyncio.Event, *, begins: bool) -> Any:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            headers, body = await read_request(reader)
            method = json.loads(body)["method"] if body else headers[":method"]
            if method == "initialize":
                result: dict[str, Any] = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {}}
                said = json.dumps({"jsonrpc": "2.0", "id": 0, "result": result}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nmcp-session-id: s\r\n")
                writer.write(b"content-length: %d\r\n\r\n" % len(said) + said)
            elif method == "tools/call":
                if begins:
                    writer.write(STREAM_HEAD + chunk(EVENT))
                begun.set()
            else:
                writer.write(b"HTTP/1.1 405 No\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()

    return script


async def test_an_owner_that_dies_in_a_calls_stream_ends_it_with_a_typed_failure(pair: Pair, tmp_path: Path):
    begun = asyncio.Event()
    async with (
        open_script(tmp_path, streams_without_end(begun, begins=True)) as sandbox,
        through_other(pair) as (wire, session_id),
    ):
        await pair.owner.rig.bind("sb1", sandbox)
        await wire.send(legacy(add("mine"), session_id))
        _, headers = await wire.head()
        assert await wire.chunk() == EVENT
        pair.owner.die()
        event = await wire.chunk()
        assert await wire.chunk() == b""
    answer = event.removeprefix(b"event: message\ndata: ")
    failed = failure(answer)
    assert json.loads(answer)["id"] == "mine"
    assert (failed["kind"], failed["retryable"], failed["trainable"]) == ("stream_broken", False, False)
    assert "whether the call did its work is unknown" in failed["message"]
    assert json.loads(answer)["result"]["_meta"]["ash-nonce"] == headers["ash-nonce"]


async def test_an_owner_that_dies_in_an_answer_of_its_own_is_a_failure_with_a_nonce(tmp_path: Path):
    app = EventApp()
    async with open_pair(tmp_path, app=app) as pair, through_other(pair) as (wire, session_id):
        await wire.send(legacy(message("tools/call", {"name": "spawn"}, 3), session_id))
        _, headers = await wire.head()
        assert headers["ash-origin"] == "hub"
        app.events.put_nowait(b"data: half of")
        assert await wire.chunk() == b"data: half of"
        pair.owner.die()
        cut, _, answer = (await wire.chunk()).partition(b"event: message\ndata: ")
    assert cut == b"\nevent: ash-cut\n\n"
    assert failure(answer)["kind"] == "stream_broken"
    assert json.loads(answer)["result"]["_meta"]["ash-nonce"] == headers["ash-nonce"]


async def test_an_owner_that_dies_before_it_answers_a_call_is_a_typed_failure(pair: Pair, tmp_path: Path):
    begun = asyncio.Event()
    async with (
        open_script(tmp_path, streams_without_end(begun, begins=False)) as sandbox,
        through_other(pair) as (wire, session_id),
    ):
        await pair.owner.rig.bind("sb1", sandbox)
        await wire.send(legacy(add("mine"), session_id))
        with anyio.fail_after(5):
            await begun.wait()
        pair.owner.die()
        status, headers, body = await wire.answer()
    assert (status, headers["ash-origin"], headers["mcp-session-id"]) == (200, "hub", session_id)
    assert (json.loads(body)["id"], failure(body)["kind"]) == ("mine", "stream_broken")


async def test_a_connection_to_an_owner_breaks_when_its_host_is_silent(pair: Pair):
    forwarder = pair.other.rig.relay.forwarder
    assert forwarder is not None
    async with through_other(pair) as (wire, session_id):
        await ask(wire, legacy(LIST, session_id))
        connection = forwarder.upstreams.take_idle(Endpoint(host="127.0.0.1", port=pair.owner.port))
        assert connection is not None
        transport: Any = connection._transport  # pyright: ignore[reportPrivateUsage]
        found = transport.get_extra_info("socket")
        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        probes = [
            found.getsockopt(socket.IPPROTO_TCP, which)
            for which in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        ]
        assert probes == [2, 2, 3, 0]  # the last would end a connection to an owner that reads nothing for a while
        connection.close()


class LargeApp(EventApp):
    """Its stream is large, and it counts what it could send of it."""

    total = 256 * 2**20
    """More than twice what the kernel may hold of it between three processes: up to 32 MiB for a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    async def _tell(self, send: Any) -> None:
        while self.sent < self.total:
            await send({"type": "http.response.body", "body": b"x" * 2**18, "more_body": True})
            self.sent += 2**18
        await send({"type": "http.response.body", "body": b""})


async def test_a_slow_reader_holds_back_the_owner(tmp_path: Path):
    app = LargeApp()
    async with open_pair(tmp_path, app=app) as pair, through_other(pair) as (wire, session_id):
        await wire.send(legacy(b"", session_id, method="GET"))
        await wire.head()
        before = -1
        while before != app.sent or not before:
            before = app.sent
            await asyncio.sleep(0.1)
        assert app.sent < app.total // 2
        size = 0
        with anyio.fail_after(30):
            while data := await wire.chunk():
                size += len(data)
        assert size == app.total


async def test_an_owner_that_dies_under_a_stream_that_listens_just_ends_it(tmp_path: Path):
    app = EventApp()
    async with open_pair(tmp_path, app=app) as pair, through_other(pair) as (wire, session_id):
        await wire.send(legacy(b"", session_id, method="GET"))
        await wire.head()
        app.events.put_nowait(EVENT)
        assert await wire.chunk() == EVENT
        pair.owner.die()
        assert await wire.chunk() == b""


async def test_an_owner_with_another_key_is_the_hives_own_fault(pair: Pair, tmp_path: Path):
    async with open_pair(tmp_path) as strangers, session(strangers.owner.rig) as (_, session_id):
        address = f"127.0.0.1:{strangers.owner.port}"
        await pair.store.announce_replica(strangers.owner.replicas.id, {"address": address}, 60)
        async with pair.other.rig.connect() as wire:
            status, _, body = await ask(wire, legacy(add(), session_id))
    assert status == 200
    assert failure(body)["kind"] == "hive_fault" and "hive.key" in failure(body)["message"]


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncGenerator[Pair]:
    """Two replicas of which the other one takes one call and one stream of a principal at once."""
    limits = RelayLimits(max_in_flight_per_owner=1, max_streams_per_owner=1)
    async with open_pair(tmp_path, limits=limits) as pair:
        yield pair


async def test_a_forwarded_stream_counts_as_its_principals(narrow: Pair):
    async with through_other(narrow) as (first, session_id), narrow.other.rig.connect() as second:
        await first.send(legacy(b"", session_id, method="GET"))
        await first.head()
        status, headers, _ = await ask(second, legacy(b"", session_id, method="GET"))
        assert (status, headers["retry-after"]) == (429, "1")
        async with narrow.other.rig.connect() as third:
            assert (await ask(third, legacy(LIST, session_id)))[0] == 200


async def test_a_forwarded_call_counts_as_its_principals_and_what_ends_it_does_not(narrow: Pair, tmp_path: Path):
    async with (
        open_box(tmp_path) as box,
        through_other(narrow) as (first, session_id),
        narrow.other.rig.connect() as second,
    ):
        await narrow.owner.rig.bind("sb1", box.socket)
        await first.send(legacy(message("tools/call", {"name": "sb1_wait"}, 9), session_id))
        with anyio.fail_after(5):
            await box.waiting.wait()
        status, headers, body = await ask(second, legacy(add("more"), session_id))
        assert (status, headers["retry-after"]) == (200, "1")
        assert (json.loads(body)["id"], failure(body)["kind"]) == ("more", "capacity_exceeded")
        assert box.ran == []
        assert (await ask(second, legacy(LIST, session_id)))[0] == 200
        cancelled = message("notifications/cancelled", {"requestId": 9})
        assert (await ask(second, legacy(cancelled, session_id)))[0] == 202
        with anyio.fail_after(5):
            await box.cancelled.wait()


@contextmanager
def _deaf_port() -> Generator[int]:
    """A port on which connecting takes for ever, as on a host that has vanished: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(listener.getsockname())
            yield listener.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


@asynccontextmanager
async def _alternating(pair: Pair) -> AsyncGenerator[str]:
    """The URL of a balancer that takes each request's connection to the next replica."""
    async with alternating([pair.owner.rig.port, pair.other.rig.port]) as port:
        yield f"http://127.0.0.1:{port}/mcp"
