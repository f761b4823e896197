"""The terminal of the recipe `general`: what lasts between commands, and what cannot break it."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from ash_recipes.general.terminal import Terminal
from ash_recipes.runner.context import Context
from ash_recipes.runner.problems import Problem
from tests.recipes.test_runner_exec import until_dead

pytestmark = pytest.mark.anyio


@pytest.fixture
def terminal(context: Context) -> Terminal:
    return Terminal(context)


async def run(terminal: Terminal, command: str, timeout_seconds: float = 10) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a command."""
    done = await terminal.execute(command, timeout_seconds)
    return done.exit_code, done.stdout.text(), done.stderr.text()


async def test_directory_and_exported_variables_last(terminal: Terminal, context: Context) -> None:
    assert await run(terminal, "mkdir -p 'a b' && cd 'a b' && export X='1 \"2\" $3' Y=\"new\nline\"; Z=3") == (
        0,
        "",
        "",
    )
    assert terminal.cwd == context.workspace / "a b"
    assert await run(terminal, 'pwd; echo "$X|$Y|$Z"') == (0, f'{context.workspace}/a b\n1 "2" $3|new\nline|\n', "")


async def test_what_is_unset_stays_unset(terminal: Terminal) -> None:
    await run(terminal, "unset LANG; export KEPT=1")
    assert (await run(terminal, "echo ${LANG-gone} $KEPT"))[1] == "gone 1\n"


async def test_cd_back_works_across_commands(terminal: Terminal, context: Context) -> None:
    await run(terminal, "cd /usr")
    assert (await run(terminal, "cd -"))[1] == f"{context.workspace}\n"


async def test_an_exit_keeps_code_and_state(terminal: Terminal) -> None:
    assert (await run(terminal, "cd /usr; export X=1; exit 3"))[0] == 3
    assert (await run(terminal, "echo $X; pwd"))[1] == "1\n/usr\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("if", 2),
        ("echo 'open", 2),
        ("set -e; false; echo no", 1),
        ("set -u; echo $undefined_thing", 127),
        ("exec false", 1),
        ("kill -KILL $$", 137),
        ("trap 'exit 5' EXIT; true", 5),
        ("printf() { :; }; pwd() { :; }; export -f printf", 0),
        ("PATH=/nowhere; export PATH; true", 0),
        ("readonly R=1; export R", 0),
        ("exec >&- 2>&-", 0),
        ("IFS=/; set -f; true", 0),
    ],
)
async def test_no_command_breaks_the_next(terminal: Terminal, command: str, code: int) -> None:
    await run(terminal, "cd /usr; export KEPT='a/b c'")
    assert (await run(terminal, command))[0] == code
    assert await run(terminal, 'pwd; echo "$KEPT"') == (0, "/usr\na/b c\n", "")


async def test_state_before_a_syntax_error_is_kept(terminal: Terminal) -> None:
    code, _, errors = await run(terminal, "cd /usr\nexport X=1\nif")
    assert code == 2 and "line 4: syntax error" in errors
    assert (await run(terminal, "pwd; echo $X"))[1] == "/usr\n1\n"


async def test_traces_show_only_the_command(terminal: Terminal) -> None:
    assert (await run(terminal, "set -x; echo hi"))[2] == "++ echo hi\n"


async def test_errors_count_the_lines_of_the_command(terminal: Terminal) -> None:
    assert "line 2: nope: command not found" in (await run(terminal, "true\nnope"))[2]


async def test_here_documents_and_quotes_survive(terminal: Terminal) -> None:
    command = 'python3 - <<\'PY\'\nprint("it\'s", \'\\\\\', "$HOME `x`")\nPY\ncat <<EOF\n$((1 + 1)) "q"\nEOF'
    assert (await run(terminal, command))[1] == 'it\'s \\ $HOME `x`\n2 "q"\n'


async def test_a_command_of_any_length_runs(terminal: Terminal) -> None:
    command = "wc -c <<'EOF'\n" + "x" * 3_000_000 + "\nEOF"
    assert (await run(terminal, command))[1].strip() == "3000001"


