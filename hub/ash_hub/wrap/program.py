"""Files of the host that a program needs, shown read-only: the program, its interpreter, its installation.

Programs of the system need nothing. Others lie in somebody's home, in a virtual environment, below a version manager:
what is shown is the narrowest directory that is known to be an installation, and never a home.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ash_mcp.errors import ConfigError

__all__ = ["ProgramMissing", "hidden_arguments", "shown_for", "which"]

_MARKS = ("pyvenv.cfg", "conda-meta", "lib/node_modules")
"""What only an installation has at its top. A `lib/python3.*` counts as well, but for a user's own `~/.local`."""
_MOST_LINKS = 16
_HEAD_BYTES = 512


class ProgramMissing(ConfigError):
    """The program to start, or what it starts with, is not on this host."""


def which(name: str, path: str | None = None) -> str:
    """Return where a program is on this host.

    Raises:
        ProgramMissing: It is nowhere.
    """
    found = shutil.which(name, path=path)
    if found is None:
        raise ProgramMissing(f"there is no program {name} here; install it, or name it by its path")
    return os.path.abspath(found)


def shown_for(program: str, system: Sequence[str]) -> dict[str, None]:
    """Return the paths to show for a program, in an order; those of the system are not among them.

    Args:
        program: Its absolute path.
        system: The directories that every sandbox sees.

    Raises:
        ProgramMissing: What it starts with is not there.
    """
    found: dict[str, None] = {}
    _add(program, system, found, depth=0)
    return found


def hidden_arguments(words: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Return the arguments that name something of this host that the server does not see."""
    return [
        word
        for word in words
        if os.path.isabs(word) and os.path.exists(word) and not any(_is_below(word, path) for path in shown)
    ]


def _add(program: str, system: Sequence[str], found: dict[str, None], depth: int) -> None:
    if depth > _MOST_LINKS or any(_is_below(program, path) for path in system):
        return
    for path in _links(program):
        if any(_is_below(path, shown) for shown in (*system, *found)):
            continue
        prefix = _installation(path)
        found[prefix or path] = None
        if prefix is not None:
            for base in _base_pythons(Path(prefix)):
                _add(base, system, found, depth + 1)
    if (interpreter := _interpreter(program)) is not None:
        _add(interpreter, system, found, depth + 1)


def _links(program: str) -> Iterator[str]:
    """Yield a path, and each that its links lead to."""
    for _ in range(_MOST_LINKS):
        yield program
        if not os.path.islink(program):
            break
        program = os.path.normpath(os.path.join(os.path.dirname(program), os.readlink(program)))
    if (real := os.path.realpath(program)) != program:
        yield real


def _installation(program: str) -> str | None:
    """Return the directory that was installed with a program as a whole, if it is surely that."""
    above = Path(program).parent
    modules = [path for path in Path(program).parents if path.name == "node_modules"]
    if modules and not _holds_home(modules[-1]):
        return str(modules[-1])
    if above.name not in ("bin", "sbin") or _holds_home(above.parent):
        return None
    prefix = above.parent
    if any((prefix / mark).exists() for mark in _MARKS):
        return str(prefix)
    is_own = prefix == Path.home() / ".local"
    return str(prefix) if not is_own and any(prefix.glob("lib/python3.*")) else None


def _holds_home(path: Path) -> bool:
    return Path.home().is_relative_to(path)


def _base_pythons(prefix: Path) -> Iterator[str]:
    """Yield the interpreter that a virtual environment stands on."""
    try:
        lines = (prefix / "pyvenv.cfg").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() == "home" and os.path.exists(python := os.path.join(value.strip(), "python3")):
            yield python


def _interpreter(program: str) -> str | None:
    """Return what a script names in its first line; None where it is no script."""
    try:
        with open(program, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    if not head.startswith(b"#!"):
        return None
    words = os.fsdecode(head[2:].partition(b"\n")[0]).split()
    if not words:
        return None
    if os.path.basename(words[0]) == "env":
        names = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        return which(names[0]) if names else None
    return words[0]


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
