"""The keeper process: locks the state directory, detaches from the hub, serves, and leaves nothing behind.

The hub writes the configuration to stdin and reads one line from stdout: `{"ready": true, "pid"}`, or `{"error",
"message"}`. The process that the hub started ends at once; the keeper is its child, in a session of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from .cgroups import Hierarchy, open_hierarchy
from .control import Keeper

__all__ = ["main"]

_LEFTOVER_SECONDS = 5.0
_LOCK_FILE_BYTES = 65_536


def main() -> None:
    """Run as the keeper of the configuration on stdin."""
    given = sys.stdin.buffer.read()
    if os.fork() or not given:  # nothing is given by a hub that died meanwhile
        os._exit(0)
    config = json.loads(given)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        lock = _locked(config["lock_file"])
        if lock is None:
            _say({"error": "locked", "message": f"another keeper holds {config['lock_file']}"})
            return
        hierarchy = _prepared(config, lock)
    except OSError as error:
        _say({"error": "failed", "message": f"the keeper could not start: {error}"})
        return
    with asyncio.Runner(loop_factory=_polling_loop) as runner:
        runner.run(_serve(config, hierarchy))
    os.close(lock)


def _polling_loop() -> asyncio.AbstractEventLoop:
    # Not by epoll: the kernel bounds what all processes of this user watch with it, and sandboxes may use that up.
    return asyncio.SelectorEventLoop(selectors.PollSelector())


def _locked(path: str) -> int | None:
    """Lock the state directory for as long as this process lives; None if another keeper has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _prepared(config: Mapping[str, Any], lock: int) -> Hierarchy:
    """Remove what an earlier keeper left, and make the directories anew.

    The lock file tells where the earlier one had its groups: it may have been started from another group.
    """
    directory = config["directory"]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        before = json.loads(os.pread(lock, _LOCK_FILE_BYTES, 0))["groups"]
        earlier = Hierarchy(before["version"], before["directories"])
        _clear(earlier, directory)
        earlier.remove()
    hierarchy = open_hierarchy(config["name"], (os.getpid(), config["hub_pid"]))
    _clear(hierarchy, directory)
    os.makedirs(os.path.join(directory, "s"), mode=0o700)
    os.chdir(directory)
    groups = {"version": hierarchy.version, "directories": dict(hierarchy.directories)}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "directory": directory, "groups": groups}).encode() + b"\n", 0)
    return hierarchy


def _clear(hierarchy: Hierarchy, directory: str) -> None:
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    groups = hierarchy.groups()
    while groups and time.monotonic() < deadline:
        for group in groups:
            group.kill()
        groups = [group for group in groups if not group.remove()]
        time.sleep(0.01 if groups else 0.0)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


async def _serve(config: Mapping[str, Any], hierarchy: Hierarchy) -> None:
    keeper = Keeper(config, hierarchy)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, keeper.finish)
    try:
        await keeper.serve(_ready)
    finally:
        _clear(hierarchy, config["directory"])
        hierarchy.remove()


def _ready() -> None:
    _say({"ready": True, "pid": os.getpid()})
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)


def _say(message: Mapping[str, Any]) -> None:
    # A hub that is gone by now need not be told; the first one to come will be.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(message).encode() + b"\n")
