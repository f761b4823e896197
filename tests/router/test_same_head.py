"""A head that comes again on its connection is not asked about again, for a moment; any other one is."""

from __future__ import annotations

import json

import pytest

from ash_router import intake
from tests.router.relay_parts import Rig, Wire

pytestmark = pytest.mark.anyio


async def who(wire: Wire, principal: str, more: str = "", path: str = "/plain") -> str:
    """Ask an app of the hub's who it takes the caller for."""
    head = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nx-principal: {principal}\r\n{more}\r\n"
    await wire.send(head.encode())
    status, _, body = await wire.answer()
    return json.loads(body)["subject"] if status == 200 else str(status)


async def test_the_same_head_is_admitted_once(rig: Rig) -> None:
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
