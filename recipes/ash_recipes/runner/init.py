"""The part of an init: where the runner is the parent of all orphans, a process of its own reaps them.

Waiting for any child would steal the exit codes of those that the runner and its recipe wait for themselves. So the
first process forks before anything else: it only reaps and passes signals on, and its child is the runner.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["become_if_needed"]

_PR_GET_CHILD_SUBREAPER = 37
_PR_SET_PDEATHSIG = 1
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def become_if_needed() -> None:
    """Return in the process that is to be the runner; where orphans come to this one, that is a child of it."""
    if os.getpid() != 1 and not _is_subreaper():
        return
    waiting = {*_PASSED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    _reap(child, waiting)


def _reap(child: int, waiting: set[signal.Signals]) -> None:
    _let_go_of_descriptors()
    while True:
        number = signal.sigwait(waiting)
        if number in _PASSED_ON:
            os.kill(child, number)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                os._exit(1)
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
            if pid == 0:
                break


def _let_go_of_descriptors() -> None:
    # The listener must close when the runner ends, whatever this process does.
    descriptor = os.environ.get("ASH_LISTEN_FD", "")
    if descriptor.isdecimal():
        os.close(int(descriptor))


def _is_subreaper() -> bool:
    if sys.platform != "linux":
        return False
    found = ctypes.c_int(0)
    return _libc().prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0) == 0 and found.value == 1


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
