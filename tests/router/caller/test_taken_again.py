"""Requests that come again on their connection, with the same head but for the length: as if each were the first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import h11
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from ash_mcp.errors import Conflict
from ash_router.bounds.limits import RelayLimits
from ash_router.caller.intake import SAME_HEAD_SECONDS, Intake
from ash_router.http.heads import SameHead
from ash_router.upstream.pool import ConnectionPool
from tests.router.caller.test_relay_fuzz import EXAMPLES, Read, mutated, read
from tests.router.calls.test_relay_direct import direct
from tests.router.relay_parts import Clock, Rig, Wire, failure, legacy, modern, open_rig, tool_call
from tests.router.sandbox_parts import Box, open_box, open_script
from tests.router.sessions.test_relay_sessions import session

pytestmark = pytest.mark.anyio


class Seen:
    """How many requests were known again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known = 0
        body_of = SameHead.body_of

        def counting(same: SameHead, message: bytes) -> bytes | None:
            body = body_of(same, message)
            self.known += body is not None and message.startswith(b"POST ")
            return body

        monkeypatch.setattr(SameHead, "body_of", counting)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


async def ask(wire: Wire, request: bytes) -> tuple[int, Any]:
    await wire.send(request)
    status, _, body = await wire.answer()
    return status, body


def added(body: bytes) -> int:
    return json.loads(body)["result"]["structuredContent"]["result"]


def add(name: str, a: int) -> bytes:
    return tool_call(name, {"a": a, "b": 1}, request_id=a)


@pytest.mark.parametrize("door", ["named", "direct"])
async def test_calls_of_any_length_are_known_and_each_is_its_own(rig: Rig, box: Box, seen: Seen, door: str) -> None:
    more = "mcp-protocol-version: 2026-07-28\r\nmcp-method: tools/call\r\nmcp-name: add\r\naccept: */*\r\n"
    async with rig.connect() as wire:
        for a in (1, 22, 333_333, 4):
            request = (
                modern("sb1_add", add("sb1_add", a)) if door == "named" else direct(body=add("add", a), more=more)
            )
            status, body = await ask(wire, request)
            assert (status, json.loads(body)["id"], added(body)) == (200, a, a + 1)
    assert seen.known == 3
    assert len(box.posted()) == 4
    assert len(rig.ledger) == 0


@pytest.mark.parametrize("door", ["named", "direct"])
async def test_the_next_call_goes_where_its_name_leads_now(rig: Rig, box: Box, tmp_path: Path, door: str) -> None:
    async with open_box(tmp_path, "other") as other, rig.connect() as wire:
        request = direct(body=add("add", 1), more="mcp-protocol-version: 2026-07-28\r\nmcp-method: tools/call\r\n")
        if door == "named":
            request = modern("sb1_add", add("sb1_add", 1))
        for _ in range(2):
            await ask(wire, request)
        (route,) = rig.routes.ids()
        await rig.routes.unbind(route)
        await rig.bind("sb1", other.socket)
        for _ in range(2):
            await ask(wire, request)
        assert (len(box.posted()), len(other.posted())) == (2, 2)
        (route,) = rig.routes.ids()
        await rig.routes.unbind(route)
        status, body = await ask(wire, request)
        assert status == 404 if door == "direct" else b"sb1_add" in body
        assert (len(box.posted()), len(other.posted())) == (2, 2)


@pytest.mark.parametrize("door", ["named", "direct"])
async def test_a_sandbox_that_takes_no_calls_now_gets_none_by_a_known_head(
    rig: Rig, box: Box, seen: Seen, door: str
) -> None:
    request = modern("sb1_add", add("sb1_add", 1)) if door == "named" else direct(body=add("add", 1))
    (sandbox,) = rig.routes.ids()
    async with rig.connect() as wire:
        for _ in range(2):
            await ask(wire, request)
        before, known = len(box.posted()), seen.known
        with rig.ledger.closed(sandbox, Conflict("it is reset"), Conflict("it is being reset")):
            assert b"it is being reset" in (await ask(wire, request))[1]
        assert (len(box.posted()), seen.known) == (before, known + 1)
        await ask(wire, request)
        assert len(box.posted()) == before + 1


async def test_calls_by_one_head_of_a_session_go_each_to_the_tool_that_it_names(
    rig: Rig, box: Box, seen: Seen, tmp_path: Path
) -> None:
    async with open_box(tmp_path, "other") as other, session(rig) as (wire, session_id):
        await rig.bind("sb2", other.socket)
        called = ["sb1_add", "sb2_add", "sb2_echo", "sb1_add", "sb1_echo", "sb2_add"]
        for name in called:
            is_sum = name.endswith("add")
            _, body = await ask(
                wire, legacy(tool_call(name, {"a": 1, "b": 2} if is_sum else {"value": "t"}), session_id)
            )
            assert (b'{"result":3}' if is_sum else b'{"value":"t"}') in body
        assert (len(box.ran), len(other.ran)) == (2, 2)
    assert seen.known == len(called) - 2  # not the first two: behind an answer of the hive nothing is kept


