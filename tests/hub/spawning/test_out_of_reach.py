"""A start says when this machine cannot reach where a sandbox runs, and not when its server is only late."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from ash_mcp.errors import StartFailed
from ash_mcp.types import Endpoint, SandboxSpec
from tests.hub.world import MakeWorld

pytestmark = pytest.mark.anyio

SECONDS = 2.0
Dial = Callable[[], Awaitable[Any]]


async def no_answer() -> None:
    await anyio.sleep_forever()


async def no_route() -> None:
    raise OSError(errno.EHOSTUNREACH, "No route to host")


async def nobody_listens() -> None:
    raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


async def start(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, *dials: Dial) -> StartFailed:
    """Have a sandbox start at an address whose dials go so, the last one again and again."""
    left = list(dials)

    async def dial(*_: object) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])()

    async def serve(_: SandboxSpec) -> Endpoint:
        return Endpoint(host="10.1.2.3", port=8421)

    world = await make_world(recipe={"start_timeout_seconds": SECONDS})
    monkeypatch.setattr(world.backend, "_serve", serve)
    monkeypatch.setattr("ash_router.upstream.pool._dial", dial)
    with anyio.fail_after(30), pytest.raises(StartFailed) as failed:
        await world.spawn()
    return failed.value


@pytest.mark.parametrize("dial", [no_answer, no_route])
async def test_a_start_whose_address_never_answers_says_where_to_run_the_hive(
    dial: Dial, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = await start(make_world, monkeypatch, dial)
    assert failed.data["step"] == "start"
    assert "it runs at 10.1.2.3, but this machine cannot reach that address" in failed.message
    assert "in their cluster (helm/ash) or on one of its nodes" in failed.message


@pytest.mark.parametrize("dials", [[nobody_listens], [nobody_listens, no_answer]], ids=["refused", "then silent"])
async def test_an_address_that_refused_is_not_said_to_be_out_of_reach(
    dials: list[Dial], make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = await start(make_world, monkeypatch, *dials)
    assert "the sandbox cannot be reached; try again" in failed.message
    assert "this machine" not in failed.message
