"""Defects of the hive itself: each is answered or closes its own connection, is in the log, and harms no one else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_mcp.errors import AshError, HiveFault, SandboxGone
from ash_router.admission.base import Admission, Admitted, Head, Refusal
from ash_router.bounds.deadlines import TimeoutSweeper
from ash_router.calls.sandbox_response import Reply
from ash_router.store.base import RouteChanges
from ash_router.store.memory import MemoryStore
from tests.router.calls.test_relay_direct import direct
from tests.router.relay_parts import HeaderAdmission, Rig, Wire, failure, legacy, modern, open_rig, tool_call
from tests.router.sandbox_parts import Box

pytestmark = pytest.mark.anyio

ADD = modern("sb1_add", tool_call("sb1_add", {"a": 1, "b": 2}))
HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}


def breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a defect")


class BrokenStore(MemoryStore):
    """A store whose look-ups fail in a way that nobody expects."""

    error: Exception = RuntimeError("a defect")

    async def route_changes(self, since: str | None) -> RouteChanges:
        raise self.error


async def session_on(wire: Wire) -> str:
    await wire.send(legacy(json.dumps({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": HELLO}).encode()))
    return (await wire.answer())[1]["mcp-session-id"]


@pytest.mark.parametrize("error", [RuntimeError("a defect"), HiveFault("a fault"), SandboxGone("gone")])
async def test_a_look_up_that_fails_in_any_way_is_answered(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    store = BrokenStore()
    store.error = error
    async with open_rig(tmp_path, shared=store) as rig, rig.connect() as wire:
        await wire.send(modern("sb7_add"))
        assert (await wire.answer())[1]["ash-origin"] == "hub"
        await wire.send(legacy(tool_call("sb7_add"), await session_on(wire)))
        assert (await wire.answer())[1]["ash-origin"] == "hub"
        await wire.send(direct().replace(b"sb1", b"sb7"))
        status, _, body = await wire.answer()
    assert status == (410 if isinstance(error, SandboxGone) else 500)
    assert json.loads(body)["error"]["kind"] == ("sandbox_gone" if isinstance(error, SandboxGone) else "hive_fault")
    assert ("a defect" in caplog.text) is isinstance(error, RuntimeError)


@pytest.mark.parametrize("late", [False, True])
async def test_a_defect_after_the_verdict_is_answered_as_the_hives(
    rig: Rig, box: Box, late: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if late:
        rig.admission.gate = asyncio.Event()
        rig.admission.gate.set()
    monkeypatch.setattr(rig.relay, "direct_request", breaks)
    async with rig.connect() as wire:
        await wire.send(ADD)
        status, headers, body = await wire.answer()
        assert (status, headers["ash-origin"]) == (500, "hub")
        assert json.loads(body)["error"]["kind"] == "hive_fault"
        assert await wire.ended()
    assert "a defect" in caplog.text
    monkeypatch.undo()
    async with rig.connect() as wire:
        await wire.send(ADD)
        assert (await wire.answer())[0] == 200


async def test_a_verdict_that_comes_after_a_defect_lets_nothing_in(
    rig: Rig, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.admission.gate = asyncio.Event()
    async with rig.connect() as wire:
        with monkeypatch.context() as broken:
            broken.setattr("ash_router.caller.intake._Flow.pause_reading", breaks)
            wire.writer.write(direct(body=b"x" * 300_000))
            status, _, body = await wire.answer()
        assert (status, json.loads(body)["error"]["kind"]) == (500, "hive_fault")
        rig.admission.gate.set()
        assert await wire.ended()
        with anyio.fail_after(5):
            while rig.server.server_state.connections:
                await asyncio.sleep(0.01)
    assert box.heads == []


class BrokenAdmission(HeaderAdmission):
    """Fails at once, or later."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        return self._fail() if self.late else breaks()

    async def _fail(self) -> Admitted:
        return breaks()


@pytest.mark.parametrize("late", [False, True])
async def test_an_admission_that_fails_admits_nobody_and_is_the_hives_fault(
    tmp_path: Path, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    gate: Admission = BrokenAdmission(late)
    async with open_rig(tmp_path, gate=gate) as rig, rig.connect() as wire:
        await wire.send(ADD)
        status, _, body = await wire.answer()
    assert (status, json.loads(body)["error"]["kind"]) == (500, "hive_fault")
    assert "a defect" in caplog.text


@pytest.mark.parametrize("request_", [ADD, direct(body=b"{}")], ids=["call", "direct"])
@pytest.mark.parametrize("before", [0, 1])
async def test_a_call_that_fails_to_begin_is_answered_or_its_connection_ends(
    rig: Rig,
    box: Box,
    request_: bytes,
    before: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with rig.connect() as wire:
        for _ in range(before):
            await wire.send(request_)
            await wire.answer()
        monkeypatch.setattr(rig.ledger, "begin", breaks)
        await wire.send(request_)
        assert await wire.ended()
    assert "a defect" in caplog.text
    assert len(rig.ledger) == 0


@pytest.mark.parametrize("request_", [ADD, direct(body=b"{}")], ids=["call", "direct"])
async def test_an_answer_that_cannot_be_passed_on_is_a_fault_of_the_hive(
    rig: Rig, box: Box, request_: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Reply, "frame", breaks)
    rig.explanation = SandboxGone("it was somebody else")
    async with rig.connect() as wire:
        await wire.send(request_)
        _, headers, body = await wire.answer()
    assert headers["ash-origin"] == "hub"
    kind = failure(body)["kind"] if request_ is ADD else json.loads(body)["error"]["kind"]
    assert kind == "hive_fault"
    assert "a defect" in caplog.text
    assert len(rig.ledger) == 0


async def test_a_reason_that_cannot_be_found_is_answered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def explain(_: Any) -> AshError:
        return breaks()

    object.__setattr__(rig.relay.services, "explain", explain)
    await rig.bind("sb1", rig.directory / "nobody.sock")
    async with rig.connect() as wire:
        await wire.send(ADD)
        assert failure((await wire.answer())[2])["kind"] == "hive_fault"


async def test_work_that_fails_beside_everything_else_is_in_the_log(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        breaks()

    task = rig.relay.spawn(work())
    with pytest.raises(RuntimeError), anyio.fail_after(5):
        await task
    await asyncio.sleep(0)
    assert "a defect" in caplog.text


class Watched:
    def __init__(self, look: Callable[[], None]) -> None:
        self.looked = asyncio.Event()
        self._look = look

    def check_timeout(self, now: float) -> None:
        self._look()
        self.looked.set()


async def test_one_whose_check_fails_is_unwatched_and_the_others_are_checked_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks: list[int] = []
    sweeper, bad = TimeoutSweeper(0.01), Watched(lambda: breaks(looks.append(1)))
    sweeper.watch(bad)
    good = [Watched(lambda: None) for _ in range(8)]
    for watched in good:
        sweeper.watch(watched)
    with anyio.fail_after(5):
        for _ in range(2):
            for watched in good:
                watched.looked.clear()
                await watched.looked.wait()
    sweeper.close()
    assert "a defect" in caplog.text
    assert len(looks) == 1
