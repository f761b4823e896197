"""The `ash` command against a real hive: what it prints, what it returns, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from ash_mcp.cli import main
from ash_mcp.sync import Hive

ASH: Final = (sys.executable, "-m", "ash_mcp.cli")
SECONDS: Final = 30


@pytest.fixture(autouse=True)
def _at_the_hive(hive_url: str, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("ASH_URL", hive_url)
    monkeypatch.setenv("ASH_SCOPE", "cli")  # apart from the other tests on this hive
    monkeypatch.delenv("ASH_TOKEN", raising=False)


class Shell:
    """Runs `ash` in this process, which is quick, or in one of its own where its streams and signals matter."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def ash(self, *words: str, code: int = 0) -> str:
        """Run a command and return its output; its exit code must be `code`."""
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(words)
        out, self.err = self._capfd.readouterr()
        assert left.value.code == code, self.err
        return out

    def json(self, *words: str) -> Any:
        out = self.ash(*words)
        assert self.err == ""
        return json.loads(out)


def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run((*ASH, *words), input=stdin, capture_output=True, timeout=SECONDS, check=False)


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capfd)


@pytest.fixture(scope="module")
def session(hive_url: str) -> Iterator[str]:
    """A sandbox that several tests share."""
    env = {**os.environ, "ASH_URL": hive_url, "ASH_SCOPE": "cli", "KEY": "hunter2"}

    def ash(*words: str) -> None:
        subprocess.run((*ASH, *words), env=env, check=True, capture_output=True, timeout=SECONDS)

    ash("spawn", "echo", "--session", "shared", "--env", "WHO=you", "--secret", "KEY", "--label", "of=tests")
    yield "shared"
    ash("destroy", "shared")


def test_a_sandbox_lives_from_spawn_to_destroy(shell: Shell) -> None:
    made = shell.json("spawn", "echo", "--session", "mine", "--ttl", "10m", "--label", "k=v", "--json")
    assert (made["session"], made["status"], made["labels"]) == ("mine", "ready", {"k": "v"})
    assert {tool["name"] for tool in made["tools"]} >= {"echo", "whoami"}

    listed = shell.json("list", "--label", "k=v", "--json")["sandboxes"]
    assert [one["sandbox_id"] for one in listed] == [made["sandbox_id"]]

    longer = shell.json("extend", "mine", "2h", "--json")
    assert longer["expires_at"] > made["expires_at"]
    assert made["network"] == shell.json("network", "mine", "none", "--json")["network"] == "none"

    ended = shell.json("destroy", "mine", "--json")
    assert [one["session"] for one in ended["destroyed"]] == ["mine"]
    assert shell.json("list", "--label", "k=v", "--json") == {"sandboxes": []}
    [gone] = shell.json("list", "--label", "k=v", "--all", "--json")["sandboxes"]
    assert (gone["status"], gone["reason"], gone["cause"]) == ("gone", "destroyed", "agent")

    shell.ash("exec", "mine", "--", "true", code=1)
    assert "has ended (destroyed)" in shell.err


def test_several_are_spawned_in_a_run_and_ended_with_it(shell: Shell) -> None:
    with Hive(scope="cli") as hive:
        hive.run("shell", lease_seconds=60).open()
    made = shell.json("spawn", "--count", "2", "--run", "shell", "--json")
    assert [info["run"] for info in made["made"]] == ["shell", "shell"] and made["failed"] == []
    listed = shell.json("list", "--run", "shell", "--json")
    assert sorted(info["session"] for info in listed["sandboxes"]) == sorted(it["session"] for it in made["made"])
    assert "RUN" in shell.ash("list") and "shell" in shell.ash("list")
    assert len(shell.json("destroy", "--run", "shell", "--json")["destroyed"]) == 2
    assert shell.json("list", "--run", "shell", "--json") == {"sandboxes": []}
    shell.ash("destroy", "--run", "nonsense", code=1)
    assert "no open run 'nonsense'" in shell.err
    shell.ash("spawn", "--count", "2", "--session", "one", code=2)
    shell.ash("destroy", "--run", "shell", "--all", code=2)


def test_a_sandbox_is_shared_and_taken_back(shell: Shell) -> None:
    shell.ash("spawn", "echo", "--session", "lent")
    lines = shell.ash("share", "new", "lent", "--tool", "echo", "--ttl", "1h").splitlines()
    assert [line.split()[0] for line in lines] == ["url", "token"] and "opens echo until" in shell.err
    whole = shell.json("share", "new", "lent", "--json")
    assert whole["token"].startswith(f"ashs_{whole['share_id']}_") and "whoami" in whole["tool_names"]
    listed = shell.json("share", "list", "lent", "--json")["shares"]
    assert [share["tool_names"] for share in listed] == [["echo"], whole["tool_names"]]
    assert "token" not in json.dumps(listed) and whole["share_id"] in shell.ash("share", "list", "lent")
    assert shell.ash("share", "revoke", "lent", whole["share_id"]) == f"Revoked {whole['share_id']}\n"
    shell.ash("share", "revoke", "lent", "nobody", code=1)
    assert "no share nobody" in shell.err
    shell.ash("share", "revoke", "lent", "--all")
    assert shell.ash("share", "list", "lent") == "" and "No shares" in shell.err
    shell.ash("share", "new", "lent", "--tool", "nothing", code=1)
    assert "lists no tool 'nothing'" in shell.err
    shell.ash("destroy", "lent")


