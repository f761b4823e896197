"""A head that comes again on its connection is not asked about again, for a moment; any other one is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ash_router.admission.api_keys import KeyFile, KeyRing
from ash_router.admission.bearer import Credentials
from ash_router.admission.gate import Gate
from ash_router.admission.host_names import NameRules
from ash_router.caller import intake
from tests.router.relay_parts import Clock, Rig, Wire, modern, open_rig, tool_call
from tests.router.sandbox_parts import open_box

pytestmark = pytest.mark.anyio


async def who(wire: Wire, principal: str, more: str = "", path: str = "/plain") -> str:
    """Ask an app of the hub's who it takes the caller for."""
    head = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nx-principal: {principal}\r\n{more}\r\n"
    await wire.send(head.encode())
    status, _, body = await wire.answer()
    return json.loads(body)["subject"] if status == 200 else str(status)


async def test_the_same_head_is_admitted_once(rig: Rig, clock: Clock) -> None:
    async with rig.connect() as wire:
        for _ in range(3):
            assert await who(wire, "me") == "me"
    assert len(rig.admission.asked) == 1


@pytest.mark.parametrize(
    ("principal", "more", "path"),
    [("you", "", "/plain"), ("me", "x-more: 1\r\n", "/plain"), ("me", "", "/plain?scope=other")],
    ids=["credential", "header", "target"],
)
async def test_a_head_that_differs_is_asked_about(rig: Rig, principal: str, more: str, path: str) -> None:
    async with rig.connect() as wire:
        assert await who(wire, "me") == "me"
        assert await who(wire, principal, more, path) == principal
        assert await who(wire, "me") == "me"
    assert len(rig.admission.asked) == 3


async def test_what_was_admitted_on_one_connection_says_nothing_on_another(rig: Rig) -> None:
    for _ in range(2):
        async with rig.connect() as wire:
            assert await who(wire, "me") == "me"
    assert len(rig.admission.asked) == 2


async def test_a_head_is_asked_about_again_after_a_moment(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "SAME_HEAD_SECONDS", -1.0)
    async with rig.connect() as wire:
        for _ in range(2):
            assert await who(wire, "me") == "me"
    assert len(rig.admission.asked) == 2


async def test_nobody_is_let_in_because_another_was_a_moment_ago(rig: Rig) -> None:
    async with rig.connect() as wire:
        assert await who(wire, "me") == "me"
        assert await who(wire, "nobody") == "401"


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_a_key_that_is_good_no_more_is_refused_on_the_connection_that_used_it_all_the_time(
    tmp_path: Path, how: str, clock: Clock
) -> None:
    keys = KeyFile(tmp_path / "keys.json", clock)
    key, token = keys.add(subject="me", ttl_seconds=1.0 if how == "expired" else None)
    gate = Gate(NameRules(port=0), Credentials(KeyRing(keys, clock, clock)), local=False)
    async with open_rig(tmp_path, gate=gate) as rig, open_box(tmp_path) as box, rig.connect() as wire:
        await rig.bind("sb1", box.socket)
        call = modern("sb1_add", tool_call("sb1_add", {"a": 1, "b": 1}), more=f"authorization: Bearer {token}\r\n")
        call = call.replace(b"host: hub", b"host: localhost")
        if how == "revoked":
            keys.revoke([key.id])
        statuses: list[int] = []
        while 401 not in statuses:
            await wire.send(call)
            statuses.append((await wire.answer())[0])
            assert clock.now < 1002
            clock.now += 0.2
        assert statuses[0] == 200
