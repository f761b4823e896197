"""The fork parent: loads what is to be forked, warms it, and forks a process for each launch that it is handed.

It is started behind walls of its own, with one socket, to the helper. The first message there is
`{"source", "given"}`: Python that defines `load(given)`, which returns why this cannot be forked, or None, and
`main()`, which is what a sandbox runs. It answers `ready`, or why it cannot be forked. Each other message is
descriptors for a launch: the channel, and a socket from which the namespaces come that are made for it. It reads
nothing from a channel: what a sandbox is given is read by the process that is forked for it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from . import forked, kernel

__all__ = ["main"]

_MOST_BYTES = 180_000
_MOST_DESCRIPTORS = 64
_MOST_WORDS = 2000
_SETTLE_SECONDS = 2.0
"""For threads of the warm-up to end."""
_PAUSE_SECONDS = 0.01


def main() -> None:
    door = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(door.fileno(), False)
    kernel.set_dumpable(0)
    order = json.loads(door.recv(_MOST_BYTES))
    run, problem = _loaded(order["source"], order["given"])
    problem = problem or _why_not(door.fileno())
    if run is None or problem is not None:
        door.send((problem or "it does not say why")[:_MOST_WORDS].encode())
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked here
    gc.collect()
    gc.freeze()
    kernel.fold_pages()
    door.send(b"ready")
    while True:
        there, descriptors, _, _ = socket.recv_fds(door, _MOST_BYTES, _MOST_DESCRIPTORS)
        if not there:
            return
        if kernel.fork() == 0:
            door.close()
            forked.become(descriptors[0], descriptors[1], run)
        for descriptor in descriptors:
            os.close(descriptor)


def _loaded(source: str, given: Mapping[str, Any]) -> tuple[Callable[[], int] | None, str | None]:
    names: dict[str, Any] = {"__name__": "__ash__"}
    try:
        exec(compile(source, "<fork>", "exec"), names)
        return names["main"], names["load"](given)
    except Exception as error:
        traceback.print_exc()
        return None, f"it could not be loaded: {type(error).__name__}: {error}"


def _why_not(door: int) -> str | None:
    """Return what a fork would share or lose, or None."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (threads := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
    if threads > 1:
        return f"{threads - 1} threads run on after its warm-up, and a fork would be without them"
    kept = [link for number, link in _open() if number > 2 and number != door]
    return f"it keeps descriptors open after its warm-up: {', '.join(sorted(kept))}" if kept else None


def _open() -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that the list itself was read by
            found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found