def test_people_get_words_and_tables(shell: Shell) -> None:
    said = shell.ash("spawn", "echo", "--session", "words")
    assert "words is ready: echo" in said and "whoami" in said
    table = shell.ash("list", "--all")
    assert table.split()[:2] == ["SESSION", "STATUS"] and "words" in table and "ready" in table
    assert "lives until" in shell.ash("extend", "words", "1h")
    assert "Its network: none" in said and shell.ash("network", "words", "none") == "words has network: none\n"
    assert "Ended words" in shell.ash("destroy", "words")
    assert "had ended before: destroyed" in shell.ash("destroy", "words")
    assert "destroyed (agent)" in " ".join(shell.ash("list", "--all").split())
    shell.ash("destroy", "nobody", code=1)
    assert "no sandbox nobody" in shell.err and "ash list" in shell.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["spawn", "nosuch"], "there are:"),
        (["spawn", "--session", "Bad!"], "lower-case letter"),
        (["spawn", "echo", "--session", "list"], "own tool names"),
        (["spawn", "echo", "--ttl", "9999d"], "at most"),
        (["tools", "nobody"], "no sandbox 'nobody'"),
        (["logs", "nobody"], "no sandbox 'nobody'"),
        (["extend", "nobody", "1h"], "nobody"),
        (["network", "nobody", "none"], "nobody"),
        (["exec", "nobody", "--", "true"], "no sandbox 'nobody'"),
        (["cp", "nobody:a", "x"], "no sandbox 'nobody'"),
    ],
    ids=["recipe", "name", "reserved", "life", "tools", "logs", "extend", "network", "exec", "cp"],
)
def test_what_the_hive_refuses_is_said_in_one_line_and_leaves_nothing(
    words: list[str], says: str, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASH_SCOPE", "refused")
    assert shell.ash(*words, code=1) == ""
    assert says in shell.err and shell.err.startswith("ash: ") and "Traceback" not in shell.err
    assert shell.json("list", "--json") == {"sandboxes": []}
    assert list(tmp_path.iterdir()) == []


def test_a_tool_is_called_with_arguments_typed_by_its_schema(shell: Shell, session: str) -> None:
    assert "[steps=…]" in shell.ash("tools", session)
    assert json.loads(shell.ash("call", session, "echo", "text=5")) == {"text": "5"}
    assert json.loads(shell.ash("call", session, "slow", "steps=2", "seconds=0")) == {"steps": 2}
    assert json.loads(shell.ash("call", session, "echo", "--json", '{"text": "a=b"}')) == {"text": "a=b"}
    assert json.loads(shell.ash("call", session, "whoami")) == {"who": "you"}
    raw = shell.json("call", session, "echo", "text=x", "--output", "json")
    assert raw["structuredContent"] == {"text": "x"} and raw["isError"] is False

    shell.ash("call", session, "echo", code=2)
    assert "echo needs text=…" in shell.err
    shell.ash("call", session, "slow", "steps=many", code=2)
    assert "not of type integer" in shell.err
    shell.ash("call", session, "slow", "steps=-1", code=1)
    shell.ash("call", session, "nosuch", code=1)
    shell.ash("tools", session, "nosuch", code=2)


def test_a_command_has_its_streams_and_its_exit_code(shell: Shell, session: str) -> None:
    assert shell.ash("exec", session, "--", "echo out; echo err >&2; exit 3", code=3) == "out\n"
    assert shell.err == "err\n"
    assert shell.ash("exec", session, "--", "printf", "%s|", "a b", "$HOME") == "a b|$HOME|"
    assert shell.ash("exec", session, "-e", "A=b", "--cwd", "/tmp", "--", "echo $A $WHO $KEY; pwd") == (
        "b you hunter2\n/tmp\n"
    )
    shell.ash("exec", session, "--timeout", "0.2s", "--", "sleep 30", code=124)
    shell.ash("exec", session, "--", "kill -9 $$", code=137)
    shell.ash("exec", session, "--", "nosuch", "program", code=1)
    assert "nosuch" in shell.err


def test_bytes_pass_through_a_command_unchanged(session: str) -> None:
    data = bytes(range(256)) * 8192
    done = run("exec", "-i", session, "--", "cat", stdin=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data


def test_a_command_that_reads_no_input_ends_all_the_same(session: str) -> None:
    words = ("exec", "--stdin", session, "--", "echo done")
    with subprocess.Popen((*ASH, *words), stdin=subprocess.PIPE, stdout=-1) as process:
        assert process.stdout is not None
        assert process.wait(SECONDS) == 0  # its stdin is still open here
        assert process.stdout.read() == b"done\n"


def test_exec_with_json_prints_the_whole_result(shell: Shell, session: str) -> None:
    out = json.loads(shell.ash("exec", session, "--json", "--", "echo hi; exit 4", code=4))
    assert (out["exit_code"], out["stdout"], out["timed_out"]) == (4, "hi\n", False)


def test_ctrl_c_interrupts_the_command_and_all_that_it_started(session: str) -> None:
    line = "trap 'echo caught; exit 7' INT; echo ready; sleep 301"
    with subprocess.Popen((*ASH, "exec", session, "--", line), stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 130
        assert out == b"caught\n"
    running = run("exec", session, "--", "cat /proc/[0-9]*/comm").stdout.split()
    assert b"cat" in running and b"sleep" not in running


def test_a_reader_that_leaves_ends_the_command(session: str) -> None:
    with subprocess.Popen((*ASH, "exec", session, "--", "yes"), stdin=subprocess.DEVNULL, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE


def test_files_go_in_and_come_out_as_they_were(shell: Shell, session: str, tmp_path: Path) -> None:
    data = os.urandom(700_000)
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "data").write_bytes(data)
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "run.sh").chmod(0o755)
    (tree / "nothing").touch(mode=0o600)
    (tree / "link").symlink_to("run.sh")
    (tree / "out").symlink_to("/etc/passwd")

    shell.ash("cp", "-r", str(tree), f"{session}:copied")
    assert "left out" in shell.err and "out: a link out of the directory" in shell.err
    assert shell.ash("exec", session, "--", "copied/run.sh") == "ran\n"

    tally = shell.json("cp", "-r", f"{session}:copied", str(tmp_path / "back"), "--json")
    assert (tally["files"], tally["skipped"]) == (4, [])
    back = tmp_path / "back"
    assert os.readlink(back / "link") == "run.sh"
    assert (back / "sub" / "data").read_bytes() == data
    assert (back / "nothing").read_bytes() == b""
    assert (back / "sub" / "empty").is_dir()
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in back.iterdir() if path.is_file() and not path.is_symlink()
    }
    assert modes == {"run.sh": 0o755, "nothing": 0o600}

    shell.ash("cp", f"{session}:copied/run.sh", f"{tmp_path}/")
    assert (tmp_path / "run.sh").read_text() == "#!/bin/sh\necho ran\n"
    shell.ash("cp", str(tree / "run.sh"), f"{session}:copied/sub")
    assert shell.ash("exec", session, "--", "ls copied/sub") == "data\nempty\nrun.sh\n"


def test_a_copy_that_cannot_be_made_leaves_nothing_here(shell: Shell, session: str, tmp_path: Path) -> None:
    shell.ash("cp", f"{session}:nosuch", f"{tmp_path}/", code=1)
    assert "nosuch" in shell.err
    shell.ash("cp", f"{session}:/etc", str(tmp_path / "etc"), code=1)
    assert "say -r" in shell.err
    shell.ash("cp", f"{session}:/proc/1/mem", str(tmp_path / "mem"), code=1)
    assert list(tmp_path.iterdir()) == []


def test_logs_show_the_main_process_and_following_them_ends_with_the_sandbox(shell: Shell) -> None:
    shell.ash("spawn", "echo", "--session", "logged")
    assert "serving recipe echo" in shell.json("logs", "logged", "--json")["log"]
    with subprocess.Popen((*ASH, "logs", "logged", "-f"), stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert b"serving recipe" in process.stdout.readline()
        shell.ash("destroy", "logged")
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert b"has ended (destroyed)" in err


def test_watching_prints_a_line_of_json_for_each_change(shell: Shell) -> None:
    with subprocess.Popen((*ASH, "list", "--watch", "--json", "--label", "seen=yes"), stdout=-1) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"sandboxes": []}
        shell.ash("spawn", "echo", "--session", "seen", "--label", "seen=yes")
        [one] = json.loads(process.stdout.readline())["sandboxes"]
        assert one["session"] == "seen"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
    shell.ash("destroy", "seen")


def test_destroy_all_ends_what_is_in_the_scope_and_nothing_else(
    shell: Shell, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASH_SCOPE", "other")
    shell.ash("spawn", "echo", "--session", "one")
    assert shell.ash("destroy", "--all").count("Ended") == 1
    assert shell.ash("destroy", "--all") == "No sandboxes to end\n"
    everywhere = shell.json("list", "--scope", "*", "--json")["sandboxes"]
    assert session in [one["session"] for one in everywhere]
