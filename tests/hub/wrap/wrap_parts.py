"""Parts of the tests of `ash wrap`: a wrapped command line as a process, and a look at what is left of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT_SECONDS = 20.0
ASH = (sys.executable, "-c", "from ash_mcp.cli import main; main()", "wrap")


def wrapped(
    *words: str, data: bytes = b"", env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run `ash wrap` with these words to its end."""
    return subprocess.run(
        [*ASH, *words],
        input=data,
        capture_output=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        timeout=timeout,
        check=False,
    )


@contextmanager
def running(*words: str) -> Generator[subprocess.Popen[bytes]]:
    process: subprocess.Popen[bytes] = subprocess.Popen(
        [*ASH, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def processes_with(mark: str) -> list[int]:
    """Return the processes of this host that have a word in their command line, by their numbers."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def until(what: Any, seconds: float = WAIT_SECONDS) -> bool:
    """Wait until something holds, and say whether it does."""
    ends = time.monotonic() + seconds
    while not what():
        if time.monotonic() > ends:
            return False
        time.sleep(0.02)
    return True


def words_of(options: Sequence[str], *words: str) -> list[str]:
    return [*ASH, *options, "--", *words]
