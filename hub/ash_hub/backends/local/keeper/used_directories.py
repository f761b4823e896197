"""Directories that sandboxes begin as: held while one uses them, removed when none does.

Whoever uses one has a shared lock on it (`flock`), which the kernel gives up with the last descriptor: the hub as long
as it may start sandboxes from it, the keeper for each that runs. Removal takes the other lock first. Standard library
only.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["hold", "remove_unused"]


def hold(path: str) -> int:
    """Return a descriptor that keeps a directory from being removed for as long as it is open.

    Raises:
        OSError: It is not there, or is just being removed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
            raise FileNotFoundError(2, "it was just replaced")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_unused(parent: Path, keep: str, *, spare: int = 0, fresh_seconds: float = 0.0) -> None:
    """Remove the directories below `parent` that nobody uses.

    Args:
        keep: The name of one that stays.
        spare: How many others stay, the youngest.
        fresh_seconds: The age up to which those with a name that begins with a dot stay: somebody may be making them.
    """
    ages: dict[Path, float] = {}
    for path in parent.iterdir():
        with suppress(FileNotFoundError):  # whoever else removes some may be just before us, here and below
            if path.is_dir() and not path.is_symlink():
                ages[path] = path.lstat().st_mtime
    whole = sorted((path for path in ages if not path.name.startswith(".")), key=lambda path: -ages[path])
    others = [path for path in whole if path.name != keep][spare:]
    now = time.time()
    others += [path for path, age in ages.items() if path.name.startswith(".") and now - age >= fresh_seconds]
    for path in others:
        with suppress(FileNotFoundError), _unused(path) as is_unused:
            if is_unused:
                doomed = parent / f".old-{secrets.token_hex(8)}"  # so that nobody finds half of one
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _unused(path: Path) -> Generator[bool]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
