"""Jobs: commands beside the calls that started them."""

from __future__ import annotations

import base64
import json

import anyio
import pytest

from ash_recipes.runner.context import Context
from ash_recipes.runner.jobs import Jobs
from ash_recipes.runner.output import JobLog
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.tools import RunnerTools
from tests.recipes.calls import call, refused, written
from tests.recipes.test_runner_exec import until_dead, wait_for

pytestmark = pytest.mark.anyio


async def read_all(tools: RunnerTools, job: str) -> tuple[bytes, dict[str, object]]:
    """Read a job to its end, as a client does."""
    data, offset = b"", 0
    while True:
        with anyio.fail_after(10):
            page = await call(tools, "job_read", job=job, offset=offset, wait_seconds=5)
        data += written(page)
        offset = page["next_offset"]
        if page["state"] == "exited" and offset == page["total_bytes"]:
            return data, page


async def test_a_job_is_read_to_its_end(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="echo a; sleep 0.1; echo b >&2; exit 4"))["job"]
    data, last = await read_all(tools, job)
    assert data == b"a\nb\n" and last["exit_code"] == 4 and last["timed_out"] is False


async def test_a_reader_is_answered_as_soon_as_there_is_something(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="sleep 0.1; echo a; sleep 60"))["job"]
    with anyio.fail_after(20):
        page = await call(tools, "job_read", job=job, wait_seconds=30)
    assert written(page) == b"a\n" and page["state"] == "running" and page["next_offset"] == 2


async def test_a_reader_who_waits_in_vain_is_answered_in_time(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="sleep 60"))["job"]
    with anyio.fail_after(20):
        page = await call(tools, "job_read", job=job, wait_seconds=0.1)
    assert page["chunks"] == [] and page["state"] == "running" and "exit_code" not in page


async def test_chunks_name_their_stream_and_their_place(tools: RunnerTools) -> None:
    command = "echo one; read next; echo two >&2; read next; echo three"
    job = (await call(tools, "job_start", command=command, stdin=True))["job"]
    for offset in (0, 4):  # each is there before the next is written
        with anyio.fail_after(60):
            while not (await call(tools, "job_read", job=job, offset=offset, wait_seconds=30))["chunks"]:
                pass
        await call(tools, "job_write", job=job, data_base64=base64.b64encode(b"\n").decode())
    await read_all(tools, job)
    page = await call(tools, "job_read", job=job, offset=2)
    assert [(chunk["stream"], chunk["offset"]) for chunk in page["chunks"]] == [
        ("stdout", 2),
        ("stderr", 4),
        ("stdout", 8),
    ]
    assert written(page) == b"e\ntwo\nthree\n"


async def test_a_limit_cuts_a_page_and_the_next_goes_on(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="printf 0123456789"))["job"]
    await read_all(tools, job)
    first = await call(tools, "job_read", job=job, limit=4)
    rest = await call(tools, "job_read", job=job, offset=first["next_offset"])
    assert (written(first), first["next_offset"], written(rest)) == (b"0123", 4, b"456789")


async def test_stdin_is_written_and_closed(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="cat", stdin=True))["job"]
    data = b"\xff" * 200_000
    assert (await call(tools, "job_write", job=job, data_base64=base64.b64encode(data).decode()))["written"] == 200_000
    await call(tools, "job_write", job=job, eof=True)
    assert (await read_all(tools, job))[0] == data
    assert (await refused(tools, "job_write", job=job, data_base64=""))[0] == "bad_request"


async def test_a_signal_reaches_the_whole_group(tools: RunnerTools, context: Context) -> None:
    job = (await call(tools, "job_start", command="sleep 60 & echo $! > pid; wait"))["job"]
    pid = int(await wait_for(context.workspace / "pid"))
    assert (await call(tools, "job_signal", job=job, signal="KILL"))["signalled"]
    assert (await read_all(tools, job))[1]["exit_code"] == 137
    await until_dead(pid)
    assert not (await call(tools, "job_signal", job=job, signal="TERM"))["signalled"]


async def test_a_job_has_its_own_timeout(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="sleep 60", timeout_seconds=0.2))["job"]
    assert (await read_all(tools, job))[1]["timed_out"] is True


async def test_the_list_shows_what_runs_and_what_ended(tools: RunnerTools) -> None:
    ended = (await call(tools, "job_start", command=["sh", "-c", "exit 2"]))["job"]
    await read_all(tools, ended)
    running = (await call(tools, "job_start", command="sleep 60"))["job"]
    jobs = {job["job"]: job for job in (await call(tools, "job_list"))["jobs"]}
    assert jobs[ended]["state"] == "exited" and jobs[ended]["exit_code"] == 2
    assert jobs[ended]["command"] == "sh -c 'exit 2'" and jobs[running]["state"] == "running"


