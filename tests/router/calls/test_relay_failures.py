"""How a call ends when its sandbox dies, its caller leaves or the hive aborts it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import anyio
import pytest

from ash_mcp.errors import AshError, SandboxGone
from ash_router.caller.relay import RelayLimits
from tests.router.relay_parts import CALL, Rig, answer_to, failure, open_rig
from tests.router.sandbox_parts import EVENT, STREAM_HEAD, Script, chunk, open_script, read_request, response

pytestmark = pytest.mark.anyio

GONE = SandboxGone("sandbox sb1 was killed", reason="process_died")


def dies_after(*parts: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"".join(parts))
        await writer.drain()

    return script


async def test_a_sandbox_that_dies_before_it_answers_leaves_a_typed_failure(rig: Rig):
    rig.explanation = GONE
    status, headers, body = await answer_to(rig, dies_after())
    assert (status, headers["ash-origin"]) == (200, "hub")
    assert failure(body)["kind"] == "sandbox_gone"
    assert failure(body)["data"] == {"reason": "process_died"}


async def test_an_explanation_never_says_that_a_call_which_was_sent_has_not_run(rig: Rig):
    rig.explanation = AshError("come again", retryable=True)
    _, _, body = await answer_to(rig, dies_after())
    assert (failure(body)["kind"], failure(body)["retryable"]) == ("stream_broken", False)


async def test_an_explanation_that_does_not_come_is_not_waited_for(tmp_path: Path):
    async with open_rig(tmp_path, limits=RelayLimits(explain_timeout_seconds=0.05)) as rig:
        rig.silent = True
        _, _, body = await answer_to(rig, dies_after())
    assert failure(body)["kind"] == "stream_broken"


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        (EVENT, EVENT),
        (EVENT + b"event: message\r\nda", EVENT + b"event: message\r\nda\nevent: ash-cut\n\n"),
        (EVENT + b"data: {}\n", EVENT + b"data: {}\nevent: ash-cut\n\n"),
        (b"", b""),
    ],
)
async def test_a_sandbox_that_dies_in_a_stream_ends_it_with_a_typed_event(rig: Rig, sent: bytes, seen: bytes):
    rig.explanation = GONE
    status, headers, body = await answer_to(rig, dies_after(STREAM_HEAD, chunk(sent) if sent else b""))
    assert (status, headers["ash-origin"]) == (200, "sandbox")
    assert body.startswith(seen)
    event = body[len(seen) :]
    assert event.startswith(b"event: message\ndata: {")
    assert event.endswith(b"}\n\n")
    message = json.loads(event.removeprefix(b"event: message\ndata: "))
    assert message["id"] == "seven"
    assert message["result"]["_meta"]["ash-nonce"] == headers["ash-nonce"]
    assert failure(json.dumps(message).encode())["kind"] == "sandbox_gone"


async def test_a_sandbox_that_dies_in_a_json_answer_ends_the_connection_short(rig: Rig):
    async with open_script(rig.directory, dies_after(response(b'{"x":1}')[:-3])) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(CALL)
        _, headers = await wire.head()
        assert headers["content-length"] == "7"
        with anyio.fail_after(10):
            assert await wire.reader.read() == b'{"x"'


def waits(started: asyncio.Event, ended: asyncio.Event, *parts: bytes) -> Script:
    """A sandbox that sends `parts` and then nothing, and notes when the relay hangs up."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"".join(parts))
        await writer.drain()
        started.set()
        await reader.read()
        ended.set()

    return script


@pytest.mark.parametrize("begun", [False, True])
async def test_aborting_a_call_ends_the_answer_at_once(rig: Rig, begun: bool):
    started, ended = asyncio.Event(), asyncio.Event()
    parts = (STREAM_HEAD, chunk(EVENT)) if begun else ()
    async with open_script(rig.directory, waits(started, ended, *parts)) as socket, rig.connect() as wire:
        route = await rig.bind("sb1", socket)
        await wire.send(CALL)
        with anyio.fail_after(10):
            await started.wait()
            if begun:
                await wire.head()
                await wire.chunk()
            assert rig.ledger.busy(route.sandbox_id)
            assert rig.ledger.abort(route.sandbox_id, GONE) == 1
            await ended.wait()
        body = await wire.chunk() if begun else (await wire.answer())[2]
        assert b"sandbox_gone" in body
        assert not rig.ledger.busy(route.sandbox_id)
        assert rig.ledger.abort(route.sandbox_id, GONE) == 0


