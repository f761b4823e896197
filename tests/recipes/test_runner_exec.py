"""`ash_exec`: one command to its end, within bounds."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_recipes.runner.context import Context
from ash_recipes.runner.execution import KeyedRuns
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.tools import RunnerTools
from tests.recipes.calls import call, refused

pytestmark = pytest.mark.anyio


def read(path: str | Path) -> bytes:
    return Path(path).read_bytes() if Path(path).exists() else b""


async def wait_for(path: Path) -> str:
    """Return what stands in a file once a command has written it."""
    with anyio.fail_after(20):
        while not read(path):
            await anyio.sleep(0.01)
    return read(path).decode()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


async def until_dead(pid: int) -> None:
    with anyio.fail_after(20):
        while alive(pid):
            await anyio.sleep(0.01)


async def test_streams_and_exit_code_come_apart(tools: RunnerTools) -> None:
    done = await call(tools, "exec", command="echo out; echo err >&2; exit 3")
    assert (done["exit_code"], done["stdout"], done["stderr"]) == (3, "out\n", "err\n")
    assert (done["timed_out"], done["truncated"], done["stdout_bytes"]) == (False, False, 4)


async def test_a_list_of_words_runs_without_a_shell(tools: RunnerTools) -> None:
    assert (await call(tools, "exec", command=["echo", "$HOME", "a  b"]))["stdout"] == "$HOME a  b\n"


async def test_quotes_and_here_documents_survive(tools: RunnerTools) -> None:
    command = "cat <<'EOF' | tr a-z A-Z\nit's \"$HOME\" `x` \\n\nEOF\nprintf '%s' \"a'b\""
    assert (await call(tools, "exec", command=command))["stdout"] == "IT'S \"$HOME\" `X` \\N\na'b"


async def test_stdin_is_closed_unless_given(tools: RunnerTools) -> None:
    assert (await call(tools, "exec", command="cat; echo end", timeout_seconds=5))["stdout"] == "end\n"
    given = base64.b64encode(b"x" * 300_000).decode()
    assert (await call(tools, "exec", command="wc -c", stdin_base64=given))["stdout"].strip() == "300000"


async def test_a_command_that_does_not_read_its_stdin_ends_all_the_same(tools: RunnerTools) -> None:
    given = base64.b64encode(b"x" * 300_000).decode()
    assert (await call(tools, "exec", command="echo ready", stdin_base64=given))["stdout"] == "ready\n"


async def test_cwd_and_env_are_of_one_command(tools: RunnerTools, context: Context) -> None:
    (context.workspace / "sub").mkdir()
    done = await call(tools, "exec", command="pwd; echo $ONLY", cwd="sub", env={"ONLY": "here"})
    assert done["stdout"] == f"{context.workspace}/sub\nhere\n"
    assert (await call(tools, "exec", command="pwd; echo -$ONLY-"))["stdout"] == f"{context.workspace}\n--\n"


async def timed_out(tools: RunnerTools, command: str, has_begun: Callable[[Any], Any]) -> Any:
    """Run a command into its timeout; into a longer one where it did not begin before, on a busy machine."""
    for seconds in (0.4, 4, 30):
        done = await call(tools, "exec", command=command, timeout_seconds=seconds)
        assert done["timed_out"]
        if has_begun(done):
            return done
    raise AssertionError("it did not begin")


async def test_a_timeout_ends_grandchildren_while_they_run(tools: RunnerTools, context: Context) -> None:
    # The second sleeps in a process group of its own, as under `timeout` or job control.
    command = "sleep 60 & echo $! > one; timeout 60 sleep 60 & echo $! > two; sleep 60"
    done = await timed_out(tools, command, lambda _: (context.workspace / "two").exists())
    assert done["exit_code"] in (137, 143) and done["duration_seconds"] < 50
    for name in ("one", "two"):
        await until_dead(int((context.workspace / name).read_text()))


async def test_a_command_that_ignores_the_polite_end_is_killed(tools: RunnerTools) -> None:
    command = "trap '' TERM; echo on; while :; do sleep 1; done"
    done = await timed_out(tools, command, lambda done: done["stdout"])
    assert (done["exit_code"], done["stdout"]) == (137, "on\n")


async def test_output_before_a_timeout_is_kept(tools: RunnerTools) -> None:
    done = await timed_out(tools, "echo begun; sleep 60", lambda done: done["stdout"])
    assert done["stdout"] == "begun\n"


async def test_what_a_command_leaves_in_the_background_goes_on(tools: RunnerTools, context: Context) -> None:
    done = await call(tools, "exec", command="(sleep 0.6; echo late > late; echo more) & echo now")
    assert done["stdout"] == "now\n" and done["duration_seconds"] < 0.6
    assert await wait_for(context.workspace / "late") == "late\n"


async def test_a_cancelled_call_ends_its_command(tools: RunnerTools, context: Context) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: tools.call("ash_exec", {"command": "echo $$ > pid; sleep 60"}))
        await wait_for(context.workspace / "pid")
        group.cancel_scope.cancel()
    await until_dead(int(read(context.workspace / "pid")))


async def test_bytes_that_are_not_utf8_come_as_base64_too(tools: RunnerTools) -> None:
    done = await call(tools, "exec", command=r"printf 'a\xff\x00b'; printf 'é' >&2")
    assert done["stdout"] == "a\ufffd\0b" and base64.b64decode(done["stdout_base64"]) == b"a\xff\0b"
    assert done["stderr"] == "é" and "stderr_base64" not in done


async def test_a_long_output_is_cut_in_its_middle_and_kept_whole_in_a_file(tools: RunnerTools) -> None:
    done = await call(tools, "exec", command="seq 1 20000; echo err >&2", output_limit=1000)
    whole = "".join(f"{number}\n" for number in range(1, 20001))
    assert done["truncated"] and done["stdout_bytes"] == len(whole)
    assert done["stdout"].startswith("1\n2\n") and done["stdout"].endswith("19999\n20000\n")
    assert f"{len(whole) - 1000} bytes left out" in done["stdout"]
    kept = read(done["output_file"]).decode()
    assert kept.replace("err\n", "") == whole and done["stderr"] == "err\n"


async def test_an_output_at_the_limit_is_whole(tools: RunnerTools) -> None:
    done = await call(tools, "exec", command="printf '%1000s' x", output_limit=1000)
    assert not done["truncated"] and len(done["stdout"]) == 1000 and "output_file" not in done


async def test_a_cut_through_a_character_is_no_broken_text(tools: RunnerTools) -> None:
    done = await call(tools, "exec", command="for i in $(seq 400); do printf '€'; done", output_limit=100)
    assert done["truncated"] and "stdout_base64" not in done and "\ufffd" not in done["stdout"]


@pytest.mark.parametrize("byte", [r"\x01", r"\xff", "é"])
async def test_no_answer_is_larger_than_clients_take(tools: RunnerTools, byte: str) -> None:
    command = f"for s in 1 2; do head -c 262144 /dev/zero | sed 's/\\x00/{byte}/g' >&$s; done"
    result = await tools.call("ash_exec", {"command": command})
    assert len(json.dumps(result)) < 1024 * 1024
    shape = result["structuredContent"]
    assert shape["truncated"] and len(read(shape["output_file"])) == 2 * shape["stdout_bytes"]


async def test_a_flood_of_output_stays_within_bounds(tools: RunnerTools, context: Context) -> None:
    before = _resident_bytes()
    done = await call(tools, "exec", command="head -c 300000000 /dev/zero", timeout_seconds=60)
    assert done["stdout_bytes"] == 300_000_000 and done["truncated"]
    assert _resident_bytes() - before < 50_000_000
    assert len(read(done["output_file"])) <= 64 * 1024 * 1024


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_only_the_newest_whole_outputs_are_kept(tools: RunnerTools, context: Context) -> None:
    for _ in range(23):
        await call(tools, "exec", command="echo 12345", output_limit=2)
    assert len(list(context.spool.iterdir())) == 20


async def test_where_no_file_can_be_kept_the_answer_still_comes(tools: RunnerTools, context: Context) -> None:
    (context.home / ".ash").write_text("in the way")
    done = await call(tools, "exec", command="seq 1 1000", output_limit=100)
    assert done["truncated"] and done["stdout_bytes"] == 3893 and "output_file" not in done


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({}, "bad_request", "'command' is missing"),
        ({"command": ""}, "bad_request", "'command'"),
        ({"command": []}, "bad_request", "'command'"),
        ({"command": "a\0b"}, "bad_request", "NUL"),
        ({"command": "true", "timeout_seconds": 0}, "bad_request", "greater than 0"),
        ({"command": "true", "timeout_seconds": "soon"}, "bad_request", "valid number"),
        ({"command": "true", "stdin_base64": "%"}, "bad_request", "not base64"),
        ({"command": "true", "env": {"A=B": "c"}}, "bad_request", "'A=B'"),
        ({"command": "true", "env": {"SECRET": "p\0q"}}, "bad_request", "SECRET holds a NUL"),
        ({"command": "true", "tiemout": 3}, "bad_request", "'tiemout' is not known (known are: command, cwd"),
        ({"command": ["no-such-program"]}, "spawn_failed", "'no-such-program'"),
        ({"command": "true", "cwd": "nowhere"}, "spawn_failed", "nowhere"),
        ({"command": "x" * 3_000_000}, "spawn_failed", "too long"),
    ],
)
async def test_bad_arguments_are_named(tools: RunnerTools, arguments: dict[str, Any], kind: str, words: str) -> None:
    found, message = await refused(tools, "exec", **arguments)
    assert found == kind and words in message and "p\0q" not in message


async def test_a_repeated_key_runs_once(tools: RunnerTools, context: Context) -> None:
    first = await call(tools, "exec", command="echo x >> runs; cat runs", key="k1")
    again = await call(tools, "exec", command="echo x >> runs; cat runs", key="k1")
    assert first == again and first["stdout"] == "x\n"


async def test_a_key_stands_for_one_command(tools: RunnerTools) -> None:
    await call(tools, "exec", command="true", key="k1")
    kind, message = await refused(tools, "exec", command="false", key="k1")
    assert kind == "bad_request" and "'k1'" in message


async def test_a_repeat_joins_the_run_whose_caller_went(tools: RunnerTools, context: Context) -> None:
    arguments = {"command": "echo x >> runs; until test -e go; do sleep 0.02; done; cat runs", "key": "k1"}
    async with anyio.create_task_group() as group:
        group.start_soon(tools.call, "ash_exec", arguments)
        await wait_for(context.workspace / "runs")
        group.cancel_scope.cancel()
    (context.workspace / "go").touch()
    assert (await call(tools, "exec", **arguments))["stdout"] == "x\n"


async def test_a_keyed_run_that_nobody_asks_for_again_is_stopped(context: Context) -> None:
    keyed, begun, stopped = KeyedRuns(context, abandoned_seconds=0.05), anyio.Event(), anyio.Event()

    async def work() -> dict[str, Any]:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()
        return {}

    async with anyio.create_task_group() as group:
        group.start_soon(keyed.once, "k", None, work)
        await begun.wait()
        group.cancel_scope.cancel()
    with anyio.fail_after(20):
        await stopped.wait()
        with pytest.raises(Problem, match="its caller had gone") as caught:
            await keyed.once("k", None, work)
    assert caught.value.kind == "abandoned"
