"""What one principal has in flight or on its way is bounded at every door, typed and with a time to come back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_mcp.types import PrincipalLimits
from ash_router.caller.relay import RelayLimits
from tests.router.relay_parts import JSON_TYPE, Rig, Wire, failure, legacy, modern, open_rig, tool_call
from tests.router.sandbox_parts import EVENT, STREAM_HEAD, chunk, open_script, read_request, response

pytestmark = pytest.mark.anyio

HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}
BY_NAME = tool_call("sb1_add")
BY_CALL = tool_call("call", {"session": "sb1", "tool": "add", "arguments": {}})
OWN = tool_call("add")
LIMIT = 2


async def never_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A sandbox that opens sessions, and begins the answer to every call and does not end it."""
    while True:
        _, body = await read_request(reader)
        message = json.loads(body)
        if message["method"] == "initialize":
            hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "s", "version": "0"}}
            answer = {"jsonrpc": "2.0", "id": message["id"], "result": hello}
            writer.write(response(json.dumps(answer).encode(), more="mcp-session-id: s\r\n"))
        elif "id" not in message:
            writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
        else:
            writer.write(STREAM_HEAD + chunk(EVENT))


def stateless(_: str | None, who: str, body: bytes, name: str) -> bytes:
    return modern(name, body, more=f"x-principal: {who}\r\n")


def in_session(session_id: str | None, who: str, body: bytes, _: str) -> bytes:
    return legacy(body, session_id, more=f"x-principal: {who}\r\n")


def by_header(_: str | None, who: str, body: bytes, __: str) -> bytes:
    return modern("add", body, more=f"x-principal: {who}\r\nx-session-id: sb1\r\n")


def by_path(_: str | None, who: str, body: bytes, __: str) -> bytes:
    head = f"POST /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\n{JSON_TYPE}content-length: {len(body)}\r\nx-principal: {who}\r\n"
    return f"{head}\r\n".encode() + body


def in_result(status: int, body: bytes) -> dict[str, Any]:
    assert status == 200
    return failure(body)


def as_status(status: int, body: bytes) -> dict[str, Any]:
    assert status == 429
    return json.loads(body)["error"]


Make = Callable[[str | None, str, bytes, str], bytes]
DOORS: dict[str, tuple[Make, bytes, str, Callable[[int, bytes], dict[str, Any]]]] = {
    "2026-07-28": (stateless, BY_NAME, "sb1_add", in_result),
    "2026-07-28, call": (stateless, BY_CALL, "call", in_result),
    "handshake": (in_session, BY_NAME, "", in_result),
    "handshake, call": (in_session, BY_CALL, "", in_result),
    "X-Session-ID": (by_header, OWN, "", as_status),
    "path": (by_path, OWN, "", as_status),
}


async def opened(rig: Rig, who: str) -> str:
    async with rig.connect() as wire:
        hello = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": HELLO}
        await wire.send(legacy(json.dumps(hello).encode(), more=f"x-principal: {who}\r\n"))
        return (await wire.answer())[1]["mcp-session-id"]


@pytest.mark.parametrize("door", DOORS)
async def test_at_the_bound_a_call_is_refused_and_anothers_goes_through(tmp_path: Path, door: str) -> None:
    make, body, name, refused = DOORS[door]
    limits = RelayLimits(max_in_flight_per_owner=LIMIT)
    async with open_rig(tmp_path, limits=limits) as rig, open_script(tmp_path, never_ends) as socket:
        for who in ("me", "ann"):
            await rig.bind("sb1", socket, owner=who)
        sessions = {who: await opened(rig, who) for who in ("me", "ann")}

        async def begun(wire: Wire, who: str) -> None:
            await wire.send(make(sessions[who], who, body, name))
            status, headers = await wire.head()
            assert (status, headers["ash-origin"]) == (200, "sandbox")

        async with rig.connect() as first, rig.connect() as second, rig.connect() as third, rig.connect() as other:
            await begun(first, "me")
            await begun(second, "me")
            for _ in range(3):
                async with rig.connect() as over:
                    await over.send(make(sessions["me"], "me", body, name))
                    status, headers, answer = await over.answer()
                said = refused(status, answer)
                assert (headers["retry-after"], headers["ash-origin"]) == ("1", "hub")
                assert (said["kind"], said["retryable"]) == ("capacity_exceeded", True)
                assert said["data"] == {"limit": "owner", "retry_after_seconds": 1.0} and "2 calls" in said["message"]
            assert rig.ledger.in_flight.get("me", 0) == LIMIT
            await begun(other, "ann")
            first.writer.close()
            with anyio.fail_after(5):
                while rig.ledger.in_flight.get("me", 0) == LIMIT:
                    await asyncio.sleep(0.005)
            await begun(third, "me")


@pytest.mark.parametrize("door", DOORS)
async def test_calls_by_every_other_door_count_too(tmp_path: Path, door: str) -> None:
    make, body, name, refused = DOORS[door]
    limits = RelayLimits(max_in_flight_per_owner=1)
    async with open_rig(tmp_path, limits=limits) as rig, open_script(tmp_path, never_ends) as socket:
        await rig.bind("sb1", socket)
        session = await opened(rig, "me")
        for other_make, other_body, other_name, _ in DOORS.values():
            async with rig.connect() as first, rig.connect() as over:
                await first.send(other_make(session, "me", other_body, other_name))
                await first.head()
                await over.send(make(session, "me", body, name))
                status, _, answer = await over.answer()
                assert refused(status, answer)["kind"] == "capacity_exceeded"
            with anyio.fail_after(5):
                while rig.ledger.in_flight.get("me", 0):
                    await asyncio.sleep(0.005)


