"""Streams and jobs at their bounds: which piece ends an stdin, when a stream stops its command, how output resumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ash_mcp import Sandbox, SandboxRefused, jobs
from ash_mcp.wire import ORIGIN_SANDBOX
from tests.ash_mcp.twin import TwinHive, request_id, whole_answer

pytestmark = pytest.mark.anyio


def calls(twin: TwinHive, tool: str) -> list[dict[str, Any]]:
    """Return the arguments of the calls of a runner's tool."""
    return [seen.arguments["arguments"] for seen in twin.seen if seen.arguments.get("tool") == tool]


def answer(twin: TwinHive, shape: dict[str, Any]) -> None:
    """Have the sandbox answer one call with this."""
    twin.scripts.append(
        lambda request: whole_answer(request_id(request), {"structuredContent": shape}, ORIGIN_SANDBOX)
    )


@pytest.mark.parametrize(
    ("data", "eof", "ends"),
    [
        (b"", False, [None]),
        (b"", True, [True]),
        (b"1234", True, [True]),
        (b"12345", True, [None, True]),
        (b"12345678", True, [None, True]),
        (b"12345678", False, [None, None]),
    ],
)
async def test_last_piece_of_an_stdin_and_no_other_ends_it(
    box: Sandbox, twin: TwinHive, monkeypatch: pytest.MonkeyPatch, data: bytes, eof: bool, ends: Sequence[bool | None]
):
    monkeypatch.setattr(jobs, "CHUNK_BYTES", 4)
    job = await box.background("cat; sleep 30", stdin=True)
    await job.write(data, eof=eof)
    assert [call.get("eof") for call in calls(twin, "ash_job_write")] == ends
    await job.signal("KILL")


async def test_stream_stops_its_own_command_once_and_only_while_that_runs(box: Sandbox, twin: TwinHive):
    await box.stream("sleep 30").aclose()
    ended = box.stream("echo done")
    assert [chunk.data async for chunk in ended] == [b"done\n"]
    await ended.aclose()
    job = await box.background("echo on; exec sleep 30")
    async with job.output() as other:
        await anext(other)
    assert calls(twin, "ash_job_signal") == []

    async with box.stream("echo on; exec sleep 30") as own:
        await anext(own)
    await own.aclose()
    assert [call["signal"] for call in calls(twin, "ash_job_signal")] == ["KILL"]
    await job.signal("KILL")


async def test_output_of_an_ended_job_comes_in_as_many_reads_as_it_takes(box: Sandbox, twin: TwinHive):
    job = await box.background(f"head -c {2 * jobs.READ_BYTES + 1} /dev/zero")
    await job.wait()
    before = len(calls(twin, "ash_job_read"))
    stream = job.output()
    assert sum([len(chunk.data) async for chunk in stream]) == 2 * jobs.READ_BYTES + 1
    assert stream.result.lost_bytes == 0
    assert [call["offset"] for call in calls(twin, "ash_job_read")[before:]] == [
        0,
        jobs.READ_BYTES,
        2 * jobs.READ_BYTES,
    ]


async def test_end_of_the_output_that_never_comes_is_refused_after_one_read_without_any(box: Sandbox, twin: TwinHive):
    piece = {"stream": "stdout", "offset": 0, "data_base64": "YWJj"}
    state = {"total_bytes": 10, "dropped_bytes": 0, "state": "exited", "exit_code": 0, "next_offset": 3}
    answer(twin, {**state, "chunks": [piece]})
    answer(twin, {**state, "chunks": []})
    stream = box.job("j1").output()
    assert (await anext(stream)).data == b"abc"
    with pytest.raises(SandboxRefused, match="keeps back the end of job j1's output, from 3 on"):
        await anext(stream)
