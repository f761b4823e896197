"""Secrets of a spawn: from the environment or standard input, never from the command line, where others can read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import typer

__all__ = ["read_secrets"]

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_secrets(
    names: Iterable[str],
    *,
    environ: Mapping[str, str] | None = None,
    ask: Callable[[str], str | None] | None = None,
) -> dict[str, str]:
    """Return the value of each name: the variable of that name, else the next line of standard input.

    Args:
        names: Names of environment variables.
        environ: Where to look first; None is this process's environment.
        ask: Returns the value of a name, or None when there is none; None reads standard input.
    """
    env = os.environ if environ is None else environ
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if _NAME.fullmatch(name) is None:
            # The word is not repeated: it may hold the value.
            raise typer.BadParameter(
                "--secret takes the name of an environment variable and nothing more: a value on the command line "
                "can be read by others. Put the value in that variable, or give it on standard input"
            )
    found: dict[str, str] = {}
    for name in wanted:
        value = env.get(name)
        found[name] = value if value is not None else _asked(name, ask or _from_stdin)
    return found


def _asked(name: str, ask: Callable[[str], str | None]) -> str:
    value = ask(name)
    if value is None:
        raise typer.BadParameter(
            f"there is no value for the secret {name}: set the environment variable {name}, "
            "or write its value as a line on standard input"
        )
    return value


def _from_stdin(name: str) -> str | None:
    # Python has no stdin at all where the descriptor is closed.
    if not sys.stdin:
        return None
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass(f"{name}: ", stream=sys.stderr)
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
