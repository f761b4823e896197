"""Parsers of typed values: durations, pairs, the two sides of a copy. Pure; bad input is a usage error."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import typer

from ash_mcp.types import RESERVED_SESSION_NAMES

__all__ = ["Place", "one_command", "read_duration", "read_network", "read_pairs", "read_place", "shown_duration"]

_UNITS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_NUMBER = r"\d{1,9}(?:\.\d{1,6})?"
_DURATION: Final = re.compile("".join(f"(?:(?P<{unit}>{_NUMBER}){unit})?" for unit in _UNITS))
_PLAIN_SECONDS: Final = re.compile(_NUMBER)
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REMOTE: Final = re.compile(r"(?P<session>[a-z][a-z0-9]{0,15}|sbx-[a-z2-7]{24}):(?P<path>.*)", re.DOTALL)


def read_duration(text: str) -> float:
    """Return the seconds of `90s`, `10m`, `1h30m`, `2d` or a plain number of seconds; always more than 0."""
    text = text.strip().lower()
    if _PLAIN_SECONDS.fullmatch(text):
        seconds = float(text)
    else:
        match = _DURATION.fullmatch(text)
        if match is None or not text:
            raise typer.BadParameter(f"{text!r} is not a duration; write 90s, 10m, 1h30m or 2d")
        seconds = sum(float(number) * _UNITS[unit] for unit, number in match.groupdict(default="0").items())
    if seconds <= 0:
        raise typer.BadParameter(f"{text!r} is no time at all; write 90s, 10m, 1h30m or 2d")
    return seconds


def shown_duration(seconds: float) -> str:
    """Return seconds as people say them, by their two largest units: `45s`, `1h 30m`, `2d 4h`."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, size in _UNITS.items():
        count, left = divmod(left, int(size))
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def read_pairs(words: Iterable[str], what: str, *, variables: bool = False) -> dict[str, str]:
    """Return `K=V` words as a mapping; with `variables` each key must be a name of an environment variable."""
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{word!r} is not {what}; write KEY=VALUE")
        if variables and _VARIABLE.fullmatch(key) is None:
            raise typer.BadParameter(f"{key!r} cannot be the name of a variable: letters, digits and _ only")
        if key in pairs:
            raise typer.BadParameter(f"{key!r} is given twice; say it once")
        pairs[key] = value
    return pairs


def read_network(text: str) -> str | list[str]:
    """Return `none`, `internet`, or the domains of a list with commas."""
    if text in ("none", "internet"):
        return text
    domains = [part.strip() for part in text.split(",")]
    if not all(domains):
        raise typer.BadParameter(f"{text!r} is no network policy; write none, internet, or domains with commas")
    return domains


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a copy."""

    session: str | None
    """None: on this machine."""
    path: str

    @property
    def wants_directory(self) -> bool:
        """Whether it is written as a directory to copy into."""
        return self.path.endswith("/") or self.path.rpartition("/")[2] in ("", ".", "..")

    def __str__(self) -> str:
        return self.path if self.session is None else f"{self.session}:{self.path}"


def read_place(text: str) -> Place:
    """Return `sb1:/path` as a place in a sandbox and all else as one here; `./a:b` is always here."""
    match = _REMOTE.fullmatch(text)
    if match is None or match["session"] in RESERVED_SESSION_NAMES:
        if not text or "\0" in text:
            raise typer.BadParameter("a path is empty; write a path here, or sb1:/path for one in a sandbox")
        return Place(None, text)
    return Place(match["session"], match["path"] or ".")


def one_command(words: list[str]) -> str | list[str]:
    """Return what `exec` runs: one word is a line for bash, several are a program and its arguments."""
    if not words or not words[0].strip():
        raise typer.BadParameter(
            f"there is no command; put it after --, such as: ash exec sb1 -- {shlex.quote('uname -a')}"
        )
    return words[0] if len(words) == 1 else words