async def test_arguments_of_the_shell_are_not_seen(terminal: Terminal) -> None:
    assert (await run(terminal, 'echo "$#" "$0" "$SHLVL"'))[1] == "0 bash 1\n"


async def test_stdin_is_closed(terminal: Terminal) -> None:
    assert await run(terminal, "cat; read line; echo done") == (0, "done\n", "")


async def test_a_timeout_keeps_the_last_state_and_ends_everything(terminal: Terminal, context: Context) -> None:
    await run(terminal, "cd /usr; export X=1")
    done = await terminal.execute("(sleep 60 & echo $! >&2; wait) & sleep 60", 0.4)
    assert done.timed_out
    await until_dead(int(done.stderr.text().split()[0]))
    assert (await run(terminal, "pwd; echo $X"))[1] == "/usr\n1\n"


async def test_a_vanished_directory_falls_back_to_the_workspace(terminal: Terminal, context: Context) -> None:
    await run(terminal, "mkdir gone; cd gone; rmdir ../gone")
    assert (await run(terminal, "pwd"))[1] == f"{context.workspace}\n"


async def test_background_processes_outlive_their_command(terminal: Terminal, context: Context) -> None:
    assert (await run(terminal, "(until test -e go; do sleep 0.05; done; echo yes > seen) & echo started"))[
        1
    ] == "started\n"
    (context.workspace / "go").touch()
    with anyio.fail_after(20):
        while not (context.workspace / "seen").exists():
            await anyio.sleep(0.02)


async def test_claimed_variables_are_seen_by_the_first_command(terminal: Terminal, context: Context) -> None:
    context.environment.claim({"WHO_TEST": "you"})
    assert (await run(terminal, "echo $WHO_TEST"))[1] == "you\n"


async def test_variables_that_are_not_utf8_last(terminal: Terminal) -> None:
    await run(terminal, r"export RAW=$'a\xffb'")
    assert (await run(terminal, r"""printf %s "$RAW" | od -An -tx1"""))[1].split() == ["61", "ff", "62"]


async def test_commands_at_the_same_time_do_not_wait_for_each_other(terminal: Terminal, context: Context) -> None:
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(run, terminal, "until test -e other; do sleep 0.02; done")
            await anyio.wait_all_tasks_blocked()
            group.start_soon(run, terminal, "touch other")


async def test_jobs_start_where_the_terminal_is(terminal: Terminal, context: Context) -> None:
    await run(terminal, "cd /usr; export X=1")
    job = terminal.start_job('pwd; echo "$X"; cd /; export X=2', stdin=False, timeout_seconds=None)
    with anyio.fail_after(20):
        await job.ended.wait()
    assert job.log.read(0, 100)[0][0].data == b"/usr\n1\n" and str(job.command).startswith("pwd;")
    assert (await run(terminal, "pwd; echo $X"))[1] == "/usr\n1\n"


async def test_the_history_keeps_the_last_fifty(terminal: Terminal) -> None:
    for number in range(51):
        await run(terminal, f"exit {number % 2}")
    assert len(terminal.history) == 50
    assert [entry.success for entry in list(terminal.history)[-2:]] == [False, True]


async def test_changing_the_directory_is_checked(terminal: Terminal, context: Context) -> None:
    (context.workspace / "file").touch()
    (context.workspace / "link").symlink_to("/usr")
    assert terminal.change_directory("link") == Path("/usr")
    assert terminal.change_directory("~") == context.home
    for path, kind in (
        ("nowhere", "file_not_found"),
        (f"{context.workspace}/file", "not_a_directory"),
        ("", "bad_request"),
    ):
        with pytest.raises(Problem) as raised:
            terminal.change_directory(path)
        assert raised.value.kind == kind
    assert terminal.cwd == context.home


async def test_a_nul_in_a_command_is_refused(terminal: Terminal) -> None:
    with pytest.raises(Problem, match="NUL"):
        await terminal.execute("a\0b", 1)
