"""Several hubs on one keeper: who may join, and what the others notice when one of them or the keeper is gone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from ash_hub.backends.base import BackendEvent, Instance, Phase
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.backend import KEEPER_DIED
from ash_hub.backends.local.link import KeeperCrowded, KeeperLink
from ash_hub.backends.local.paths import hive_paths
from ash_mcp.errors import CapacityExceeded, ConfigError
from ash_mcp.types import SandboxSpec, new_sandbox_id
from tests.hub.backends.local.local_parts import (
    SPEC,
    WAIT_SECONDS,
    bash,
    ended,
    keeper_pid,
    leftovers,
    local_backend,
    needs_isolation,
    settings_in,
    stand_in,
)
from tests.hub.backends.local.test_local_crash import another_hub

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]


def replica(root: Path, shared: str | None = "tested") -> LocalBackend:
    return LocalBackend(settings_in(root), runtime=stand_in(), shared=shared)


def fresh() -> SandboxSpec:
    return replace(SPEC, id=new_sandbox_id())


async def told(events: AsyncIterator[BackendEvent]) -> Instance:
    with anyio.fail_after(WAIT_SECONDS):
        event = await anext(events)
    assert event.instance is not None
    return event.instance


@pytest.mark.parametrize(
    ("first", "second", "advice"),
    [
        (None, None, "--redis-url"),
        ("tested", None, "--redis-url"),
        (None, "tested", "--redis-url"),
        ("tested", "other", "ASH_HUB_REDIS_PREFIX"),
    ],
)
async def test_a_hub_of_another_hive_is_refused_and_told_how_to_join(
    root: Path, first: str | None, second: str | None, advice: str
) -> None:
    async with local_backend(root, shared=first) as backend:
        with pytest.raises(ConfigError, match=rf"process {os.getpid()}\).*{advice}"):
            async with replica(root, second):
                raise AssertionError("it got in")
        assert await backend.list() == []


async def test_a_killed_hub_leaves_the_other_everything_and_starts_no_grace(root: Path) -> None:
    async with another_hub(root, count=2, shared=True) as hub, replica(root) as backend:
        events = backend.watch()
        assert {it.id for it in await backend.list()} == set(hub.ids)
        hub.process.kill()  # its grace is none at all: were it to begin, the sandboxes would end at once
        await hub.process.wait()
        created = await backend.create(fresh())
        assert (await told(events)).id == created.id
        assert {it.phase for it in await backend.list()} == {Phase.RUNNING}
        for instance in await backend.list():
            assert (await bash(instance, "echo still here")).out == "still here\n"
        assert keeper_pid(backend) == hub.keeper
        for instance in await backend.list():
            await backend.delete(instance.id, grace_seconds=0)
    with anyio.fail_after(WAIT_SECONDS):
        await ended(hub.keeper)
    assert leftovers(settings_in(root)) == []


async def test_the_last_of_several_hubs_that_is_killed_takes_everything_with_it(root: Path) -> None:
    async with another_hub(root, shared=True) as hub:
        async with replica(root):
            pass  # leaves on purpose, and is not the last
        os.kill(hub.keeper, 0)
        hub.process.kill()
        with anyio.fail_after(WAIT_SECONDS):
            await ended(hub.keeper, *hub.processes)
    assert leftovers(settings_in(root)) == []


async def test_the_last_of_several_hubs_that_leaves_keeps_the_sandboxes(root: Path) -> None:
    async with another_hub(root, shared=True) as hub, replica(root):
        hub.process.kill()
        await hub.process.wait()
    async with local_backend(root, shared="anew") as backend:
        assert keeper_pid(backend) == hub.keeper
        assert [it.id for it in await backend.list()] == hub.ids


async def test_after_the_keeper_died_a_replica_hears_of_what_another_makes_in_the_next_one(root: Path) -> None:
    async with local_backend(root, shared="tested") as idle, replica(root) as other:
        events = idle.watch()
        before = keeper_pid(idle)
        os.kill(before, signal.SIGKILL)
        with anyio.fail_after(WAIT_SECONDS):
            await ended(before)
            while other.describe()["keeper"] == before:
                await anyio.sleep(0.01)
        created = await other.create(fresh())
        assert await told(events) == created


async def test_after_the_keeper_died_a_list_has_what_is_in_the_next_one(root: Path) -> None:
    async with local_backend(root, shared="tested") as idle, replica(root) as other:
        watches = [idle.watch(), other.watch()]
        lost = await idle.create(fresh())
        for events in watches:
            assert await told(events) == lost
        os.kill(keeper_pid(idle), signal.SIGKILL)
        for events in watches:
            end = await told(events)
            assert (end.id, end.phase, end.exit) == (lost.id, Phase.ENDED, KEEPER_DIED)
        created = await other.create(fresh())
        assert await idle.get(created.id) == created
        assert created in await idle.list()


async def test_a_hub_that_lost_its_connection_alone_joins_again_and_ends_nothing(root: Path) -> None:
    async with local_backend(root, shared="tested") as backend, replica(root) as other:
        kept, gone = await backend.create(fresh()), await backend.create(fresh())
        events, keeper, link = backend.watch(), keeper_pid(backend), backend._link  # pyright: ignore[reportPrivateUsage]
        assert link is not None
        await link.aclose()
        await other.delete(gone.id, grace_seconds=0.0)
        await other.annotate(kept.id, {"by": "another"}, revision=0)
        heard = [await told(events), await told(events)]
        assert {(it.id, it.phase) for it in heard} == {(kept.id, Phase.RUNNING), (gone.id, Phase.ENDED)}
        assert KEEPER_DIED not in {it.exit for it in heard}
        assert keeper_pid(backend) == keeper
        assert await backend.list() == [replace(kept, record={"by": "another"}, revision=1)]
        assert (await bash(kept, "echo unharmed")).out == "unharmed\n"


@contextlib.asynccontextmanager
async def crowd(root: Path) -> AsyncGenerator[list[KeeperLink]]:
    """Join the keeper as often as it lets anybody."""
    links: list[KeeperLink] = []
    try:
        with contextlib.suppress(KeeperCrowded):
            while True:
                links.append(await another_link(root))
        yield links
    finally:
        for link in links:
            await link.aclose()


async def another_link(root: Path) -> KeeperLink:
    return await KeeperLink.open(hive_paths(settings_in(root)).control, shared="tested")


async def last_place(root: Path) -> KeeperLink:
    """Take the place of a hub whose connection was closed, as soon as the keeper has seen that."""
    with anyio.fail_after(WAIT_SECONDS):
        while True:
            with contextlib.suppress(KeeperCrowded):
                return await another_link(root)


async def test_a_hub_that_finds_its_place_taken_waits_and_ends_nothing(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with local_backend(root, shared="tested") as backend:
        kept, gone = await backend.create(fresh()), await backend.create(fresh())
        keeper, link = keeper_pid(backend), backend._link  # pyright: ignore[reportPrivateUsage]
        assert link is not None and backend.unready() is None
        events = backend.watch()
        async with crowd(root) as others:
            async with backend._linking:  # pyright: ignore[reportPrivateUsage]
                await link.aclose()
                others.append(await last_place(root))
            with caplog.at_level(logging.WARNING, "ash.hub"), anyio.fail_after(WAIT_SECONDS):
                while str(backend.unready()) not in caplog.text:
                    await anyio.sleep(0.01)
            assert "64 hubs lead this keeper" in str(backend.unready())
            with pytest.raises(CapacityExceeded, match="64 hubs"):
                await backend.create(fresh())
            await backend.delete(gone.id)
            assert await backend.list() == [kept, gone]
            assert (await bash(kept, "echo unharmed")).out == "unharmed\n"
            await others.pop().aclose()
            end = await told(events)
            assert (end.id, end.phase) == (gone.id, Phase.ENDED)
            assert backend.unready() is None and keeper_pid(backend) == keeper
            with anyio.fail_after(WAIT_SECONDS):
                while await backend.list() != [kept]:
                    await anyio.sleep(0.01)


async def test_what_was_asked_for_when_the_connection_was_lost_is_done_all_the_same(root: Path) -> None:
    async with local_backend(root) as backend:
        kept, gone = await backend.create(fresh()), await backend.create(fresh())
        for ask in (
            lambda: backend.annotate(kept.id, {"a": 1}, revision=0),
            lambda: backend.delete(gone.id, grace_seconds=0.0),
        ):
            link = backend._link  # pyright: ignore[reportPrivateUsage]
            assert link is not None
            await link.aclose()
            await ask()
        assert await backend.list() == [replace(kept, record={"a": 1}, revision=1)]
