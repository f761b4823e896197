"""The subordinate users of an ordinary user (`/etc/subuid`, `/etc/subgid`), and what each sandbox has of them."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

from ash_hub.backends.local.keeper.launchers.plan import Subordinate

__all__ = ["LEAST_EACH", "OWNER", "own_subordinates", "ranges_in", "runs_of", "subordinate_lines", "user_lock"]

OWNER = 2
"""Inside, the owner of the files that roots begin as: `bin`, as on Unix of old."""
_FIXED = ((0, 2), (3, 44), (50, 1), (60, 1), (65_534, 1))
"""Root, the users and groups with numbers that Debian gives to every system, nobody."""
_SYSTEM, _OWN = 100, 1000
"""The first user that packages make, and the first that commands make."""
LEAST_EACH = 65
_MOST_SYSTEM, _MOST_EACH = 900, 32_768
_PROGRAMS = ("newuidmap", "newgidmap")
_USUAL = 65_536


def runs_of(each: int) -> tuple[tuple[int, int], ...]:
    """Return what a range of `each` users is inside, in runs: the first number, and how many follow from it on."""
    rest = each - sum(count for _, count in _FIXED)
    system = min(_MOST_SYSTEM, rest // 2)
    return (*_FIXED[:-1], (_SYSTEM, system), (_OWN, rest - system), _FIXED[-1])


def ranges_in(count: int, sandboxes: int) -> tuple[int, int]:
    """Return how many users each sandbox has of so many subordinates, and how many sandboxes that is enough for.

    The first subordinate is of no range: it owns the files that all roots begin as.
    """
    each = max(LEAST_EACH, min(_MOST_EACH, (count - 1) // sandboxes))
    return each, max(0, count - 1) // each


def own_subordinates(files: tuple[str, str] = ("/etc/subuid", "/etc/subgid")) -> Subordinate | str:
    """Return the largest run of subordinate users of this process's user; or why there is none, and what to do."""
    found: list[tuple[int, int]] = []
    for path in files:
        own = [(length, begin) for name, begin, length in subordinate_lines(path) if name in _names()]
        if not own:
            return f"{path} gives this user no subordinates: run `{_command()}` and start the hive again"
        length, begin = max(own)
        found.append((begin, length))
    if absent := [name for name in _PROGRAMS if shutil.which(name) is None]:
        return f"{' and '.join(absent)} not installed: `sudo apt-get install uidmap` (dnf: shadow-utils)"
    (first_user, users), (first_group, groups) = found
    count = min(users, groups)
    if count <= LEAST_EACH:
        return f"{count} subordinate users are too few, a sandbox has {LEAST_EACH}: run `{_command()}`"
    return Subordinate(first_user, first_group, count, owner=OWNER)


def user_lock() -> Path:
    """Return the file by which all hives of this user lock ranges, wherever they keep their state.

    Raises:
        OSError: It can be nowhere.
    """
    try:
        home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError as error:
        raise OSError(f"user {os.geteuid()} has no home") from error
    directory = home / ".local/state/ash"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / "users.lock"


def subordinate_lines(path: str) -> list[tuple[str, int, int]]:
    """Return the users of `/etc/subuid` or `/etc/subgid`, each with the first of its subordinates and their count."""
    found: list[tuple[str, int, int]] = []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, numbers = line.partition(":")
        begin, _, length = numbers.partition(":")
        if begin.isdecimal() and length.isdecimal():
            found.append((name, int(begin), int(length)))
    return found


def _names() -> set[str]:
    user = os.geteuid()
    try:
        return {str(user), pwd.getpwuid(user).pw_name}
    except KeyError:
        return {str(user)}


def _command() -> str:
    """Return what gives this user the usual count of subordinates, behind all that are given."""
    lines = [line for path in ("/etc/subuid", "/etc/subgid") for line in subordinate_lines(path)]
    first = max((begin + length for _, begin, length in lines), default=100_000)
    numbers = f"{first}-{first + _USUAL - 1}"
    name = next((name for name in _names() if not name.isdecimal()), str(os.geteuid()))
    return f"sudo usermod --add-subuids {numbers} --add-subgids {numbers} {name}"
