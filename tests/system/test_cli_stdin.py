"""`ash exec` and its standard input: passed on when that is asked for, and otherwise left alone."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from ash_mcp.sync import Hive
from tests.hive_process import ASH

pytestmark = pytest.mark.heavy

SECONDS: Final = 60


@pytest.fixture(scope="module")
def session(hive_url: str) -> Iterator[str]:
    with Hive(hive_url) as hive, hive.spawn("echo", session="stdin") as box:
        yield box.session


@pytest.fixture(autouse=True)
def _at_the_hive(hive_url: str, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("ASH_URL", hive_url)
    for name in ("ASH_TOKEN", "ASH_SCOPE"):
        monkeypatch.delenv(name, raising=False)


def run(
    *words: str, stdin: int | None = None, input: bytes | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(words, stdin=stdin, input=input, cwd=cwd, capture_output=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize("options", [("--json",), ()], ids=["json", "plain"])
def test_a_stdin_that_never_ends_holds_nothing_up(session: str, options: tuple[str, ...]) -> None:
    reads, writes = os.pipe()
    try:
        done = run(*ASH, "exec", *options, session, "--", "cat; echo done", stdin=reads)
    finally:
        os.close(reads)
        os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (json.loads(done.stdout)["stdout"] if options else done.stdout.decode()) == "done\n"


@pytest.mark.parametrize("source", ["pipe", "file"])
def test_a_loop_keeps_its_input(session: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\ntwo\nthree\n")
    ash = shlex.join((*ASH, "exec", session))
    loop = f'while read line; do {ash} -- echo "$line"; done'
    script = f"cat lines | {loop}" if source == "pipe" else f"{loop} < lines"
    done = run("bash", "-c", script, cwd=tmp_path)
    assert done.stdout == b"one\ntwo\nthree\n"
    assert source == "pipe" or done.stderr == b""  # a file that is read already is not meant for the command


@pytest.mark.parametrize("option", ["-i", "--stdin"])
def test_input_is_passed_on_when_that_is_asked_for(session: str, option: str) -> None:
    done = run(*ASH, "exec", option, session, "--", "cat", input=b"data")
    assert (done.stdout, done.stderr) == (b"data", b"")
    done = run(*ASH, "exec", option, "--json", session, "--", "cat", input=b"data")
    assert (json.loads(done.stdout)["stdout"], done.stderr) == ("data", b"")


def test_input_that_was_not_passed_on_is_told_unless_that_is_unwanted(session: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"data")
    words = (*ASH, "exec", session, "--", "cat")
    for script in ("printf data | {}", "{} < data"):
        done = run("bash", "-c", script.format(shlex.join(words)), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, b"")
        assert done.stderr == b"ash: what came on standard input was not passed on; -i passes it, -n omits this line\n"
    quiet: list[tuple[tuple[str, ...], bytes]] = [(("-n",), b"data"), (("--no-stdin",), b"data"), ((), b"")]
    for options, data in quiet:
        assert run(*ASH, "exec", *options, session, "--", "cat", input=data).stderr == b""
    assert run(*ASH, "exec", "--json", session, "--", "cat", input=b"data").stderr == b""


def test_a_command_without_any_stdin_here_has_none_there(session: str) -> None:
    for option in ("-i", "-n"):
        done = run("bash", "-c", f"{shlex.join((*ASH, 'exec', option, session, '--', 'cat; echo done'))} <&-")
        assert (done.returncode, done.stdout) == (0, b"done\n")
