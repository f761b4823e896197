"""Secrets come from the environment or standard input, and never from the command line."""

from __future__ import annotations

import io

import pytest
import typer

from ash_mcp.cli import main
from ash_mcp.cli.secrets import read_secrets


def test_the_environment_goes_before_standard_input() -> None:
    asked: list[str] = []

    def ask(name: str) -> str:
        asked.append(name)
        return f"typed {name}"

    read = read_secrets(["A", "B", "A"], environ={"A": "set"}, ask=ask)
    assert read == {"A": "set", "B": "typed B"}
    assert asked == ["B"]


def test_each_missing_name_takes_a_line_of_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\r\n two \n"))
    assert read_secrets(["A", "B"], environ={}) == {"A": "one", "B": " two "}


def test_a_secret_without_a_value_is_refused_before_anything_is_made() -> None:
    with pytest.raises(typer.BadParameter, match="set the environment variable KEY"):
        read_secrets(["KEY"], environ={}, ask=lambda _: None)


def test_an_empty_variable_is_a_value() -> None:
    assert read_secrets(["A"], environ={"A": ""}, ask=lambda _: None) == {"A": ""}


@pytest.mark.parametrize("word", ["KEY=hunter2", "hunter2!", "", "KEY hunter2"])
def test_a_value_on_the_command_line_is_refused_and_not_repeated(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASH_URL", "http://127.0.0.1:9/mcp")
    with pytest.raises(SystemExit) as left:
        main(["spawn", "--secret", word])
    said = capsys.readouterr()
    assert left.value.code == 2
    assert "Put the value in that variable" in " ".join(said.err.split())
    assert "hunter2" not in said.out + said.err
