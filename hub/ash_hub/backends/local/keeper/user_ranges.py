"""Ranges of the host's users, each for one sandbox at a time, whichever hive of this host it belongs to.

A byte of the lock file stands for the user of that number. A range is taken by a lock on its bytes, which the kernel
gives up when the last descriptor of it is closed: the keeper has one, and so has the sandbox's first process, which
outlives all others there. So a range is free again when nothing of its sandbox can be left. Where the keeper was
killed, the first process may give it up a moment before the kernel has ended the others.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import struct

__all__ = ["LOCK_FILE", "RangeProblem", "UserRanges", "lock_problem"]

LOCK_FILE = "/run/ash-users.lock"
_FLOCK = struct.Struct("hhqqi4x")


class RangeProblem(OSError):
    """No range can be taken; the message says why and what to do."""


class UserRanges:
    """Takes ranges, the one that was given back last after all others.

    It begins anywhere, since what the sandboxes of a keeper that was killed had may be free a moment too early.
    """

    def __init__(self, path: str = LOCK_FILE, start: int | None = None) -> None:
        self._path = path
        self._next = secrets.randbelow(1 << 31) if start is None else start

    def take(self, block: tuple[int, int], count: int, path: str | None = None) -> tuple[int, int]:
        """Return the first user of a range that is free, and the descriptor that holds it.

        Args:
            block: Its first user and how many there are.
            count: How many a range has.
            path: Another lock file, for a block of an ordinary user's own.

        Raises:
            RangeProblem: All are taken, or the lock file cannot be used.
        """
        path = self._path if path is None else path
        first, users = block
        ranges = users // count
        try:
            descriptor = _opened(path)
        except OSError as error:
            raise RangeProblem(_why(path, error)) from error
        for number in range(ranges):
            index = (self._next + number) % ranges
            start = first + index * count
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, start, count, 0))
            except BlockingIOError:
                continue
            self._next = index + 1
            return start, descriptor
        os.close(descriptor)
        raise RangeProblem(
            f"all {ranges} ranges of {count} users from {first} on are taken by sandboxes of this host: end some, or "
            "choose a larger block of users in the settings"
        )


def lock_problem(path: str = LOCK_FILE) -> str | None:
    """Return why ranges cannot be locked, by opening the file; None if they can."""
    try:
        os.close(_opened(path))
    except OSError as error:
        return _why(path, error)
    return None


def _why(path: str, error: OSError) -> str:
    return f"the users of sandboxes cannot be locked by {path}: {error.strerror or error}"


def _opened(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        os.close(descriptor)
        raise OSError("it is not a file of this user alone")
    return descriptor
