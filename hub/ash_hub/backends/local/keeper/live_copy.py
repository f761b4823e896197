"""A copy of what a sandbox has written, made while it runs: the process that copies, and its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .launchers import LaunchError
from .launchers.layers import Spaces
from .launchers.process import readable
from .snapshots import close_spaces, new_spaces

__all__ = ["copied"]

_BOOT = "import sys; sys.path.append(sys.argv[1]); from keeper.launchers.layer_copy import main; main(sys.argv[2:])"
_COPY_SECONDS = 60.0


async def copied(spaces: Spaces, sizes: Mapping[str, int | None]) -> dict[str, int]:
    """Return new file systems with what is in others now.

    Raises:
        LaunchError: It could not be copied in time, or not at all; nothing is left of it.
    """
    made = new_spaces(sizes)
    try:
        await _copy([number for name, space in spaces.items() for number in (space, made[name])])
    except BaseException:
        close_spaces(made)
        raise
    return made


async def _copy(numbers: list[int]) -> None:
    process = _started(numbers)
    pidfd = os.pidfd_open(process.pid)
    try:
        async with asyncio.timeout(_COPY_SECONDS):
            await readable(pidfd)
    except TimeoutError:
        raise LaunchError("copy", f"what it has written could not be copied within {_COPY_SECONDS:g} s") from None
    finally:
        process.kill()
        said = process.communicate()[1].decode(errors="replace").strip().splitlines()
        os.close(pidfd)
    if process.returncode != 0:
        raise LaunchError("copy", f"what it has written could not be copied: {said[-1] if said else 'it was killed'}")


def _started(numbers: list[int]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parents[1]), *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=numbers,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchError("copy", f"nothing could be started that copies: {error.strerror}") from error
