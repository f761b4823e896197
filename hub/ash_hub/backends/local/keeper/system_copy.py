"""A copy of the host's system that sandboxes of an ordinary user can begin as, made by a program of its own.

Its order is a line of JSON: {"place", "name", "entries", "users", "without", "most_bytes", "spare_bytes"}

An ordinary user can show sandboxes no file of the host as their own, so what they may change is a copy, whose owner
is a user of theirs (`launchers/subordinate.py`). It is made once, below `place`, and has its name when it is whole;
`entries` are what it has beside the system: path, kind, content in base64, mode. The program prints a JSON object a
line: `bytes` (to be copied), `done` (its path), `problem`. It ends when its standard input is closed, and leaves
nothing unfinished; what a killed one left, the next one removes, with copies that nobody uses. Standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .launchers.plan import Subordinate
from .launchers.subordinate import OuterNamespace
from .used_directories import remove_unused

__all__ = ["COPIED", "main"]

COPIED = ("/usr", "/var/lib/dpkg")
_TURN_SECONDS = 0.2
_BLOCK = 4096
_COPY = ("cp", "-a", "--parents", "--reflink=auto", "--no-preserve=ownership,xattr,context", "--")
_AT_ONCE = 500
"""Paths for each `cp`, so that its arguments never are too long."""


class _Refused(Exception):
    """There can be no copy; the message says why and what to do."""


def main() -> None:
    order = json.loads(sys.stdin.readline())
    try:
        _say(done=_make(order))
    except (OSError, _Refused, subprocess.SubprocessError) as error:
        _say(problem=str(error))


def _say(**what: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(what).encode() + b"\n")


def _make(order: Mapping[str, Any]) -> str:
    *numbers, owner = order["users"]
    users = Subordinate(*numbers, owner=owner)
    place = Path(order["place"])
    place.mkdir(mode=0o711, parents=True, exist_ok=True)
    number = 1 if users.size else 0
    OuterNamespace.of(users).enter(users.first_user)
    os.nice(10)
    with (place / ".lock").open("w") as lock:
        while not _is_ours(lock.fileno()):
            _require_wanted(_TURN_SECONDS)
        target = place / order["name"]
        remove_unused(place, keep=target.name)
        if not target.is_dir():
            made = Path(tempfile.mkdtemp(prefix=".new-", dir=place))
            try:
                _fill(made, order, number)
                os.rename(made, target)
            except BaseException:
                _remove_behind(made)
                raise
    return str(target)


def _remove_behind(made: Path) -> None:
    """Remove what was begun in a process of its own, as nobody waits for it."""
    if os.fork() == 0:
        try:
            os.setsid()
            for descriptor in (0, 1, 2):
                os.close(descriptor)
            shutil.rmtree(made, ignore_errors=True)
        finally:
            os._exit(0)


def _is_ours(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _require_wanted(seconds: float) -> None:
    """Wait, and give up if nobody has our standard input open any more."""
    if select.select([0], [], [], seconds)[0] and not os.read(0, 1):
        raise _Refused("the hive has ended")


def _fill(made: Path, order: Mapping[str, Any], owner: int) -> None:
    without = frozenset[str](order["without"])
    needed = sum(_size_of(path, without) for path in COPIED)
    if needed > order["most_bytes"]:
        raise _Refused(
            f"a copy of this host's system takes {needed >> 20} MiB, over the {order['most_bytes'] >> 20} that are "
            "allowed: raise ASH_HUB_BACKEND__SYSTEM_BYTES"
        )
    _say(bytes=needed)
    free = os.statvfs(made)
    if needed + order["spare_bytes"] > free.f_bavail * free.f_frsize:
        raise _Refused(
            f"a copy of this host's system takes {needed >> 20} MiB, and {made.parent} has "
            f"{free.f_bavail * free.f_frsize >> 20} MiB free: make room, or choose another place "
            "(ASH_HUB_BACKEND__SYSTEM_DIR)"
        )
    made.chmod(0o755)
    os.chown(made, owner, owner)
    for name, kind, content, mode in order["entries"]:  # a directory comes before what is in it
        if not f"/{name}/".startswith(tuple(f"{path}/" for path in COPIED)):
            _write(made / name, kind, base64.b64decode(content), mode)
            os.chown(made / name, owner, owner, follow_symlinks=False)
    os.chdir(made)
    sources = [path for name in COPIED if os.path.isdir(name) for path in _sources(name, without)]
    for begin in range(0, len(sources), _AT_ONCE):
        _copy(sources[begin : begin + _AT_ONCE], owner)
    with contextlib.suppress(FileNotFoundError):
        os.truncate("var/lib/dpkg/statoverride", 0)  # it names users of the host


def _write(path: Path, kind: str, content: bytes, mode: int) -> None:
    if kind == "link":
        os.symlink(content, path)
        return
    if kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(content)
    path.chmod(mode)


def _sources(path: str, without: frozenset[str]) -> Iterator[str]:
    """Yield what is to be copied of a directory: itself as a whole, unless some of it is left out."""
    if path in without:
        return
    if not any(left.startswith(f"{path}/") for left in without):
        yield path
        return
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.path not in without and (entry.is_symlink() or os.access(entry.path, os.R_OK)):
            yield from _sources(entry.path, without) if entry.is_dir(follow_symlinks=False) else (entry.path,)


def _copy(sources: list[str], owner: int) -> None:
    with subprocess.Popen(
        [*_COPY, *sources, "."],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        user=owner,
        group=owner,
        env={"PATH": os.defpath, "LC_ALL": "C"},
    ) as copying:
        assert copying.stderr is not None
        os.set_blocking(copying.stderr.fileno(), False)
        said = b""
        try:
            while copying.poll() is None:
                _require_wanted(_TURN_SECONDS)
                said += copying.stderr.read() or b""
        except BaseException:
            copying.kill()
            raise
        said += copying.stderr.read() or b""
    lines = said.decode(errors="replace").splitlines()
    # What this user may not read stays away: nothing of it is for sandboxes.
    if serious := [line for line in lines if not line.endswith(("Permission denied", "No such file or directory"))]:
        raise _Refused(f"the host's system cannot be copied: {serious[-1]}")


def _size_of(path: str, without: frozenset[str]) -> int:
    """Return the bytes that a copy takes."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(path) if path not in without else ():
            if entry.path in without:
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += _BLOCK + _size_of(entry.path, without)
                else:
                    status = entry.stat(follow_symlinks=False)
                    total += status.st_size // status.st_nlink if stat.S_ISREG(status.st_mode) else 0
                    total += _BLOCK // 2
    return total
