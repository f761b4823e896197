"""The users of a sandbox, as its own files name them: whom a command can run as."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

from ash_recipes.runner.problems import Problem

__all__ = ["User", "find_user", "reach_files_as", "user_called", "user_of_image"]

_PASSWD, _GROUP = "/etc/passwd", "/etc/group"
_FILE_BYTES = 1024 * 1024
_NAMED = 20
_LAST_USER = 0xFFFF_FFFE


@dataclass(frozen=True, slots=True)
class User:
    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @property
    def variables(self) -> dict[str, str]:
        """What a login as this user sets in the environment."""
        return {"USER": self.name, "LOGNAME": self.name, "HOME": self.home}


def find_user(name: str, *, passwd: str = _PASSWD, group: str = _GROUP) -> User | None:
    """Return a user of this sandbox; None for the one that commands run as anyway.

    Raises:
        Problem: `bad_request`: there is none of that name. `not_permitted`: commands cannot run as another here.
    """
    found = user_called(name, passwd=passwd, group=group)
    if found.uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise Problem("not_permitted", "commands run as one user here: nobody is root in this sandbox")
    return found


def user_called(name: str, *, passwd: str = _PASSWD, group: str = _GROUP) -> User:
    """Return a user of this sandbox.

    The files are read here, and not by the C library, which loads what they name into the runner.

    Raises:
        Problem: `bad_request`: there is none of that name.
    """
    users = {fields[0]: fields for fields in _entries(passwd, 7) if _is_number(fields[2]) and _is_number(fields[3])}
    found = users.get(name)
    if found is None:
        known = ", ".join(list(users)[:_NAMED])
        raise Problem("bad_request", f"this sandbox has no user {name!r}; it has {known}; `useradd` makes others")
    uid, gid = int(found[2]), int(found[3])
    groups = [int(it[2]) for it in _entries(group, 4) if _is_number(it[2]) and name in it[3].split(",")]
    return User(name, uid, gid, tuple(dict.fromkeys([gid, *groups])), found[5] or "/")


def user_of_image(asked: str, *, passwd: str = _PASSWD, group: str = _GROUP) -> User:
    """Return whom an image's commands run as.

    Args:
        asked: A name or number, perhaps with a group after a colon; empty: root.

    Raises:
        Problem: `bad_request`: the image names somebody whom it does not have.
    """
    who, _, in_group = asked.partition(":")
    users = [fields for fields in _entries(passwd, 7) if _is_number(fields[2]) and _is_number(fields[3])]
    who = who or "0"
    found = next((it for it in users if it[0] == who or (_is_number(who) and int(it[2]) == int(who))), None)
    if found is None and not _is_number(who):
        raise Problem("bad_request", f"the image's commands are to run as {who!r}, whom its /etc/passwd does not have")
    uid, gid = (int(who), 0) if found is None else (int(found[2]), int(found[3]))
    home = "/root" if found is None and uid == 0 else "/" if found is None else found[5] or "/"
    name = str(uid) if found is None else found[0]
    groups = [it for it in _entries(group, 4) if _is_number(it[2])]
    if in_group:
        named = next((int(it[2]) for it in groups if it[0] == in_group), None)
        if named is None and not _is_number(in_group):
            raise Problem("bad_request", f"the image names the group {in_group!r}, which its /etc/group does not have")
        gid = int(in_group) if named is None else named
    more = [int(it[2]) for it in groups if name in it[3].split(",")]
    return User(name, uid, gid, tuple(dict.fromkeys([gid, *more])), home)


def reach_files_as(user: User) -> None:
    """Have this process, which stays root, read and write files as a user; so do threads that it starts from here on.

    What it starts has its own credentials, set before it is executed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups(user.groups)
    libc.setfsgid(user.gid)
    libc.setfsuid(user.uid)


def _is_number(text: str) -> bool:
    """Return whether it is one that the kernel takes for a user or group."""
    return text.isdecimal() and len(text) <= 10 and int(text) <= _LAST_USER


def _entries(path: str, width: int) -> Iterator[list[str]]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    with open(descriptor, "rb") as file:
        lines = file.read(_FILE_BYTES).decode("utf-8", "replace").splitlines()
    for line in lines:
        fields = line.split(":")
        if len(fields) == width:
            yield fields
