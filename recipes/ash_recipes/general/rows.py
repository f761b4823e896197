"""Changes to the rows of a text, as pure functions. Rows count from 0; every row but the last ends with a newline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ash_recipes.runner.problems import Problem

__all__ = ["Change", "delete", "insert", "split", "terminated", "update"]


@dataclass(frozen=True, slots=True)
class Change:
    text: str
    rows: list[int]
    """Which rows were touched, by their numbers before the change."""


def split(text: str) -> list[str]:
    """Return the rows of `text` with their newlines. Only a newline ends a row, as in every editor."""
    rows = text.split("\n")
    return [row + "\n" for row in rows[:-1]] + ([rows[-1]] if rows[-1] else [])


def terminated(text: str) -> str:
    """Return `text` with a newline at its end, unless it is empty."""
    return text if not text or text.endswith("\n") else text + "\n"


def wanted(row: int | None, rows: Sequence[int] | None) -> list[int] | None:
    """Return the rows that a call names, without repetition; None when it names none.

    Raises:
        Problem: Both arguments are given, or a number is negative.
    """
    if row is not None and rows is not None:
        raise Problem("bad_request", "give either row or rows, not both")
    named = [row] if row is not None else rows
    if named is None:
        return None
    if any(number < 0 for number in named):
        raise Problem("bad_request", "row numbers start at 0")
    return sorted(set(named))


def insert(text: str, content: str, at: Sequence[int] | None) -> Change:
    """Put `content` before each of the rows; behind the end, empty rows fill the gap. None appends it."""
    lines = split(terminated(text))
    new = split(terminated(content))
    if at is None:
        return Change("".join([*lines, *new]), [len(lines)])
    for number in sorted(at, reverse=True):
        lines += ["\n"] * (number - len(lines))
        lines[number:number] = new
    return Change("".join(lines), list(at))


def delete(text: str, at: Sequence[int] | None, substring: str | None) -> Change:
    """Remove rows, or `substring` from rows; None means every row."""
    lines = split(text)
    if substring is not None:
        return _replace(lines, at, substring, "")
    touched = _existing(lines, at)
    gone = set(touched)
    return Change("".join(line for number, line in enumerate(lines) if number not in gone), touched)


def update(text: str, content: str, at: Sequence[int] | None, substring: str | None) -> Change:
    """Replace rows by `content`, or `substring` in rows by it; None means every row.

    Several rows that are replaced by as many rows of content get one each; otherwise each gets all of it.
    """
    lines = split(text)
    if substring is not None:
        return _replace(lines, at, substring, content)
    if at is None:
        return Change(content, list(range(len(lines))))
    touched = _existing(lines, at)
    new = split(terminated(content))
    one_each = len(new) == len(touched) > 1
    for place, number in enumerate(touched):
        lines[number] = new[place] if one_each else terminated(content) or "\n"
    return Change("".join(lines), touched)


def _existing(lines: list[str], at: Sequence[int] | None) -> list[int]:
    if at is None:
        return list(range(len(lines)))
    found = [number for number in at if number < len(lines)]
    if not found and at:
        raise Problem("bad_request", f"row {at[0]} is out of range: the file has {len(lines)} lines")
    return found


def _replace(lines: list[str], at: Sequence[int] | None, old: str, new: str) -> Change:
    if not old:
        raise Problem("bad_request", "substring is empty; leave it out to change whole rows")
    if at is None and "\n" in old:
        text = "".join(lines)
        first = text.count("\n", 0, text.find(old))
        return Change(text.replace(old, new), [first] if old in text else [])
    touched: list[int] = []
    for number in _existing(lines, at):
        if old in lines[number]:
            ended = lines[number].endswith("\n")
            lines[number] = lines[number].replace(old, new)
            if ended and not lines[number].endswith("\n"):
                lines[number] += "\n"
            touched.append(number)
    return Change("".join(lines), touched)
