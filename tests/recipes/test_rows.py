"""Edits of rows, as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_recipes.general.rows import delete, insert, split, update, wanted
from ash_recipes.runner.problems import Problem

TEXT = "zero\none\ntwo\n"


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ([0], "new\nzero\none\ntwo\n"),
        ([1, 2], "zero\nnew\none\nnew\ntwo\n"),
        ([3], "zero\none\ntwo\nnew\n"),
        ([5], "zero\none\ntwo\n\n\nnew\n"),
        (None, "zero\none\ntwo\nnew\n"),
    ],
)
def test_rows_are_inserted_before(at: list[int] | None, expected: str) -> None:
    assert insert(TEXT, "new", at).text == expected


def test_a_row_without_its_newline_gets_one_before_something_follows() -> None:
    assert insert("a", "b", None).text == "a\nb\n"


@pytest.mark.parametrize(
    ("at", "substring", "expected"),
    [
        ([1], None, "zero\ntwo\n"),
        ([0, 2, 9], None, "one\n"),
        (None, None, ""),
        (None, "o", "zer\nne\ntw\n"),
        ([1, 2], "o", "zero\nne\ntw\n"),
        ([1], "one\n", "zero\n\ntwo\n"),
        (None, "o\none", "zer\ntwo\n"),
    ],
)
def test_rows_or_parts_of_them_are_deleted(at: list[int] | None, substring: str | None, expected: str) -> None:
    assert delete(TEXT, at, substring).text == expected


@pytest.mark.parametrize(
    ("content", "at", "substring", "expected"),
    [
        ("new", [1], None, "zero\nnew\ntwo\n"),
        ("a\nb", [1], None, "zero\na\nb\ntwo\n"),
        ("a\nb", [0, 2], None, "a\none\nb\n"),
        ("", [1], None, "zero\n\ntwo\n"),
        ("all", None, None, "all"),
        ("0", None, "o", "zer0\n0ne\ntw0\n"),
        ("", [2], "two", "zero\none\n\n"),
    ],
)
def test_rows_or_parts_of_them_are_replaced(
    content: str, at: list[int] | None, substring: str | None, expected: str
) -> None:
    assert update(TEXT, content, at, substring).text == expected


def test_only_a_newline_ends_a_row() -> None:
    assert split("a\r\nb\u2028c\x0bd\ne") == ["a\r\n", "b\u2028c\x0bd\n", "e"]


def test_a_row_that_is_not_there_is_told() -> None:
    with pytest.raises(Problem, match="row 3 is out of range: the file has 3 lines"):
        delete(TEXT, [3], None)
    with pytest.raises(Problem, match="out of range"):
        update(TEXT, "x", [7, 8], None)


def test_a_substring_that_is_not_there_changes_nothing() -> None:
    change = update(TEXT, "x", None, "absent")
    assert (change.text, change.rows) == (TEXT, [])


def test_rows_are_named_once_and_in_one_way() -> None:
    assert (wanted(2, None), wanted(None, [3, 1, 3]), wanted(None, None)) == ([2], [1, 3], None)
    for row, rows, words in ((1, [2], "either row or rows"), (-1, None, "start at 0"), (None, [0, -2], "start at 0")):
        with pytest.raises(Problem, match=words):
            wanted(row, rows)


@given(st.text(alphabet="ab\n\r", max_size=40), st.integers(0, 12), st.text(alphabet="xy\n", min_size=1, max_size=9))
def test_what_was_inserted_can_be_deleted(text: str, row: int, content: str) -> None:
    before = split(insert(text, "", [0]).text)
    row = min(row, len(before))
    after = insert(text, content, [row]).text
    new = range(row, row + len(split(content)))
    assert split(delete(after, list(new), None).text) == before
