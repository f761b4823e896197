"""Who is bound to one sandbox calls that, whosever it is, and finds no other; its calls count as its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash_mcp.types import PrincipalLimits
from tests.router.relay_parts import failure, modern, open_rig, tool_call
from tests.router.sandbox_parts import open_box

pytestmark = pytest.mark.anyio

GUEST = "x-principal: guest\r\n"
ADD = {"a": 1, "b": 2}


def by_name(session: str) -> bytes:
    return modern(f"{session}_add", tool_call(f"{session}_add", ADD), more=GUEST)


def by_header(named: str) -> bytes:
    return modern("add", tool_call("add", ADD), more=f"{GUEST}x-session-id: {named}\r\n")


async def test_it_calls_its_sandbox_by_every_name_and_finds_no_other(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, open_box(tmp_path) as box:
        shared = await rig.bind("sb1", box.socket)
        other = await rig.bind("sb2", box.socket)
        rig.admission.bound["guest"] = shared.sandbox_id
        for request in (by_name("sb1"), by_header("sb1"), by_header(shared.sandbox_id)):
            async with rig.connect() as wire:
                await wire.send(request)
                status, _, body = await wire.answer()
                assert status == 200 and b'"result":3' in body.replace(b" ", b"")
        for request in (by_header("sb2"), by_header(other.sandbox_id)):
            async with rig.connect() as wire:
                await wire.send(request)
                status, _, body = await wire.answer()
                assert status == 404 and b"route not found" in body
        assert len(box.posted()) == 3


async def test_its_calls_count_for_itself_and_not_for_the_owner(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, open_box(tmp_path) as box, rig.connect() as first, rig.connect() as over:
        shared = await rig.bind("sb1", box.socket)
        rig.admission.bound["guest"] = shared.sandbox_id
        rig.admission.limits["guest"] = PrincipalLimits(calls=1)
        await first.send(modern("sb1_wait", more=GUEST))
        await box.waiting.wait()
        assert (rig.ledger.in_flight.get("guest", 0), rig.ledger.in_flight.get("me", 0)) == (1, 0)
        await over.send(by_name("sb1"))
        assert "your key" in failure((await over.answer())[2])["message"]
