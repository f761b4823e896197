"""Commands and jobs with a key: each runs once, however many there are and whenever their answers are lost."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import Any

import anyio
import pytest

from ash_recipes.runner import jobs as runner_jobs
from ash_recipes.runner import keys
from ash_recipes.runner.context import Context
from ash_recipes.runner.execution import KEPT_SECONDS, KeyedRuns
from ash_recipes.runner.jobs import KEPT_LONGER, Jobs
from ash_recipes.runner.keys import REMEMBERED_SECONDS, SpentKeys
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.tools import RunnerTools
from tests.recipes.calls import call, refused
from tests.recipes.test_runner_exec import wait_for

pytestmark = pytest.mark.anyio

MANY = 200


class Clock:
    """A time that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Something to do that counts how often it was done."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.runs = 0

    async def __call__(self) -> dict[str, Any]:
        self.runs += 1
        return self.result


async def test_every_answer_of_two_hundred_commands_can_be_lost(tools: RunnerTools, context: Context) -> None:
    answers: dict[int, str] = {}

    async def run(number: int, *, heard: bool) -> None:
        done = await call(tools, "exec", command=f"echo {number} | tee -a runs", key=f"k{number}")
        if heard:
            answers[number] = done["stdout"]

    for first in (0, MANY // 2):  # the first half has ended when the second begins
        async with anyio.create_task_group() as group:
            for number in range(first, first + MANY // 2):
                group.start_soon(partial(run, number, heard=False))
    async with anyio.create_task_group() as group:
        for number in range(MANY):
            group.start_soon(partial(run, number, heard=True))
    assert Counter((context.workspace / "runs").read_text().split()) == {str(number): 1 for number in range(MANY)}
    assert answers == {number: f"{number}\n" for number in range(MANY)}


async def test_every_answer_of_two_hundred_job_starts_can_be_lost(tools: RunnerTools, context: Context) -> None:
    async def start(number: int) -> str:
        return (await call(tools, "job_start", command=f"echo {number} >> runs", key=f"k{number}"))["job"]

    async def ended(job: str) -> None:
        while (await call(tools, "job_read", job=job, offset=1, wait_seconds=5))["state"] != "exited":
            pass

    started: list[str] = []
    with anyio.fail_after(60):
        for number in range(MANY):
            started.append(await start(number))
            await ended(started[-1])
        assert [await start(number) for number in range(MANY)] == started
        for job in started:
            await ended(job)
    assert Counter((context.workspace / "runs").read_text().split()) == {str(number): 1 for number in range(MANY)}


async def test_a_result_over_the_bytes_is_told_as_lost_and_its_command_does_not_run_again(context: Context) -> None:
    keyed, works = KeyedRuns(context, kept_bytes=100_000), [Work({"stdout": "x" * 40_000}) for _ in range(3)]
    for number, work in enumerate(works):
        assert await keyed.once(f"k{number}", None, work) == work.result
    for number in (1, 2):
        assert await keyed.once(f"k{number}", None, works[number]) == works[number].result
    with pytest.raises(Problem, match="'k0' before and its result is kept no longer") as caught:
        await keyed.once("k0", None, works[0])
    assert caught.value.kind == "result_lost" and [work.runs for work in works] == [1, 1, 1]


async def test_a_result_is_kept_for_its_time_from_its_end_and_its_key_for_longer(context: Context) -> None:
    clock, work = Clock(), Work({"stdout": "x"})
    keyed = KeyedRuns(context, clock=clock)
    await keyed.once("k", None, work)
    clock.now += KEPT_SECONDS - 1
    await keyed.once("k", None, work)
    clock.now += 1
    for _ in range(2):
        with pytest.raises(Problem, match="kept no longer"):
            await keyed.once("k", None, work)
        clock.now += REMEMBERED_SECONDS - 1
    assert work.runs == 1
    clock.now += 1
    await keyed.once("k", None, work)
    assert work.runs == 2


async def test_a_command_that_runs_is_never_let_go(context: Context) -> None:
    clock, started, go = Clock(), anyio.Event(), anyio.Event()
    keyed = KeyedRuns(context, clock=clock, kept_bytes=0)
    runs: list[int] = []

    async def long() -> dict[str, Any]:
        runs.append(1)
        started.set()
        await go.wait()
        return {"stdout": "done"}

    answers: list[dict[str, Any]] = []

    async def ask() -> None:
        answers.append(await keyed.once("long", None, long))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await started.wait()
        for number in range(100):
            await keyed.once(f"k{number}", None, Work({}))
        clock.now += 10 * KEPT_SECONDS
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        go.set()
    assert answers == [{"stdout": "done"}] * 2 and len(runs) == 1


async def test_a_failure_is_the_answer_of_every_repeat(tools: RunnerTools, context: Context) -> None:
    for _ in range(2):
        kind, message = await refused(tools, "exec", command=["./made-later"], key="k")
        assert kind == "spawn_failed" and "made-later" in message
        (context.workspace / "made-later").write_text("#!/bin/sh\necho ran\n")
        (context.workspace / "made-later").chmod(0o755)
    assert (await call(tools, "exec", command=["./made-later"], key="other"))["stdout"] == "ran\n"


async def test_a_defect_fails_its_own_callers_and_no_other_command(context: Context) -> None:
    keyed = KeyedRuns(context)

    async def broken() -> dict[str, Any]:
        raise OSError("no descriptor is left")

    for _ in range(2):
        with pytest.raises(OSError, match="no descriptor"):
            await keyed.once("k", None, broken)
    assert await keyed.once("other", None, Work({"stdout": "fine"})) == {"stdout": "fine"}


async def test_a_command_that_was_stopped_for_want_of_a_caller_is_told_as_that(context: Context) -> None:
    keyed, running, stopped = KeyedRuns(context, abandoned_seconds=0.01), anyio.Event(), anyio.Event()
    begun: list[int] = []

    async def work() -> dict[str, Any]:
        begun.append(1)
        running.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()
        return {}

    async with anyio.create_task_group() as group:
        group.start_soon(keyed.once, "k", None, work)
        await running.wait()
        group.cancel_scope.cancel()
    with anyio.fail_after(20):
        await stopped.wait()
        with pytest.raises(Problem, match="its caller had gone") as caught:
            await keyed.once("k", None, work)
    assert caught.value.kind == "abandoned" and len(begun) == 1


async def test_a_job_that_is_kept_no_longer_is_not_started_again(context: Context) -> None:
    clock = Clock()
    async with Jobs(clock=clock) as jobs:

        async def start(number: int) -> runner_jobs.Job:
            env = {"PATH": "/bin:/usr/bin"}
            job = jobs.start(["sh", "-c", "echo x >> runs"], cwd=context.workspace, env=env, key=f"k{number}")
            with anyio.fail_after(20):
                await job.ended.wait()
            return job

        first = await start(0)
        for number in range(1, KEPT_LONGER + 1):
            await start(number)
        assert await start(0) is first
        clock.now += runner_jobs.KEPT_SECONDS
        last = await start(KEPT_LONGER + 1)
        with pytest.raises(Problem) as caught:
            await start(0)
        assert caught.value.kind == "result_lost" and await start(KEPT_LONGER + 1) is last
        assert len(jobs.list()) == KEPT_LONGER
    assert (context.workspace / "runs").read_text() == "x\n" * (KEPT_LONGER + 2)


async def test_the_job_that_ended_first_goes_first(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_jobs, "MAX_KEPT", 1)
    async with Jobs() as jobs:
        long = jobs.start("echo x > up; read x", cwd=context.workspace, env={"PATH": "/bin:/usr/bin"}, stdin=True)
        await wait_for(context.workspace / "up")
        short = jobs.start("true", cwd=context.workspace, env={"PATH": "/bin:/usr/bin"})
        with anyio.fail_after(20):
            await short.ended.wait()
            await long.process.close_stdin()
            await long.ended.wait()
        assert jobs.list() == [long]


async def test_a_list_of_very_many_jobs_is_still_an_answer(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    many = runner_jobs.MAX_KEPT + runner_jobs.MAX_RUNNING
    job = context.jobs.start(["true", "\x01" * 600], cwd=context.workspace, env={"PATH": "/bin:/usr/bin"})
    monkeypatch.setattr(context.jobs, "list", lambda: [job] * many)
    result = await RunnerTools(context).call("ash_job_list", {})
    assert len(result["structuredContent"]["jobs"]) == many and len(json.dumps(result)) < 1_000_000


def test_keys_are_forgotten_by_age_and_over_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    spent = SpentKeys(clock)
    monkeypatch.setattr(keys, "MAX_KEYS", 2)
    for key in ("one", "two", "three"):
        spent.add(key)
    spent.refuse("one")
    for key in ("two", "three"):
        with pytest.raises(Problem):
            spent.refuse(key)
    clock.now += REMEMBERED_SECONDS
    spent.refuse("three")
