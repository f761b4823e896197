"""What people type at `ash` is read as they mean it, and refused with words that say what to write."""

from __future__ import annotations

import pytest
import typer

from ash_mcp.cli.lifecycle import new_part
from ash_mcp.cli.output import clean
from ash_mcp.cli.values import (
    Place,
    one_command,
    read_duration,
    read_network,
    read_pairs,
    read_place,
    shown_duration,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172_800), ("1.5h", 5400), ("45", 45), (" 1D2H ", 93_600)],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10x", "-5m", "1m1h", "0s", "0", "inf", "nan", "1e9s", "m"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write 90s, 10m, 1h30m or 2d"):
        read_duration(text)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0s"), (45, "45s"), (5400, "1h 30m"), (187_201, "2d 4h"), (-3, "0s")]
)
def test_a_duration_is_shown_by_its_two_largest_units(seconds: float, shown: str) -> None:
    assert shown_duration(seconds) == shown


def test_pairs_keep_everything_after_the_first_equals_sign() -> None:
    assert read_pairs(["A=1", "B=x=y", "C="], "a variable", variables=True) == {"A": "1", "B": "x=y", "C": ""}


@pytest.mark.parametrize(
    ("word", "says"), [("A", "KEY=VALUE"), ("=x", "KEY=VALUE"), ("1A=x", "name of a variable"), ("a-b=x", "variable")]
)
def test_a_word_that_is_no_pair_is_refused(word: str, says: str) -> None:
    with pytest.raises(typer.BadParameter, match=says):
        read_pairs([word], "a variable", variables=True)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="twice"):
        read_pairs(["A=1", "A=2"], "a label")


def test_a_network_is_a_policy_or_domains() -> None:
    assert read_network("none") == "none"
    assert read_network("internet") == "internet"
    assert read_network("code.test, *.example.com") == ["code.test", "*.example.com"]
    with pytest.raises(typer.BadParameter, match="domains with commas"):
        read_network("code.test,,x")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sb1:/etc/passwd", Place("sb1", "/etc/passwd")),
        ("sb1:", Place("sb1", ".")),
        ("sb1:a:b", Place("sb1", "a:b")),
        ("sbx-" + "a" * 24 + ":x", Place("sbx-" + "a" * 24, "x")),
        ("./a:b", Place(None, "./a:b")),
        ("/tmp/x", Place(None, "/tmp/x")),
        ("C:/x", Place(None, "C:/x")),
        ("list:x", Place(None, "list:x")),
        ("x" * 17 + ":y", Place(None, "x" * 17 + ":y")),
    ],
)
def test_a_place_is_in_a_sandbox_when_a_session_stands_before_its_colon(text: str, place: Place) -> None:
    assert read_place(text) == place


@pytest.mark.parametrize(("path", "wants"), [("a/", True), (".", True), ("..", True), ("a/..", True), ("a", False)])
def test_a_path_that_names_no_file_means_a_directory_to_copy_into(path: str, wants: bool) -> None:
    assert Place("sb1", path).wants_directory is wants


def test_one_word_is_a_line_for_bash_and_several_are_a_program() -> None:
    assert one_command(["echo hi | wc"]) == "echo hi | wc"
    assert one_command(["echo", "a b"]) == ["echo", "a b"]
    for nothing in ([], [""], [" "]):
        with pytest.raises(typer.BadParameter, match="after --"):
            one_command(nothing)


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("", "abc", "abc"),
        ("abc", "abc", ""),
        ("abc", "abcdef", "def"),
        ("abcdef", "defghi", "ghi"),
        ("x\n" * 100, "x\n" * 100, ""),
        ("a" * 200 + "b", "a" * 100 + "bcd", "cd"),
        ("abc", "xyz", "xyz"),
        ("abc", "", ""),
    ],
)
def test_following_a_log_prints_what_is_new_and_only_that(before: str, now: str, new: str) -> None:
    assert new_part(before, now) == new


def test_words_of_a_sandbox_cannot_command_the_terminal() -> None:
    assert clean("a\x1b[2Jb\r\u202ec\td\n") == "a\ufffd[2Jb\ufffd\ufffdc\td\n"