async def test_the_same_key_starts_one_job(tools: RunnerTools) -> None:
    first = await call(tools, "job_start", command="sleep 60", key="k")
    assert first == await call(tools, "job_start", command="sleep 60", key="k")
    assert (await refused(tools, "job_start", command="sleep 61", key="k"))[0] == "bad_request"


async def test_an_unknown_job_and_an_unknown_signal_are_told(tools: RunnerTools) -> None:
    assert (await refused(tools, "job_read", job="job-9"))[0] == "job_not_found"
    job = (await call(tools, "job_start", command="sleep 60"))["job"]
    assert await refused(tools, "job_signal", job=job, signal="NOPE") == (
        "bad_request",
        "'NOPE' is no signal; use TERM, KILL, INT, HUP, USR1 or another name",
    )


async def test_what_the_log_let_go_is_counted(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="head -c 20000000 /dev/zero; echo end"))["job"]
    # Read only when it has ended: a reader who is as fast as the job would lose nothing.
    with anyio.fail_after(20):
        page = await call(tools, "job_read", job=job, offset=20_000_004, wait_seconds=20)
    page = await call(tools, "job_read", job=job)
    dropped = page["dropped_bytes"]
    assert page["total_bytes"] == 20_000_004 and dropped >= 20_000_004 - 8 * 1024 * 1024
    assert page["chunks"][0]["offset"] == dropped and page["next_offset"] == dropped + len(written(page))


async def test_too_many_jobs_are_refused(context: Context) -> None:
    async with Jobs(max_running=1) as jobs:
        jobs.start("sleep 60", cwd=context.workspace, env={"PATH": "/bin:/usr/bin"})
        with pytest.raises(Problem, match="1 jobs run already"):
            jobs.start("true", cwd=context.workspace, env={"PATH": "/bin:/usr/bin"})


async def test_leaving_ends_every_job(context: Context) -> None:
    async with Jobs() as jobs:
        job = jobs.start("sleep 60", cwd=context.workspace, env={"PATH": "/bin:/usr/bin"})
    await until_dead(job.process.pid)


def test_a_log_of_alternating_bytes_stays_small_and_pages_of_it_too() -> None:
    log = JobLog()
    for _ in range(50_000):
        log.append("stdout", b"o")
        log.append("stderr", b"e")
    assert log.total == 100_000 and log.held <= 16_384
    chunks, after = log.read(0, 262_144)
    assert chunks[0].offset == log.dropped and after == log.dropped + len(chunks)
    assert len(json.dumps([chunk.offset for chunk in chunks])) < 100_000


def test_small_writes_of_one_stream_become_one_chunk() -> None:
    log = JobLog()
    for _ in range(1000):
        log.append("stdout", b"ab")
    chunks, after = log.read(1, 100)
    assert [(chunk.offset, len(chunk.data)) for chunk in chunks] == [(1, 100)] and after == 101


async def test_a_paced_job_waits_for_its_reader_and_loses_nothing(tools: RunnerTools) -> None:
    size = 30_000_000
    command = f"head -c {size} /dev/zero; echo end >&2"
    job = (await call(tools, "job_start", command=command, paced=True))["job"]
    offset = got = 0
    await anyio.sleep(0.5)
    with anyio.fail_after(60):
        while True:
            page = await call(tools, "job_read", job=job, offset=offset, limit=524_288, wait_seconds=5)
            for chunk in page["chunks"]:
                assert chunk["offset"] == offset
                offset += len(base64.b64decode(chunk["data_base64"]))
                got += 1
            if page["state"] == "exited" and offset == page["total_bytes"]:
                break
    assert offset == size + len("end\n") and got > 50


async def test_a_paced_job_that_nobody_reads_holds_still_and_can_be_ended(tools: RunnerTools) -> None:
    job = (await call(tools, "job_start", command="yes", paced=True))["job"]
    before = -1
    with anyio.fail_after(20):
        while (now := (await call(tools, "job_read", job=job, limit=1))["total_bytes"]) != before:
            before = now
            await anyio.sleep(0.2)
    assert 4_000_000 < before <= 8 * 1024 * 1024
    assert (await call(tools, "job_signal", job=job, signal="KILL"))["signalled"]
    with anyio.fail_after(10):
        while (await call(tools, "job_read", job=job, offset=before, limit=1))["state"] != "exited":
            await anyio.sleep(0.05)
