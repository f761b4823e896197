"""Somebody sets the machine's clock while a hive runs, and while none does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from ash_hub.app import open_hive
from ash_hub.backends.base import HostClock
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.memory import MemoryBackend
from ash_hub.settings import HubSettings
from ash_mcp import Hive
from ash_mcp.types import new_sandbox_id
from ash_router.store import clock
from ash_router.store.memory import MemoryStore
from tests.hub.backends.local.local_parts import (
    SPEC,
    WAIT_SECONDS,
    keeper_pid,
    local_backend,
    needs_isolation,
    settings_in,
    stand_in,
)
from tests.system.crash_parts import home

STEPS = pytest.mark.parametrize("step", [86_400.0 * 3, -86_400.0], ids=["forward", "back"])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder() -> Iterator[Path]:
    with home() as place:
        yield place.folder


def set_clock(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Have every hub that opens from now on find another time of day."""
    there = clock.lead()
    monkeypatch.setattr("ash_hub.backends.local.backend.lead", lambda: there + step)


def test_the_lead_is_what_the_time_of_day_is_ahead() -> None:
    assert clock.lead(lambda: 1_000_000.0, lambda: 50.0) == 999_950.0


def test_a_clock_starts_at_the_time_of_day_and_keeps_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(clock, "steady", lambda: now[0])
    monkeypatch.setattr(clock, "lead", lambda: 999_950.0)
    even = clock.even_clock()
    assert even() == 1_000_000.0
    monkeypatch.setattr(clock, "lead", lambda: 0.0)
    now[0] += 7
    assert even() == 1_000_007.0


class OnOneHost(MemoryBackend):
    def now(self) -> float:
        return 5e9


@pytest.mark.anyio
@pytest.mark.parametrize(("backend", "kept"), [(OnOneHost(), 5e9), (MemoryBackend(), 2e9)], ids=["host", "store"])
async def test_the_time_is_that_of_the_host_where_there_is_one_and_else_of_the_store(
    folder: Path, backend: MemoryBackend, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def now(_: MemoryStore) -> float:
        return 2e9

    monkeypatch.setattr(MemoryStore, "now", now)
    settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run")
    async with open_hive(settings, backend) as served:
        assert served.sandboxes._clock() == kept  # pyright: ignore[reportPrivateUsage]


@needs_isolation
@pytest.mark.heavy
@pytest.mark.anyio
@STEPS
async def test_a_clock_that_is_set_between_two_hives_moves_no_deadline(
    folder: Path, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run", keep=True)
    async with open_hive(settings) as served, Hive(served.url) as hive:
        box = await hive.spawn("echo", ttl_seconds=3600, idle_seconds=60)
        assert isinstance(served.backend, HostClock)
        await box.call("echo", text="idle from here on")
        (before,) = await hive.list()
        now, steady = served.backend.now(), clock.steady()
    set_clock(monkeypatch, step)
    async with open_hive(settings) as served, Hive(served.url) as hive:
        assert isinstance(served.backend, HostClock)
        assert abs((served.backend.now() - now) - (clock.steady() - steady)) < 0.1
        (after,) = await hive.list()
        assert (after.id, after.state, after.expires_at) == (before.id, "ready", before.expires_at)
        assert after.last_call_at is None  # its idle time counts anew from this hive's start
        later = await hive.extend(box.session, 7200)
        assert abs(later.expires_at - 7200 - served.backend.now()) < 1
        await hive.destroy(box.session)


@needs_isolation
@pytest.mark.anyio
@STEPS
async def test_replicas_and_the_next_keeper_tell_the_time_of_the_first(
    folder: Path, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local_backend(folder, shared="tested") as first:
        began, steady = first.now(), clock.steady()
        set_clock(monkeypatch, step)
        async with LocalBackend(settings_in(folder), runtime=stand_in(), shared="tested") as second:
            assert abs(second.now() - first.now()) < 0.1
            keeper = keeper_pid(first)
            os.kill(keeper, signal.SIGKILL)
            with anyio.fail_after(WAIT_SECONDS):
                while keeper in (first.describe()["keeper"], second.describe()["keeper"]):
                    await anyio.sleep(0.01)
            for backend in (second, first):
                made = await backend.create(replace(SPEC, id=new_sandbox_id()))
                await backend.delete(made.id, grace_seconds=0)
                assert abs((backend.now() - began) - (clock.steady() - steady)) < 0.1