async def test_closing_the_relay_ends_what_is_in_flight(rig: Rig):
    started, ended = asyncio.Event(), asyncio.Event()
    async with open_script(rig.directory, waits(started, ended)) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(CALL)
        with anyio.fail_after(10):
            await started.wait()
            await rig.relay.aclose()
            await ended.wait()
        assert failure((await wire.answer())[2])["kind"] == "stream_broken"


@pytest.mark.parametrize("begun", [False, True])
async def test_a_caller_who_leaves_closes_the_way_to_the_sandbox(rig: Rig, begun: bool):
    started, ended = asyncio.Event(), asyncio.Event()
    parts = (STREAM_HEAD, chunk(EVENT)) if begun else ()
    async with open_script(rig.directory, waits(started, ended, *parts)) as socket:
        await rig.bind("sb1", socket)
        async with rig.connect() as wire:
            await wire.send(CALL)
            with anyio.fail_after(10):
                await started.wait()
        with anyio.fail_after(10):
            await ended.wait()
    assert len(rig.ledger) == 0


async def test_a_silent_stream_ends_after_its_time(tmp_path: Path):
    started, ended = asyncio.Event(), asyncio.Event()
    async with open_rig(tmp_path, limits=RelayLimits(idle_stream_seconds=0.1)) as rig:
        _, _, body = await answer_to(rig, waits(started, ended, STREAM_HEAD, chunk(EVENT)))
    assert b'"kind":"timeout"' in body


@pytest.mark.parametrize("explained", [False, True])
async def test_a_sandbox_that_cannot_be_reached_is_a_typed_failure(rig: Rig, explained: bool):
    rig.explanation = GONE if explained else None
    await rig.bind("sb1", rig.directory / "nobody.sock")
    async with rig.connect() as wire:
        await wire.send(CALL)
        _, headers, body = await wire.answer()
    assert headers["ash-origin"] == "hub"
    found = (failure(body)["kind"], failure(body)["retryable"])
    assert found == (("sandbox_gone", False) if explained else ("connect_failed", True))


async def test_one_principals_calls_in_flight_are_bounded_and_the_others_go_on(tmp_path: Path):
    started, ended = asyncio.Event(), asyncio.Event()
    limits = RelayLimits(max_in_flight_per_owner=1)
    async with (
        open_rig(tmp_path, limits=limits) as rig,
        open_script(tmp_path, waits(started, ended, STREAM_HEAD, chunk(EVENT))) as socket,
        rig.connect() as first,
        rig.connect() as second,
        rig.connect() as other,
    ):
        await rig.bind("sb1", socket)
        await rig.bind("sb1", socket, owner="ann")
        await first.send(CALL)
        await first.head()
        for _ in range(2):  # the refusal ends no connection
            await second.send(CALL)
            status, headers, body = await second.answer()
            assert (status, headers["ash-origin"], headers["retry-after"]) == (200, "hub", "1")
            assert (failure(body)["kind"], failure(body)["retryable"]) == ("capacity_exceeded", True)
            assert failure(body)["data"] == {"limit": "owner", "retry_after_seconds": 1.0}
        await other.send(CALL.replace(b"host: hub", b"host: hub\r\nx-principal: ann"))
        assert (await other.head())[1]["ash-origin"] == "sandbox"
        first.writer.close()
        with anyio.fail_after(5):
            while rig.ledger.in_flight.get("me", 0):
                await asyncio.sleep(0.01)
        await second.send(CALL)
        assert (await second.head())[1]["ash-origin"] == "sandbox"
