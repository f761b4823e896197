"""Output of `ash`: data on standard output, messages about it on standard error."""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["clean", "complain", "emit_json", "emit_text", "new_console", "note", "say"]

_WIDE = 200
"""Columns of a table that does not go to a terminal, so that nothing is cut."""


def say(line: str = "") -> None:
    """Write a line of the answer."""
    print(line, flush=True)


def note(line: str) -> None:
    """Write a line beside the answer."""
    print(line, file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """Write why the command failed; the words may come from a sandbox."""
    note(f"ash: {clean(message)}")


def emit_json(value: Any) -> None:
    """Write one JSON document on one line or, on a terminal, indented."""
    say(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def emit_text(text: str) -> None:
    """Write what a sandbox said; on a terminal without the characters that would command it."""
    shown = clean(text) if sys.stdout.isatty() else text
    sys.stdout.write(shown if shown.endswith("\n") or not shown else shown + "\n")
    sys.stdout.flush()


def clean(text: str) -> str:
    """Return `text` with control and bidirectional characters shown as U+FFFD, line breaks and tabs kept."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else "\ufffd" for char in text
    )


def new_console() -> Console:
    """Return a console on standard output that takes no markup out of the data."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    return Console(width=width, markup=False, highlight=False, emoji=False)
