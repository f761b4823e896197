"""This process's terminal while it shows another: raw mode, the escape that detaches, and how it is left in order."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Generator
from typing import Final

__all__ = ["Escape", "Modes", "is_terminal", "raw", "size"]

_ENTER: Final = b"\r\n"
_MODE: Final = re.compile(rb"\x1b\[\?([0-9;]{1,40})([hl])")
_TAIL: Final = 48
"""Longer than what `_MODE` finds: a sequence may come in two pieces."""

_UNDONE: Final = {
    b"1": b"l",  # cursor keys of applications
    b"47": b"l",
    b"1047": b"l",
    b"1049": b"l",  # the other screen
    b"25": b"h",  # the cursor
    b"1000": b"l",  # the mouse, in five ways
    b"1002": b"l",
    b"1003": b"l",
    b"1005": b"l",
    b"1006": b"l",
    b"1004": b"l",  # news of the focus
    b"2004": b"l",  # bracketed paste
}
"""Modes of a terminal that programs change, and how they are by themselves."""
_PLAIN: Final = b"\x1b[0m"


class Modes:
    """Watches output for modes that it sets, so that they can be undone where it stops half way. Pure."""

    def __init__(self) -> None:
        self._set: dict[bytes, bytes] = {}
        self._tail = b""

    def feed(self, data: bytes) -> None:
        seen = self._tail + data
        for found in _MODE.finditer(seen):
            for mode in found[1].split(b";"):
                if mode in _UNDONE:
                    self._set[mode] = found[2]
        self._tail = seen[-_TAIL:]

    def undo(self) -> bytes:
        """Return what brings a terminal back to how it was before."""
        changed = [mode for mode, state in self._set.items() if state != _UNDONE[mode]]
        self._set.clear()
        return b"".join(b"\x1b[?%b%b" % (mode, _UNDONE[mode]) for mode in changed) + (_PLAIN if changed else b"")


class Escape:
    """Finds `~.` after Enter in what is typed, as ssh does; `~~` is a tilde. Pure."""

    def __init__(self) -> None:
        self._at_line_start = True
        self._is_pending = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return what is passed on, and whether the escape came, behind which nothing is."""
        out = bytearray()
        for value in data:
            if self._is_pending:
                self._is_pending = False
                if value == ord("."):
                    return bytes(out), True
                if value != ord("~"):
                    out += b"~"
                out.append(value)
            elif self._at_line_start and value == ord("~"):
                self._is_pending = True
                continue
            else:
                out.append(value)
            self._at_line_start = value in _ENTER
        return bytes(out), False


def is_terminal() -> bool:
    """Return whether standard input and output are a terminal."""
    return sys.stdin is not None and sys.stdout is not None and os.isatty(0) and os.isatty(1)


def size() -> tuple[int, int]:
    """Return the rows and columns of the terminal; 24 and 80 where it does not say."""
    try:
        found = os.get_terminal_size(1)
    except OSError:
        return 24, 80
    return (found.lines or 24, found.columns or 80)


@contextlib.contextmanager
def raw() -> Generator[None]:
    """Pass every key as it is while the context is open, and put the terminal back in any case."""
    import termios
    import tty

    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
