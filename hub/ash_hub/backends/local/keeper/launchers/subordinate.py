"""Users for the sandboxes of an ordinary user: a user namespace between the host's and those of sandboxes.

Only `newuidmap` and `newgidmap` may give a namespace the subordinate users of its maker (`/etc/subuid`), and only from
outside. So it is done once: in the outer namespace the hive's user is 0 and its subordinates follow from 1 on, and who
enters it, as its owner may, makes those of sandboxes by itself. The first subordinate owns the files that every root
begins as, since an ordinary user can show no file under another owner; it is one of the users of each sandbox, and
nothing runs as it unless root inside wants it.

Without subordinates the outer namespace has the hive's user alone, and each launch makes one of its own.

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess

from .launcher import LaunchError
from .mount_names import checked, own_mounts
from .plan import Subordinate
from .staging import Staged, drop_groups, enter, make_namespace, place, set_up, tmpfs, user_namespace

__all__ = ["OuterNamespace", "range_runs", "take_root", "try_out"]

_NEW_USER = 0x10000000
_EACH = {"max_inotify_instances": 16, "max_inotify_watches": 8192}
"""What the kernel counts for the hive's user, too, whoever inside takes it: how much of it one sandbox may have."""
_MAP_SECONDS = 10.0
_OWNED = ("", "etc", "opt", "srv", "usr", "usr/local", "var", "var/cache", "var/lib", "var/log", "var/spool")
"""Directories of a root that, with those in them, are its root's own: some programs look at who owns them."""
_FIRST_OWN_USER = 1000


class OuterNamespace:
    """The namespace in which sandboxes' own are made."""

    def __init__(self, users: Subordinate, descriptor: int | None) -> None:
        """Hold one; without a descriptor whoever enters makes it, with no user but its own."""
        self._users = users
        self._descriptor = descriptor

    @classmethod
    def of(cls, users: Subordinate) -> OuterNamespace:
        """Return the namespace of this process for these users, which is made the first time.

        Raises:
            LaunchError: It cannot be made; the message says what to do.
        """
        return cls(users, _outer(users) if users.size else None)

    def enter(self, first_user: int | None) -> tuple[int, str]:
        """Become its root.

        Args:
            first_user: The first of the sandbox's range, as the host numbers them.

        Returns:
            The number in here of the sandbox's root, and the map of the sandbox's namespace in the kernel's format.

        Raises:
            OSError: The kernel does not let this user do it.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if self._descriptor is None:
            user, group = os.geteuid(), os.getegid()
            checked(libc.unshare(_NEW_USER))
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            _bound()
            return 0, ""
        assert first_user is not None, "the keeper says which users they are"
        checked(libc.setns(self._descriptor, _NEW_USER))
        drop_groups()
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        _bound()
        first = first_user - self._users.first_user + 1
        return first, range_runs(self._users, first)


def _bound() -> None:
    for name, most in _EACH.items():
        with contextlib.suppress(OSError):
            descriptor = os.open(f"/proc/sys/user/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, f"{most}\n".encode())
            finally:
                os.close(descriptor)


def range_runs(users: Subordinate, first: int) -> str:
    """Return the map of a sandbox's namespace.

    Args:
        first: The number of its root in the outer namespace.
    """
    lines = [f"{users.owner} 1 1"]
    for inside, count in users.runs:
        lines.append(f"{inside} {first} {count}")
        first += count
    return "".join(f"{line}\n" for line in lines)


@functools.cache
def _outer(users: Subordinate) -> int:
    libc = ctypes.CDLL(None, use_errno=True)

    def give_users(helper: int) -> None:
        for program, own, first in (
            ("newuidmap", os.geteuid(), users.first_user),
            ("newgidmap", os.getegid(), users.first_group),
        ):
            _map(program, (str(helper), "0", str(own), "1", "1", str(first), str(users.size)))

    try:
        return make_namespace(lambda: checked(libc.unshare(_NEW_USER)), give_users)
    except PermissionError as error:
        raise LaunchError("users", "this user may make no user namespace; `ash doctor` says why") from error


def _map(program: str, arguments: tuple[str, ...]) -> None:
    path = shutil.which(program) or program
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_MAP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError("users", f"{program} gives no subordinate users: {error}") from error
    if done.returncode != 0:
        raise LaunchError("users", f"{program} gives no subordinate users: {done.stderr.strip() or done.returncode}")


def take_root(root: str, users: Subordinate) -> None:
    """Give the main directories of a root to the sandbox's root, and what they have to whom it belongs.

    It is done by that root, once it has entered its namespace.
    """
    if not users.size:
        return
    for name in _OWNED:
        directory = os.path.join(root, name)
        with contextlib.suppress(OSError):
            os.chown(directory, 0, 0)
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    os.chown(entry.path, 0, 0)
    with contextlib.suppress(OSError):
        os.chown(os.path.join(root, "home/ash"), _FIRST_OWN_USER, _FIRST_OWN_USER)


def try_out(users: Subordinate) -> str:
    """Make a root of the kind that a launch makes, and change it; return `ok`, or `STEP: why`.

    Steps are `users`, `namespaces` and `overlay`. It is done in a child, so to be called where no thread runs.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        step = ["users"]
        try:
            _write_to_a_root(users, step)
            os.write(writing, b"ok")
        except Exception as error:
            os.write(writing, f"{step[0]}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as answer:
        return answer.read().decode()


def _write_to_a_root(users: Subordinate, step: list[str]) -> None:
    outer = OuterNamespace.of(users)
    step[0] = "namespaces"
    first, runs = outer.enter(users.first_user + 1)
    own_mounts()
    stage = place()
    tmpfs(stage, "mode=0755")
    base, owner = f"{stage}/base", 1 if users.size else 0
    for directory in (base, f"{base}/etc"):
        os.mkdir(directory)
        os.chown(directory, owner, owner)
    step[0] = "users"
    inside = user_namespace(first, 1, runs=runs)
    step[0] = "overlay"
    set_up(stage, [Staged(base, "0", "writable")], None, first, 1 << 20)
    enter(inside, ())
    made = f"{stage}/0/etc/ash-trial"
    os.mkdir(made)
    os.chown(made, users.owner, users.owner)
    os.rmdir(made)
