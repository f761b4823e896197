"""Another process that holds the locks of the log files, as one that was stopped while it wrote."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

HOLDER = """
import fcntl, sys
locks = [open(name, "w") for name in sys.argv[1:]]
for lock in locks: fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(*locks: Path) -> Generator[None]:
    """Hold locks in another process."""
    command = (sys.executable, "-c", HOLDER, *map(str, locks))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            holder.stdin.close()


def locks_of(folder: Path) -> tuple[Path, Path]:
    return folder / ".__hive.lock", folder / ".__audit.lock"
