"""Terminals in the runner: a real pty behind a real WebSocket."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ash_recipes.runner import ptys
from ash_recipes.runner.context import Context
from ash_recipes.runner.jobs import Jobs
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.ptys import Pty, Ptys
from ash_recipes.runner.tools import RunnerTools
from tests.recipes.calls import call
from tests.recipes.runner_parts import ECHO, Runner, running
from tests.recipes.test_runner_exec import until_dead, wait_for

pytestmark = pytest.mark.anyio

SLEEP = b"sh -c 'echo asleep $((0+1)); exec sleep 1000'\n"
"""Says so once it has the foreground; before, a signal reaches the shell, which ignores some. Its echo says no 1."""


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with running(ECHO) as runner:
        yield runner


@asynccontextmanager
async def opened(runner: Runner, token: str | None = None, **first: Any) -> AsyncGenerator[ClientConnection]:
    headers = {"ash-token": runner.token() if token is None else token}
    assert runner.path is not None
    async with unix_connect(
        runner.path, uri="ws://runner/_ash/terminal", additional_headers=headers, open_timeout=20
    ) as ours:
        if first:
            await say(ours, **first)
        yield ours


async def say(ours: ClientConnection, **message: Any) -> None:
    await ours.send(json.dumps(message))


async def heard(ours: ClientConnection) -> dict[str, Any]:
    with anyio.fail_after(20):
        message = await ours.recv()
    assert isinstance(message, str), message
    return json.loads(message)


async def shown(ours: ClientConnection, until: bytes | None = None) -> tuple[bytes, dict[str, Any]]:
    """Return the output up to `until`, or to the end, and the last text message."""
    out = b""
    said: dict[str, Any] = {}
    with anyio.fail_after(20):
        try:
            while until is None or until not in out:
                message = await ours.recv()
                if isinstance(message, bytes):
                    out += message
                else:
                    said = json.loads(message)
        except ConnectionClosed:
            assert until is None, out
    return out, said


async def test_a_command_has_a_controlling_terminal_of_its_size(runner: Runner):
    script = "tty; stty size; ps -o pid=,sid=,tpgid= -p $$; stty -a | grep -c -e -iutf8; echo $TERM:$X; exit 3"
    first: dict[str, Any] = {
        "type": "start",
        "command": script,
        "rows": 33,
        "columns": 101,
        "env": {"X": "y", "TERM": "dumb"},
    }
    async with opened(runner, **first) as it:
        said = await heard(it)
        assert (said["type"], said["offset"], said["input"]) == ("attached", 0, 0)
        out, last = await shown(it)
        lines = out.decode().split("\r\n")
        assert lines[0].startswith("/dev/pts/")
        assert lines[1] == "33 101"
        assert len(set(lines[2].split())) == 1, "it leads its session and has the terminal's foreground"
        assert lines[3:] == ["0", "dumb:y", ""]
        assert (last, it.close_code) == ({"type": "exited", "exit_code": 3}, 1000)


async def test_keys_signals_and_sizes_reach_what_runs_in_the_foreground(runner: Runner):
    async with opened(runner, type="start", command=["bash", "--norc", "--noprofile"], env={"PS1": "> "}) as it:
        await shown(it, b"> ")  # by then it no longer dies of Ctrl-C
        await it.send(b"trap 'stty size' WINCH\n")
        await shown(it, b"> ")
        await it.send(SLEEP)
        await shown(it, b"asleep 1\r\n")
        await it.send(b"\x03")
        await it.send(b"echo code $?\n")
        await shown(it, b"code 130")
        await say(it, type="resize", rows=7, columns=9)
        await shown(it, b"7 9")
        await it.send(SLEEP)
        await shown(it, b"asleep 1\r\n")
        await say(it, type="signal", signal="TERM")
        await it.send(b"echo code $?\n")
        await shown(it, b"code 143")
        await it.send(b"exit 9\n")
        assert (await shown(it))[1] == {"type": "exited", "exit_code": 9}


async def test_without_a_command_it_is_a_shell_in_the_workspace(runner: Runner):
    async with opened(runner, type="start", env={"PS1": "> "}) as it:
        await it.send(b"pwd; exit\n")
        assert str(runner.workspace).encode() in (await shown(it))[0]


async def test_who_was_cut_off_goes_on_where_it_was_and_knows_what_arrived(runner: Runner):
    async with opened(runner, type="start", command="cat", key="once") as it:
        pty = (await heard(it))["pty"]
        await it.send(b"one\n")
        seen, _ = await shown(it, b"one\r\none\r\n")
        it.transport.abort()
    async with opened(runner, type="attach", pty=pty, offset=len(seen)) as it:
        assert await heard(it) == {"type": "attached", "pty": pty, "offset": len(seen), "input": 4}
        await it.send(b"two\n")
        assert (await shown(it, b"two\r\ntwo\r\n"))[0] == b"two\r\ntwo\r\n"
    async with opened(runner, type="start", command="cat", key="once") as it:
        assert (await heard(it))["pty"] == pty
        assert (await shown(it, b"two\r\ntwo\r\n"))[0].startswith(b"one")
        async with opened(runner, type="attach", pty=pty) as other:
            await heard(other)
            await shown(it)
            assert it.close_code == 4001
            await say(other, type="hang_up")
            assert (await shown(other))[1] == {"type": "exited", "exit_code": 129}


async def test_output_that_nobody_has_read_in_time_is_counted_as_lost(runner: Runner):
    async with opened(runner, type="start", command="read go; seq 400000; echo end; echo x > done; read go") as it:
        pty = (await heard(it))["pty"]
        await it.send(b"\n")
    await wait_for(runner.workspace / "done")
    async with opened(runner, type="attach", pty=pty, offset=0) as it:
        total, lost = 0, 0
        with anyio.fail_after(60):
            async for message in it:
                if isinstance(message, bytes):
                    total += len(message)
                    if message.endswith(b"end\r\n"):
                        break
                elif json.loads(message)["type"] == "lost":
                    lost += json.loads(message)["bytes"]
        assert lost > 0
        assert total + lost == 2 + sum(len(str(number)) + 2 for number in range(1, 400_001)) + 5
        await it.send(b"\n")
        await shown(it)


async def test_a_hang_up_ends_all_of_the_session(runner: Runner):
    command = "trap '' HUP; sleep 1000 & echo $$ $!; wait"
    async with opened(runner, type="start", command=command) as it:
        await heard(it)
        out, _ = await shown(it, b"\n")
        await say(it, type="hang_up")
        assert (await shown(it))[1]["exit_code"] in (129, 137)
    for pid in out.split():
        await until_dead(int(pid))


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        ({"type": "start", "command": ["no-such-command"]}, "spawn_failed"),
        ({"type": "start", "rows": 0}, "bad_request"),
        ({"type": "start", "cwd": "/no/such"}, "spawn_failed"),
        ({"type": "attach", "pty": "pty-99"}, "pty_not_found"),
        ({"type": "dance"}, "bad_request"),
    ],
)
async def test_what_cannot_be_is_refused_in_words(runner: Runner, first: dict[str, Any], kind: str):
    async with opened(runner, **first) as it:
        said = await heard(it)
        assert (said["type"], said["error"]["kind"]) == ("error", kind)
        await shown(it)
        assert it.close_code == 4002


async def test_a_message_that_makes_no_sense_leaves_the_command_running(runner: Runner):
    async with opened(runner, type="start", command="cat") as it:
        pty = (await heard(it))["pty"]
        await it.send("[]")
        assert (await heard(it))["error"]["kind"] == "bad_request"
    async with opened(runner, type="attach", pty=pty) as it:
        await heard(it)
        await it.send(b"\x04")
        assert (await shown(it))[1] == {"type": "exited", "exit_code": 0}


async def test_nobody_comes_in_without_a_token_or_by_another_path(runner: Runner):
    for token, path in (("bad", "terminal"), (runner.token(), "files"), (runner.token(), "terminal/x")):
        with pytest.raises(InvalidStatus):
            assert runner.path is not None
            async with unix_connect(
                runner.path, uri=f"ws://runner/_ash/{path}", additional_headers={"ash-token": token}
            ):
                pass


async def test_one_on_tcp_needs_its_token_too():
    with running(ECHO, port=True) as runner:
        url = runner.url.replace("http", "ws") + "/_ash/terminal"
        with pytest.raises(InvalidStatus):
            async with connect(url, proxy=None):
                pass
        async with connect(url, proxy=None, additional_headers={"ash-token": runner.token()}) as it:
            await say(it, type="start", command="echo hi")
            assert (await shown(it))[0] == b"hi\r\n"


# The table of them, in memory.


@pytest.fixture
async def context(tmp_path: Any) -> AsyncGenerator[Context]:
    async with Jobs() as jobs:
        yield Context(workspace=tmp_path, home=tmp_path, jobs=jobs)


def start(context: Context, command: str = "cat", **more: Any) -> Pty:
    env = context.environment.variables()
    return context.ptys.start(command, cwd=context.workspace, env=env, size=(24, 80), **more)


async def ended(pty: Pty) -> int | None:
    with anyio.fail_after(10):
        while pty.running:
            await pty.changed.wait()
    return pty.exit_code


async def test_one_that_nobody_is_attached_to_is_hung_up_after_its_time(context: Context):
    left, watched = start(context, detached_seconds=0.1), start(context, detached_seconds=0.1)
    with anyio.CancelScope() as viewer:
        watched.attach(viewer, 0)
        assert await ended(left) == 129
        assert watched.running
        watched.detach(viewer)
        assert await ended(watched) == 129


async def test_more_than_so_many_are_refused(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ptys, "MAX_RUNNING", 2)
    start(context)
    start(context, "exit 0")
    with pytest.raises(Problem, match="2 terminals are open"):
        start(context)


async def test_ended_ones_are_kept_for_a_while(context: Context):
    now = 0.0
    context.ptys = Ptys(context.jobs, clock=lambda: now)
    pty = start(context, "exit 4")
    assert await ended(pty) == 4
    listed = await call(RunnerTools(context), "pty_list")
    assert [(it["pty"], it["state"], it["exit_code"]) for it in listed["ptys"]] == [(pty.id, "exited", 4)]
    now = ptys.KEPT_SECONDS
    with pytest.raises(Problem) as refused:
        context.ptys.get(pty.id)
    assert refused.value.kind == "pty_not_found"


async def test_the_end_of_the_jobs_ends_them(tmp_path: Any):
    async with Jobs() as jobs:
        pty = start(Context(workspace=tmp_path, home=tmp_path, jobs=jobs), "trap '' HUP; sleep 1000")
    await until_dead(pty.process.pid)


async def test_input_waits_for_a_command_that_does_not_read(context: Context):
    pty = start(context, "stty raw; sleep 1000")
    with anyio.move_on_after(0.5) as waiting:
        for _ in range(100):
            await pty.type(bytes(4096))
    assert waiting.cancelled_caught
    assert pty.input_total < 100 * 4096
