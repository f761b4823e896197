"""Patches as models write them, as data, and what becomes of a text by one. No I/O.

Two forms are read: unified diffs, as git makes them, and the envelope in which many models are trained:

    *** Begin Patch
    *** Update File: src/a.py
    @@ def main():
     unchanged
    -old
    +new
    *** Add File: b.txt
    +text
    *** Delete File: c.txt
    *** End Patch

Line numbers are hints: a hunk belongs where its lines are. White space at the ends of lines, and then before them, is
not compared where nothing else fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Change", "Hunk", "PatchProblem", "applied", "parse"]

_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")
_FILE = re.compile(r"\*\*\* (Add|Update|Delete) File: (.+)")
_SAME: tuple[Callable[[str], str], ...] = (lambda line: line, str.rstrip, str.strip)


class PatchProblem(ValueError):
    """A patch cannot be read, or does not fit; the message says where and what to do."""


@dataclass(slots=True)
class Hunk:
    """Lines that stand next to each other: `old` as they are, `new` as they shall be."""

    old: list[str] = field(default_factory=list[str])
    new: list[str] = field(default_factory=list[str])
    after: str | None = None
    """A line that stands before it."""
    line: int | None = None
    """Where it is said to begin, from 0 on."""


@dataclass(slots=True)
class Change:
    """What a patch does to one file."""

    path: str
    kind: Literal["add", "update", "delete"]
    hunks: list[Hunk] = field(default_factory=list[Hunk])
    move_to: str | None = None


def parse(text: str) -> list[Change]:
    """Read a patch.

    Raises:
        PatchProblem: It is none.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    is_envelope = any(line.strip() == "*** Begin Patch" for line in lines)
    changes = _envelope(lines) if is_envelope else _unified(lines)
    if not changes:
        raise PatchProblem("no file is named: begin with `*** Begin Patch`, or with the --- and +++ of a unified diff")
    return changes


def _envelope(lines: Sequence[str]) -> list[Change]:
    found: list[Change] = []
    for number, line in enumerate(lines, 1):
        if line.strip() in ("*** Begin Patch", "*** End of File"):
            continue
        if line.strip() == "*** End Patch":
            break
        if match := _FILE.fullmatch(line.rstrip()):
            kind: dict[str, Literal["add", "update", "delete"]] = {
                "Add": "add",
                "Update": "update",
                "Delete": "delete",
            }
            found.append(Change(match[2].strip(), kind[match[1]]))
        elif not found:
            if line.strip():
                raise PatchProblem(f"line {number} of the patch stands before the first `*** … File:`: {line!r}")
        elif line.startswith("*** Move to: "):
            found[-1].move_to = line.removeprefix("*** Move to: ").strip()
        elif line.startswith("@@"):
            where = _HUNK.match(line)
            after = None if where else line[2:].strip() or None
            found[-1].hunks.append(Hunk(after=after, line=None if where is None else max(int(where[1]) - 1, 0)))
        else:
            _add_line(found[-1], line, number)
    return found


def _unified(lines: Sequence[str]) -> list[Change]:
    found: list[Change] = []
    old: str | None = None
    in_hunk = [0, 0]
    of_file: str | None = None  # git's first line of a file, of which no other was read yet
    for number, line in enumerate(lines, 1):
        if any(count > 0 for count in in_hunk):
            _add_line(found[-1], line, number)
            in_hunk[0] -= line[:1] in (" ", "-", "")
            in_hunk[1] -= line[:1] in (" ", "+", "")
        elif line.startswith("diff --git "):
            _require_lines(of_file)
            of_file = line
        elif line.startswith("--- "):
            old = _path_of(line)
        elif line.startswith("+++ ") and old is not None:
            new = _path_of(line)
            kind = "add" if old == "/dev/null" else "delete" if new == "/dev/null" else "update"
            found.append(Change(old if kind == "delete" else new if kind == "add" else old, kind))
            if kind == "update" and new != old:
                found[-1].move_to = new
            old = of_file = None
        elif found and (where := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)):
            in_hunk = [int(where[2] or 1), int(where[3] or 1)]
            found[-1].hunks.append(Hunk(line=max(int(where[1]) - 1, 0)))
    _require_lines(of_file)
    if any(count > 0 for count in in_hunk):
        raise PatchProblem("the last hunk has fewer lines than its @@ line says; the envelope needs no such numbers")
    return found


