"""The keeper's requests when they cross each other, with a sandbox that is none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ash_hub.backends.local.keeper import control
from ash_hub.backends.local.keeper.cgroups import Hierarchy

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class NoSandbox:
    """Starts when the test says so."""

    def __init__(self, request: Any, *_: object) -> None:
        self.id = request["id"]
        self.phase = "starting"
        self.may_start: asyncio.Event = request["may_start"]

    async def start(self) -> None:
        await self.may_start.wait()
        self.phase = "running"

    async def end(self, grace_seconds: float) -> None:
        del grace_seconds
        self.phase = "ended"

    def view(self) -> dict[str, Any]:
        return {"id": self.id, "phase": self.phase}


def new_keeper(monkeypatch: pytest.MonkeyPatch) -> control.Keeper:
    monkeypatch.setattr(control, "Sandbox", NoSandbox)
    config: dict[str, Any] = {
        "grace_seconds": 0,
        "log_bytes": 0,
        "max_sandboxes": 3,
        "lead": 0.0,
        "egress_command": [],
    }
    return control.Keeper(config, Hierarchy(version=0, directories={}))


@pytest.mark.parametrize("turns", range(5))
async def test_a_stop_that_crosses_the_end_of_a_start_leaves_no_sandbox(
    turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = new_keeper(monkeypatch)
    may_start = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        keeper._tasks = tasks  # pyright: ignore[reportPrivateUsage]
        start = tasks.create_task(_refusal(keeper._start({"id": "a", "may_start": may_start})))  # pyright: ignore[reportPrivateUsage]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        may_start.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        await keeper._stop({"id": "a", "grace_seconds": 0.0})  # pyright: ignore[reportPrivateUsage]
    assert start.done()
    assert await keeper._list({}) == {"sandboxes": []}  # pyright: ignore[reportPrivateUsage]


async def test_a_hub_that_asks_for_one_sandbox_is_not_told_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, goes_on = new_keeper(monkeypatch), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        keeper._tasks = tasks  # pyright: ignore[reportPrivateUsage]
        starts = [tasks.create_task(keeper._start({"id": name, "may_start": goes_on})) for name in "abc"]  # pyright: ignore[reportPrivateUsage]
        goes_on.set()
        await asyncio.wait(starts)
    listed = await keeper._list({"ids": ["b", "none"]})  # pyright: ignore[reportPrivateUsage]
    assert listed == {"sandboxes": [{"id": "b", "phase": "running"}]}
    assert len((await keeper._list({}))["sandboxes"]) == 3  # pyright: ignore[reportPrivateUsage]


async def _refusal(start: Any) -> control.Refused | None:
    try:
        await start
    except control.Refused as refusal:
        return refusal
    return None