@pytest.mark.parametrize("door", DOORS)
async def test_a_keys_own_limit_of_calls_holds_and_is_named(tmp_path: Path, door: str) -> None:
    make, body, name, refused = DOORS[door]
    async with open_rig(tmp_path) as rig, open_script(tmp_path, never_ends) as socket:
        rig.admission.limits["me"] = PrincipalLimits(calls=1)
        for who in ("me", "ann"):
            await rig.bind("sb1", socket, owner=who)
        sessions = {who: await opened(rig, who) for who in ("me", "ann")}
        async with rig.connect() as first, rig.connect() as over, rig.connect() as another:
            await first.send(make(sessions["me"], "me", body, name))
            await first.head()
            await over.send(make(sessions["me"], "me", body, name))
            status, _, answer = await over.answer()
            said = refused(status, answer)
            assert said["data"] == {"limit": "key", "retry_after_seconds": 1.0} and "your key" in said["message"]
            await another.send(make(sessions["ann"], "ann", body, name))
            assert (await another.head())[0] == 200


async def test_a_keys_own_limit_of_streams_holds(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, open_script(tmp_path, never_ends) as socket:
        rig.admission.limits["me"] = PrincipalLimits(streams=0)
        await rig.bind("sb1", socket)
        async with rig.connect() as wire:
            await wire.send(b"GET /mcp HTTP/1.1\r\nhost: hub\r\nx-session-id: sb1\r\n\r\n")
            status, _, answer = await wire.answer()
            assert "--max-streams" in as_status(status, answer)["message"]


async def test_a_session_more_that_its_sandbox_may_ask_is_refused_where_a_key_has_no_more(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, open_script(tmp_path, never_ends) as socket:
        rig.admission.limits["me"] = PrincipalLimits(backchannels=0)
        await rig.bind("sb1", socket)
        hello: dict[str, Any] = {**HELLO, "capabilities": {"roots": {}}}
        async with rig.connect() as wire:
            said = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello}
            await wire.send(legacy(json.dumps(said).encode()))
            session = (await wire.answer())[1]["mcp-session-id"]
            await wire.send(legacy(BY_NAME, session))
            status, _, answer = await wire.answer()
        assert "--max-backchannels" in in_result(status, answer)["message"]


MESSAGE = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping", "pad": "x" * 2000}).encode()


async def send_half(wire: Wire, who: str, size: int) -> None:
    request = legacy(MESSAGE, more=f"x-principal: {who}\r\n")
    await wire.send(request[: len(request) - len(MESSAGE) + size])


async def until_unfinished(rig: Rig, count: int) -> None:
    with anyio.fail_after(5):
        while len(rig.relay.unfinished) != count:
            await asyncio.sleep(0.005)


async def assert_refused(wire: Wire) -> None:
    status, headers, answer = await wire.answer()
    assert as_status(status, answer)["kind"] == "capacity_exceeded"
    assert headers["retry-after"] == "1" and await wire.ended()


async def test_requests_that_stop_in_the_middle_are_bounded_by_their_number(tmp_path: Path) -> None:
    limits = RelayLimits(max_unfinished_per_owner=LIMIT)
    async with open_rig(tmp_path, limits=limits) as rig, rig.connect() as first, rig.connect() as second:
        await send_half(first, "me", 0)
        await send_half(second, "me", 10)
        await until_unfinished(rig, 2)
        async with rig.connect() as third, rig.connect() as other:
            await send_half(third, "me", 0)
            await assert_refused(third)
            await send_half(other, "ann", 0)
            await until_unfinished(rig, 3)
            await other.send(MESSAGE)
            assert (await other.answer())[0] == 400  # it is no session's, and was read
        first.writer.close()
        await until_unfinished(rig, 1)
        await second.send(MESSAGE[10:])
        assert (await second.answer())[0] == 400
        await until_unfinished(rig, 0)


async def test_and_by_the_bytes_that_are_kept_of_them(tmp_path: Path) -> None:
    limits = RelayLimits(max_unfinished_bytes_per_owner=2500)
    async with open_rig(tmp_path, limits=limits) as rig, rig.connect() as first, rig.connect() as second:
        await send_half(first, "me", 1900)
        await until_unfinished(rig, 1)
        await send_half(second, "me", 10)
        await until_unfinished(rig, 2)
        await second.send(b"x" * 1000)
        await assert_refused(second)
        await until_unfinished(rig, 1)


async def test_what_does_not_come_in_time_is_forgotten(tmp_path: Path) -> None:
    limits = RelayLimits(body_timeout_seconds=0.1)
    async with open_rig(tmp_path, limits=limits) as rig, rig.connect() as first:
        await send_half(first, "me", 10)
        assert (await first.answer())[0] == 408
        assert len(rig.relay.unfinished) == 0