async def test_a_message_that_is_no_call_is_the_hives_also_after_calls_with_its_head(rig: Rig, box: Box) -> None:
    async with rig.connect() as wire:
        hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        initialize = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello}
        await wire.send(legacy(json.dumps(initialize).encode()))
        _, headers, _ = await wire.answer()
        session = headers["mcp-session-id"]

        async def say(message: dict[str, Any]) -> tuple[int, bytes]:
            return await ask(wire, legacy(json.dumps({"jsonrpc": "2.0", **message}).encode(), session))

        def call(name: str, **arguments: int) -> dict[str, Any]:
            return {"id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}

        await say({"method": "notifications/initialized"})
        for _ in range(2):
            assert b'"result":3' in (await say(call("sb1_add", a=1, b=2)))[1]
            assert b"hello from the hub" in (await say(call("hello")))[1]
            assert b'"hello"' in (await say({"id": 2, "method": "tools/list"}))[1]
            assert (await say({"method": "notifications/cancelled", "params": {"requestId": 9}}))[0] == 202


async def test_a_known_head_is_admitted_anew_after_a_moment(rig: Rig, box: Box, seen: Seen, clock: Clock) -> None:
    async with rig.connect() as wire:
        for passed in (0, SAME_HEAD_SECONDS / 2, SAME_HEAD_SECONDS / 2):
            clock.now += passed
            assert (await ask(wire, modern("sb1_add", add("sb1_add", 1))))[0] == 200
        assert len(rig.admission.asked) == 1
        clock.now += 0.001
        assert (await ask(wire, modern("sb1_add", add("sb1_add", 1))))[0] == 200
    assert (len(rig.admission.asked), seen.known) == (2, 3)


async def test_limits_hold_for_what_is_known(tmp_path: Path) -> None:
    limits = RelayLimits(max_body_bytes=600, max_in_flight_per_owner=1)
    async with open_rig(tmp_path, limits=limits) as rig, open_box(tmp_path) as box, rig.connect() as wire:
        await rig.bind("sb1", box.socket)
        assert (await ask(wire, modern("sb1_add", add("sb1_add", 1))))[0] == 200
        async with rig.connect() as other:
            await other.send(modern("sb1_wait"))
            with anyio.fail_after(5):
                await box.waiting.wait()
            _, body = await ask(wire, modern("sb1_add", add("sb1_add", 1)))
            assert failure(body)["kind"] == "capacity_exceeded"
        status, _ = await ask(wire, modern("sb1_add", tool_call("sb1_add", {"a": 1, "b": 1, "c": "x" * 600})))
        assert status == 413


async def test_the_limit_of_a_direct_request_holds_for_what_is_known(tmp_path: Path) -> None:
    async with open_rig(tmp_path, limits=RelayLimits(max_direct_body_bytes=600)) as rig, open_box(tmp_path) as box:
        await rig.bind("sb1", box.socket)
        async with rig.connect() as wire:
            for size, expected in ((3, 406), (600, 406), (601, 413)):
                assert (await ask(wire, direct(body=b"x" * size)))[0] == expected
    assert len(box.posted()) == 2


async def test_two_requests_in_one_read_are_not_known(rig: Rig, box: Box, seen: Seen) -> None:
    request = modern("sb1_add", add("sb1_add", 1))
    async with rig.connect() as wire:
        assert (await ask(wire, request))[0] == 200
        await wire.send(request + request)
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await wire.ended()
    assert seen.known == 0


async def test_a_client_that_asks_for_nothing_more_is_let_go(
    rig: Rig, box: Box, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.server.config.timeout_keep_alive = 0.02  # type: ignore[assignment]
    looked, look_idle = asyncio.Event(), Intake._look_idle  # pyright: ignore[reportPrivateUsage]

    def looking(connection: Intake) -> None:
        look_idle(connection)
        looked.set()

    monkeypatch.setattr(Intake, "_look_idle", looking)
    async with rig.connect() as wire:
        for _ in range(3):
            clock.now += 0.019
            assert (await ask(wire, modern("sb1_add", add("sb1_add", 1))))[0] == 200
            for _ in range(2):  # whatever the timer says, it has not idled for so long
                looked.clear()
                with anyio.fail_after(5):
                    await looked.wait()
        clock.now += 0.021
        with anyio.fail_after(5):
            assert await wire.ended()


# What a sandbox answers again.


async def test_answers_of_any_length_are_passed_on_each_as_it_is(rig: Rig, tmp_path: Path) -> None:
    answers = [b"{}", b"{1}", b"x" * 300, b"", b"{2}"]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        await reader.read()

    async with open_script(tmp_path, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        for answer in answers:
            await wire.send(direct(body=b"", framing="content-length: 0\r\n"))
            status, headers, body = await wire.answer()
            assert (status, headers["content-type"], body) == (200, "a/b", answer)


@pytest.mark.parametrize(
    "second",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}x",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 02 3\r\n\r\n{}",
    ],
)
async def test_a_sandbox_that_says_too_much_the_second_time_is_refused(
    rig: Rig, tmp_path: Path, second: bytes
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(second)
        await reader.read()

    async with open_script(tmp_path, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        assert (await ask(wire, direct(body=b"", framing="content-length: 0\r\n")))[0] == 200
        assert (await ask(wire, direct(body=b"", framing="content-length: 0\r\n")))[0] == 502


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
async def test_an_answer_in_pieces_is_the_same_answer_each_time(rig: Rig, tmp_path: Path, pieces: int) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", b"{  }"
        cut = {1: [head + body], 2: [head, body], 3: [head, body[:1], body[1:]], 4: [head[:9], head[9:], body, b""]}
        while await reader.readuntil(b"\r\n\r\n"):
            for piece in cut[pieces]:
                writer.write(piece)
                await asyncio.sleep(0.01)

    async with open_script(tmp_path, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        for _ in range(3):
            assert await ask(wire, direct(body=b"", framing="content-length: 0\r\n")) == (200, b"{  }")


@pytest.mark.parametrize("before", [0, 1])
async def test_a_sandbox_that_dies_after_its_head_is_a_typed_failure(rig: Rig, tmp_path: Path, before: int) -> None:
    left = [before]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n" + b"{}" * bool(left[0]))
            if not left[0]:
                return
            left[0] -= 1

    async with open_script(tmp_path, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        for _ in range(before):
            assert (await ask(wire, modern("sb1_add", add("sb1_add", 1))))[0] == 200
        _, body = await ask(wire, modern("sb1_add", add("sb1_add", 1)))
        assert failure(body)["kind"] == "stream_broken"


async def test_idle_connections_are_closed_before_the_sandbox_would(tmp_path: Path) -> None:
    limits = RelayLimits(idle_upstream_seconds=0.2)
    async with open_rig(tmp_path, limits=limits) as rig, open_box(tmp_path) as box, rig.connect() as wire:
        route = await rig.bind("sb1", box.socket)
        pool = rig.relay.services.upstreams
        assert isinstance(pool, ConnectionPool)
        assert (await ask(wire, modern("sb1_add", add("sb1_add", 1))))[0] == 200
        kept = next(iter(pool._open), None)  # pyright: ignore[reportPrivateUsage]
        with anyio.fail_after(5):
            while pool._open:  # pyright: ignore[reportPrivateUsage]
                await asyncio.sleep(0.01)
        assert (kept is None or kept.closed) and pool.take_idle(route.endpoint) is None


# As if it were the first.

REST_SECONDS = 0.3


async def echoing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say what h11 reads of each request."""
    data = b""
    while more := await reader.read(65_536):
        data += more
        message = read(data, h11.SERVER)
        if isinstance(message, Read):
            said = repr((message.start, message.body, message.values(b"mcp-param-x"))).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
            data = message.rest


@st.composite
def again(draw: st.DrawFn) -> bytes:
    """A request much like the first one, or the same."""
    body = draw(st.binary(max_size=12))
    length = draw(st.sampled_from([b"%d"] * 8 + [b"0%d", b"%d ", b"+%d"])) % len(body)
    head = b"POST /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\ncontent-length: %b\r\nmcp-param-x: y\r\n\r\n" % length
    return draw(mutated(head + body))


@pytest.fixture
async def quick(tmp_path: Path) -> AsyncGenerator[Rig]:
    async with open_rig(tmp_path) as rig, open_script(tmp_path, echoing) as socket:
        await rig.bind("sb1", socket)
        yield rig


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(again(), min_size=1, max_size=3))
async def test_a_request_means_on_a_used_connection_what_it_means_on_a_new_one(
    quick: Rig, requests: list[bytes]
) -> None:
    first = b"POST /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\ncontent-length: 2\r\nmcp-param-x: y\r\n\r\n{}"
    async with quick.connect() as used:
        assert (await ask(used, first))[0] == 200
        for request in requests:
            async with quick.connect() as new:
                expected = await _meant(new, request)
            meant = await _meant(used, request)
            event(str(expected[0]))
            assert meant == expected
            if expected[1] != "goes on":
                return


async def _meant(wire: Wire, request: bytes) -> tuple[int, str, bytes]:
    """Return how a request is answered, whether the connection goes on after it, and what the sandbox read."""
    await wire.send(request)
    # the hub waits for the rest of a request that is not whole: there is none. A whole one is waited for, however busy
    # the machine is.
    whole = isinstance(read(request, h11.SERVER), Read)
    end = None if whole else asyncio.get_running_loop().call_later(REST_SECONDS, wire.writer.write_eof)
    try:
        status, headers, body = await wire.answer()
    except asyncio.IncompleteReadError:
        return 0, "ends", b""
    finally:
        if end is not None:
            end.cancel()
    ends = headers.get("connection") == "close"
    return status, "ends" if ends else "goes on", body if headers["ash-origin"] == "sandbox" else b""