def _require_lines(of_file: str | None) -> None:
    if of_file is not None:
        raise PatchProblem(
            f"nothing says what becomes of {of_file!r}: files that are binary, empty, or only moved or given another "
            "mode are not for a patch; use commands, or the envelope to move. Nothing was changed"
        )


def _path_of(line: str) -> str:
    path = line[4:].split("\t")[0].strip()
    return path[2:] if path[:2] in ("a/", "b/") else path


def _add_line(change: Change, line: str, number: int) -> None:
    if line.startswith("\\"):
        return  # "\ No newline at end of file"
    if not change.hunks:
        change.hunks.append(Hunk())
    hunk, mark, rest = change.hunks[-1], line[:1], line[1:]
    if mark not in ("+", "-", " ", ""):
        raise PatchProblem(f"line {number} of the patch begins neither with +, - nor a space: {line!r}")
    if mark != "+":
        hunk.old.append(rest)
    if mark != "-":
        hunk.new.append(rest)


def applied(change: Change, text: str | None) -> str | None:
    """Return the text of a file after a change; None: there is no file.

    Args:
        text: The text before; None: there is no file.

    Raises:
        PatchProblem: The change does not fit it.
    """
    if change.kind == "add":
        if text is not None:
            raise PatchProblem(f"{change.path} is there already: update it, or delete it first")
        return "".join(f"{line}\n" for hunk in change.hunks for line in hunk.new)
    if text is None:
        raise PatchProblem(f"there is no file {change.path}")
    if change.kind == "delete":
        return None
    lines, at = text.split("\n"), 0
    for number, hunk in enumerate(change.hunks, 1):
        begin = _place_of(hunk, lines, at)
        if begin is None:
            raise PatchProblem(_misfit(change, number, hunk))
        lines[begin : begin + len(hunk.old)] = _indented(hunk, lines[begin : begin + len(hunk.old)])
        at = begin + len(hunk.new)
    return "\n".join(lines)


def _indented(hunk: Hunk, there: Sequence[str]) -> Iterator[str]:
    """Yield the new lines. Those that stay are as they are in the file, however the patch writes their white space."""
    own = dict(zip(hunk.old, there, strict=True))
    for line in hunk.new:
        yield own.get(line, line)


def _place_of(hunk: Hunk, lines: Sequence[str], at: int) -> int | None:
    if hunk.after is not None:
        following = (n for n in range(at, len(lines)) if lines[n].strip() == hunk.after or hunk.after in lines[n])
        if (header := next(following, None)) is None:
            return None
        at = header if hunk.old and lines[header].strip() == hunk.old[0].strip() else header + 1
    if not hunk.old:
        end = len(lines) - 1 if lines[-1] == "" else len(lines)
        return end if hunk.line is None and hunk.after is None else min(at if hunk.line is None else hunk.line, end)
    for same in _SAME:
        wanted = [same(line) for line in hunk.old]
        places = [
            n
            for n in range(at, len(lines) - len(wanted) + 1)
            if same(lines[n]) == wanted[0] and [same(line) for line in lines[n : n + len(wanted)]] == wanted
        ]
        if places:
            return places[0] if hunk.line is None else min(places, key=lambda n: abs(n - (hunk.line or 0)))
    return None


def _misfit(change: Change, number: int, hunk: Hunk) -> str:
    first = next((line for line in hunk.old if line.strip()), "")
    where = f" after {hunk.after!r}" if hunk.after else ""
    return (
        f"{change.path}: the lines of hunk {number} are not there{where}, the first of which is {first!r}; read the "
        "file and write the patch anew. Nothing was changed"
    )
