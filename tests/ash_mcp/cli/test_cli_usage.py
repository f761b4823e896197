"""The `ash` command answers at once, and says what to do when it cannot do what it was told."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ash_mcp import __version__
from ash_mcp.cli import main

NOBODY = "http://127.0.0.1:9/mcp"
COMMANDS = "up spawn list tools call exec cp logs extend network share destroy doctor config".split()

BAD_INPUTS: dict[str, tuple[list[str], str]] = {
    "an unknown command": (["spwan"], "No such command"),
    "an unknown option": (["list", "--colour"], "No such option"),
    "a bad URL": (["list", "--url", "ftp://x"], "is not the URL of a hive"),
    "a bad scope": (["list", "--scope", "a b"], "cannot be a scope"),
    "a bad label to list by": (["list", "--label", "x"], "write KEY=VALUE"),
    "a bad variable": (["spawn", "--env", "1=2"], "cannot be the name of a variable"),
    "a bad life": (["spawn", "--ttl", "soon"], "write 90s, 10m"),
    "no life": (["spawn", "--idle", "0s"], "write 90s, 10m"),
    "a bad port": (["spawn", "--port", "70000"], "less than or equal to 65535"),
    "a bad network": (["spawn", "--network", ","], "write none, internet"),
    "no session": (["tools"], "Missing argument"),
    "no tool": (["call", "sb1"], "Missing argument"),
    "arguments that are no JSON": (["call", "sb1", "echo", "--json", "{"], "is not JSON"),
    "arguments that are no object": (["call", "sb1", "echo", "--json", "[]"], "are a JSON object"),
    "arguments in two ways": (["call", "sb1", "echo", "a=1", "--json", "{}"], "not both"),
    "an unknown output": (["call", "sb1", "echo", "--output", "xml"], "xml"),
    "no command": (["exec", "sb1"], "put it after --"),
    "an empty command": (["exec", "sb1", "--", ""], "put it after --"),
    "a bad timeout": (["exec", "sb1", "--timeout", "x", "--", "true"], "write 90s, 10m"),
    "an option of the command before --": (["exec", "sb1", "ls", "-l"], "-l"),
    "a copy from here to here": (["cp", "a", "b"], "one side is in a sandbox"),
    "a copy between sandboxes": (["cp", "sb1:a", "sb2:b"], "one side is in a sandbox"),
    "a copy of nothing": (["cp", "/nonexistent/x", "sb1:a"], "is not there"),
    "a copy of a directory": (["cp", "/usr", "sb1:a"], "say -r"),
    "a copy to nowhere": (["cp", "sb1:a", "/nonexistent/x/y"], "there is no directory"),
    "a bad tail": (["logs", "sb1", "--tail", "0"], "greater than or equal to 1"),
    "a stream of JSON logs": (["logs", "sb1", "--follow", "--json"], "leave"),
    "a bad extension": (["extend", "sb1", "later"], "write 90s, 10m"),
    "a network of nothing": (["network", "sb1", "a.test", ""], "write none, internet, or domains"),
    "no network": (["network", "sb1"], "Missing argument"),
    "a bad share's life": (["share", "new", "sb1", "--ttl", "soon"], "write 90s, 10m"),
    "a bad port to share": (["share", "new", "sb1", "--port", "0"], "greater than or equal to 1"),
    "nothing to revoke": (["share", "revoke", "sb1"], "say --all"),
    "too much to revoke": (["share", "revoke", "sb1", "x", "--all"], "one of the two"),
    "nothing to destroy": (["destroy"], "say --all"),
    "too much to destroy": (["destroy", "sb1", "--all"], "one of the three"),
    "an unknown host": (["config", "emacs"], "there are: claude-code"),
}


def ash(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, said.out, said.err


def test_the_version_is_printed_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ash(capsys, "--version")
    assert code == 0 and out == f"ash {__version__}\n"


@pytest.mark.parametrize(("words", "says"), BAD_INPUTS.values(), ids=list(BAD_INPUTS))
def test_bad_input_is_a_usage_error_that_says_what_to_do(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASH_URL", NOBODY)  # to ask a hive would end in 1, not in 2
    code, out, err = ash(capsys, *words)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ["spawn"],
        ["list"],
        ["tools", "sb1"],
        ["call", "sb1", "echo"],
        ["exec", "sb1", "--", "true"],
        ["cp", "sb1:a", "x"],
        ["logs", "sb1"],
        ["extend", "sb1", "1h"],
        ["network", "sb1", "pypi.org", "*.pypi.org"],
        ["share", "new", "sb1"],
        ["share", "list", "sb1"],
        ["share", "revoke", "sb1", "--all"],
        ["destroy", "sb1"],
    ],
    ids=" ".join,
)
def test_without_a_hive_every_command_says_how_to_start_one(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASH_URL", NOBODY)
    monkeypatch.setattr("ash_mcp._retry.TRANSPORT_ATTEMPTS", 1)
    code, out, err = ash(capsys, *words)
    assert (code, out) == (1, "")
    assert err.startswith("ash: no hive answers at") and "ash up" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_with_json_a_failure_is_json_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ash_mcp._retry.TRANSPORT_ATTEMPTS", 1)
    monkeypatch.setenv("ASH_URL", "http://127.0.0.1:10/mcp")  # so that what --url puts there is taken away again
    code, out, err = ash(capsys, "--url", NOBODY, "list", "--json")
    assert (code, out) == (1, "")
    failure = json.loads(err)["error"]
    assert failure["kind"] == "connect_failed" and NOBODY in failure["message"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ash(capsys, "--help")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line.split()[0] in COMMANDS] == (
        COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ash(capsys, command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: ash {command}")


def test_help_imports_nothing_heavy() -> None:
    program = """
import sys
from ash_mcp import __version__
from ash_mcp.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"rich", "httpx", "mcp", "pydantic", "uvicorn", "ash_hub", "ash_router", "ash_mcp.client", "asyncio"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stderr.strip() == "[]"


def test_a_command_that_speaks_http_does_not_import_what_httpx_alone_would() -> None:
    program = f"""
import sys
from ash_mcp.cli import main
sys.argv = ["ash", "--url", "{NOBODY}", "list"]
try:
    main()
except SystemExit:
    pass
loaded = {{name for name, module in sys.modules.items() if module is not None}}
print(sorted({{"httpx", "httpx._main", "pygments", "trio"}} & loaded))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "['httpx']", done.stderr


def processor_seconds(*words: str) -> float:
    """Return what running Python so takes at best of four, however busy the machine is."""
    took: list[float] = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True, timeout=30)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)


def test_help_costs_at_most_three_times_what_its_library_costs_to_import() -> None:
    # 0.13 s beside 0.056 s where this was written: a slow machine is slow at both.
    assert processor_seconds("-m", "ash_mcp.cli", "--help") < 3 * processor_seconds("-c", "import typer.main")


def test_a_command_of_a_part_that_is_not_installed_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ash_mcp.cli.app._installed", lambda: ())
    code, out, err = ash(capsys, "up")
    assert (code, out) == (1, "")
    assert "pip install 'ash-mcp[all]'" in err
