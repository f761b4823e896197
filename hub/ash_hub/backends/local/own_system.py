"""The copy of the host's system that an ordinary user's machines begin as: made by a process beside the hive."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from ash_hub.backends.local.keeper.launchers.plan import Subordinate
from ash_hub.backends.local.machine_base import Entry

__all__ = ["COPY_COMMAND", "SystemProblem", "make_copy"]

_BOOT = "import sys; sys.path.append(sys.argv[1]); from keeper.system_copy import main; main()"
COPY_COMMAND = [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parent)]
"""The program that copies; it needs the standard library alone."""

_COPY_SECONDS = 3600.0
_END_SECONDS = 10.0
_LINE_BYTES = 65_536
_SPARE_BYTES = 1024 * 1024 * 1024
"""What a copy leaves of a disk."""
_log = logging.getLogger("ash.hub")


class SystemProblem(Exception):
    """There is no copy; the message says why and what to do."""


async def make_copy(
    place: Path, name: str, users: Subordinate, entries: Mapping[str, Entry], without: Sequence[str], most_bytes: int
) -> Path:
    """Return the directory of the copy, made if it is not there. Copies that nobody uses any more are removed.

    Args:
        place: The directory of copies.
        name: Of this one; a copy is never changed.
        users: Whose the copy shall be.
        entries: What is in it beside the system (`machine_base.py`).
        without: Paths that are left out.
        most_bytes: The size up to which it is made.

    Raises:
        SystemProblem: It cannot be made.
    """
    given = (users.first_user, users.first_group, users.size, users.owner)
    order = {"place": str(place), "name": name, "users": given, "without": list(without)}
    order |= {"entries": _told(entries), "most_bytes": most_bytes, "spare_bytes": _SPARE_BYTES}
    said: dict[str, Any] = {}
    try:
        with anyio.fail_after(_COPY_SECONDS):
            async with await anyio.open_process(
                COPY_COMMAND, stderr=subprocess.STDOUT, start_new_session=True
            ) as process:
                assert process.stdin is not None and process.stdout is not None
                try:
                    await process.stdin.send(json.dumps(order).encode() + b"\n")
                    said = await _heard(BufferedByteReceiveStream(process.stdout), place)
                finally:
                    with anyio.move_on_after(_END_SECONDS, shield=True):
                        await process.stdin.aclose()  # which ends it
                        await process.wait()
    except TimeoutError:
        raise SystemProblem(f"the host's system was not copied within {_COPY_SECONDS:g} s") from None
    except OSError as error:
        raise SystemProblem(f"the host's system cannot be copied: {error}") from error
    if "done" not in said:
        raise SystemProblem(said["problem"])
    return Path(said["done"])


def _told(entries: Mapping[str, Entry]) -> list[tuple[str, str, str, int]]:
    return [
        (name, entry.kind, base64.b64encode(entry.content).decode(), entry.mode)
        for name, entry in sorted(entries.items())
    ]


async def _heard(lines: BufferedByteReceiveStream, place: Path) -> dict[str, Any]:
    """Return the last that the program says."""
    last = "the program that copies the host's system ended"
    while True:
        try:
            line = await lines.receive_until(b"\n", _LINE_BYTES)
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound):
            return {"problem": last}
        try:
            said = json.loads(line)
        except ValueError:
            last = line.decode(errors="replace")
            continue
        if "bytes" not in said:
            return said
        _log.info("the host's system is copied to %s, %d MiB, for sandboxes to begin as", place, said["bytes"] >> 20)
