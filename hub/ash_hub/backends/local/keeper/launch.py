"""A launch plan turned into a child process.

A plan is what the hub's launcher computed: words, of which `@fd:NAME@` stands for the number of a descriptor that
the keeper opens. NAME is a file of the plan, or `listen` (the sandbox's socket), `up` (closed when its main process
runs), `status` (what the launcher says of itself), or `args` (the options of the launcher, NUL-separated).
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import resource
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .veil import veil

__all__ = ["Child", "LaunchError", "bind_listener", "launch"]

_MARK = re.compile(r"@fd:([a-z0-9_.-]+)@")
_BACKLOG = 512
_EMPTY = "v/empty"


class LaunchError(Exception):
    """A step of a launch failed; the message is for a person."""

    def __init__(self, step: str, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class Child:
    """A started launcher and the keeper's ends of its pipes."""

    process: subprocess.Popen[bytes]
    pidfd: int
    log: int
    up: int
    status: int


def bind_listener(path: str) -> socket.socket:
    """Bind and listen on `path`, relative to the keeper's directory, so that a sandbox cannot ask where that is."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise LaunchError("listen", f"could not listen on {path}: {error.strerror}") from error
    return listener


def launch(plan: Mapping[str, Any], listener: socket.socket, entrances: Sequence[str]) -> Child:
    """Start the plan's process.

    Args:
        entrances: Files of control groups that the process joins before anything else.

    Raises:
        LaunchError: The process could not be started.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        log, log_end = _pipe(ours, theirs)
        up, up_end = _pipe(ours, theirs)
        status, status_end = _pipe(ours, theirs)
        numbers = {"listen": listener.fileno(), "up": up_end, "status": status_end}
        for name, content in plan["files"].items():
            numbers[name] = _memory_file(name, base64.b64decode(content), theirs)
        arguments = [_substituted(word, numbers) for word in plan.get("args", ())]
        if arguments:
            numbers["args"] = _memory_file("args", b"".join(word.encode() + b"\0" for word in arguments), theirs)
        try:
            process = subprocess.Popen(
                [_substituted(word, numbers) for word in plan["argv"]],
                stdin=subprocess.DEVNULL,
                stdout=log_end,
                stderr=log_end,
                pass_fds=tuple(numbers.values()),
                env={key: _substituted(value, numbers) for key, value in plan.get("env", {}).items()},
                cwd=plan.get("cwd", "/"),
                start_new_session=True,
                umask=0o022,
                preexec_fn=_preparation(plan.get("rlimits", {}), entrances, _veiled(plan)),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise LaunchError("launch", f"could not start {plan['argv'][0]}: {error}") from error
        ours.pop_all()
    return Child(process, os.pidfd_open(process.pid), log, up, status)


def _veiled(plan: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Make the directories for what is to be seen under another name, and return what goes where."""
    for target, _ in plan.get("veils", ()):
        os.makedirs(target, mode=0o700, exist_ok=True)
    if plan.get("veils"):
        os.makedirs(_EMPTY, mode=0o700, exist_ok=True)
    return plan.get("veils", ())


def _preparation(
    rlimits: Mapping[str, int], entrances: Sequence[str], veils: Sequence[tuple[str, str]]
) -> Callable[[], None]:
    empty = os.path.abspath(_EMPTY)

    def prepare() -> None:
        for path in entrances:
            descriptor = os.open(path, os.O_WRONLY)
            os.write(descriptor, b"0")
            os.close(descriptor)
        if veils:
            veil(veils, empty)
        for name, wanted in rlimits.items():
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(number, (value, value))

    return prepare


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    ours.callback(os.close, reading)
    theirs.callback(os.close, writing)
    os.set_blocking(reading, False)
    return reading, writing


def _memory_file(name: str, content: bytes, stack: contextlib.ExitStack) -> int:
    number = os.memfd_create(name, os.MFD_CLOEXEC)
    stack.callback(os.close, number)
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _substituted(word: str, numbers: Mapping[str, int]) -> str:
    match = _MARK.fullmatch(word)
    return word if match is None else str(numbers[match[1]])
