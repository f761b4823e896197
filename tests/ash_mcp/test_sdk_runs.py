"""Many sandboxes at once, and the runs that own them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from ash_mcp import (
    AshError,
    AshTimeout,
    CapacityExceeded,
    ConfigError,
    Hive,
    LocalProtocolError,
    RecipeNotFound,
    RunEnded,
    RunNotFound,
    RunTaken,
    SandboxInfo,
    StreamBroken,
    sync,
)
from tests.ash_mcp.twin import TwinHive

pytestmark = pytest.mark.anyio


async def until_renewed(twin: TwinHive, times: int) -> None:
    with anyio.fail_after(10):
        while sum(run.renewals for run in twin.runs.values()) < times:
            await anyio.sleep(0.005)


async def test_many_are_made_and_told_as_they_come(hive: Hive):
    told: dict[int, SandboxInfo | AshError] = {}
    many = await hive.spawn_many(5, labels={"batch": "1"}, at_once=2, on_ready=told.__setitem__)
    assert sorted(many.made) == sorted(told) == [0, 1, 2, 3, 4] and not many.failed
    assert [told[index] for index in range(5)] == [box.info for box in many.check()]
    assert len({box.id for box in many.sandboxes}) == 5
    assert len(await hive.list(labels={"batch": "1"})) == 5
    await hive.destroy_all()


async def test_those_that_fail_end_none_of_the_others(hive: Hive, twin: TwinHive):
    twin.most = 3
    many = await hive.spawn_many(5, timeout_seconds=0.5)
    assert len(many.made) == 3 and len(many.failed) == 2
    assert {type(error) for error in many.failed.values()} <= {CapacityExceeded, AshTimeout}
    with pytest.raises((CapacityExceeded, AshTimeout)):
        many.check()
    twin.most = 1000
    wrong = await hive.spawn_many(2, "nonsense")
    assert {type(error) for error in wrong.failed.values()} == {RecipeNotFound}


async def test_room_is_waited_for(hive: Hive, twin: TwinHive):
    twin.most = 1
    first = await hive.spawn()

    async def make_room() -> None:
        await anyio.sleep(0.1)
        twin.most = 4

    async with anyio.create_task_group() as group:
        group.start_soon(make_room)
        many = await hive.spawn_many(2, timeout_seconds=10)
        assert len(many.made) == 2 and first.id not in {box.id for box in many.sandboxes}


async def test_each_has_a_key_of_its_own_so_that_a_repetition_makes_no_more(hive: Hive):
    first = await hive.spawn_many(3, idempotency_key="k")
    again = await hive.spawn_many(3, idempotency_key="k")
    assert [box.id for box in again.sandboxes] == [box.id for box in first.sandboxes]
    await hive.destroy_all()


async def test_cancelled_in_the_middle_it_ends_what_it_made(hive: Hive, twin: TwinHive):
    with anyio.CancelScope() as scope:
        came: list[int] = []

        def leave(index: int, outcome: SandboxInfo | AshError) -> None:
            came.append(index)
            if len(came) == 3:
                scope.cancel()

        await hive.spawn_many(8, at_once=1, on_ready=leave)
    assert scope.cancelled_caught and len(twin.boxes) >= 3
    assert await hive.list() == []


async def test_what_cannot_be_of_several_is_refused_before_anything_is_made(hive: Hive):
    wrongs: list[dict[str, Any]] = [{"count": 0}, {"count": 2, "at_once": 0}, {"count": 2, "session": "one"}]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            await hive.spawn_many(**wrong)


async def test_a_run_owns_what_is_spawned_in_it_and_ends_it(hive: Hive):
    free = await hive.spawn()
    async with hive.run("train") as run:
        box = await run.spawn()
        many = await run.spawn_many(2)
        assert {made.info.run for made in (box, *many.sandboxes)} == {"train"}
        assert {info.id for info in await hive.list(run="train")} == {box.id, *(it.id for it in many.sandboxes)}
        assert [it.id for it in await hive.runs()] == [run.info.id]
        async with run.spawn() as inner:
            assert inner.info.run == "train"
    assert [info.id for info in await hive.list()] == [free.id] and await hive.runs() == []
    await run.end()
    await free.destroy()


async def test_its_lease_is_renewed_though_the_loop_is_blocked_and_renewals_fail(hive: Hive, twin: TwinHive):
    async with hive.run("train", lease_seconds=0.1):
        await until_renewed(twin, 2)
        before = sum(run.renewals for run in twin.runs.values())
        time.sleep(0.3)  # noqa: ASYNC251 - as a trainer's step does
        assert sum(run.renewals for run in twin.runs.values()) > before

        def broken(request: httpx.Request) -> httpx.Response | None:
            raise httpx.ReadError("cut", request=request)

        twin.scripts.extend([broken] * 6)
        with anyio.fail_after(10):
            while twin.scripts:
                await anyio.sleep(0.005)
        await until_renewed(twin, sum(run.renewals for run in twin.runs.values()) + 1)
    renewals = sum(run.renewals for run in twin.runs.values())
    await anyio.sleep(0.15)
    assert sum(run.renewals for run in twin.runs.values()) == renewals, "it is renewed after its end"


async def test_a_run_whose_lease_was_lost_says_so(hive: Hive, twin: TwinHive):
    async with hive.run("train", lease_seconds=0.1) as run:
        twin.end_run(twin.runs[run.info.id])
        with anyio.fail_after(10):
            while run.ended is None:
                await anyio.sleep(0.005)
        assert run.ended.data["reason"] == "run_ended"
        with pytest.raises(RunEnded, match="open another"):
            await run.spawn()
        with pytest.raises(RunEnded):
            await run.renew()


async def test_a_spawn_in_a_run_that_the_hive_forgot_renews_it_and_is_sent_again(hive: Hive, twin: TwinHive):
    async with hive.run("train") as run:
        forgotten = twin.runs.pop(run.info.id)

        def found(request: httpx.Request) -> None:
            twin.runs[run.info.id] = forgotten  # what a renewal with the id and the lease does

        twin.after.append(found)
        assert (await run.spawn()).info.run == "train"
        assert [(it.tool, it.arguments.get("run_id")) for it in twin.seen[-3:]] == [
            ("spawn", None),
            ("run", run.info.id),
            ("spawn", None),
        ]


async def test_a_name_is_of_one_open_run_unless_it_is_joined(hive: Hive):
    async with hive.run("train") as run:
        with pytest.raises(RunTaken):
            await hive.run("train").open()
        async with hive.run("train", join=True) as joined:
            assert joined.info.id == run.info.id
            await joined.spawn()
        assert len(await hive.list()) == 1, "who joined has ended nothing"
    with pytest.raises(RunNotFound):
        await hive.run("other", join=True).open()
    assert await hive.list() == []


async def test_a_lost_answer_opens_no_second_run(hive: Hive, twin: TwinHive):
    def lost(request: httpx.Request) -> httpx.Response | None:
        raise httpx.ReadError("cut", request=request)

    twin.after.append(lost)
    async with hive.run("train"):
        assert len(twin.runs) == 1


async def test_a_run_that_cannot_be_ended_lets_the_bodys_error_through(hive: Hive, twin: TwinHive):
    def broken(request: httpx.Request) -> httpx.Response | None:
        raise httpx.ReadError("cut", request=request)

    with pytest.raises(ValueError, match="the body's") as raised:
        async with hive.run("train"):
            twin.scripts.extend([broken] * 8)
            raise ValueError("the body's")
    assert "ends only when its lease is over" in raised.value.__notes__[0]
    twin.scripts.extend([broken] * 8)
    with pytest.raises((StreamBroken, AshError)):
        async with hive.run("other"):
            pass


async def test_a_run_that_is_not_open_spawns_nothing(hive: Hive):
    with pytest.raises(LocalProtocolError, match="enter it first"):
        await hive.run("train").spawn()


@pytest.fixture
def blocking(twin: TwinHive) -> Iterator[sync.Hive]:
    with sync.Hive(transport=twin.transport) as hive:
        yield hive


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_the_sync_twin_does_the_same(blocking: sync.Hive, twin: TwinHive, anyio_backend: str):
    del anyio_backend
    with blocking.run("train", lease_seconds=0.1) as run:
        with run.spawn() as box:
            assert box.info.run == run.name == "train" and box.exec("echo hi").stdout == "hi\n"
        many = run.spawn_many(2)
        assert [box.exec("echo hi").stdout for box in many.check()] == ["hi\n"] * 2
        assert [info.id for info in blocking.runs()] == [run.info.id] and run.ended is None
        deadline = time.monotonic() + 10
        while not twin.runs[run.info.id].renewals:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        run.renew()
    assert blocking.list() == []
    assert not blocking.spawn_many(2, "nonsense").made


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_a_forked_child_ends_no_run_of_its_parent(blocking: sync.Hive, twin: TwinHive, anyio_backend: str):
    del anyio_backend
    with blocking.run("train") as run:
        child = os.fork()
        if not child:
            run.end()
            os._exit(0)
        os.waitpid(child, 0)
        assert len(blocking.runs()) == 1
    assert blocking.runs() == []
