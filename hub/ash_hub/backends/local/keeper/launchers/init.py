"""The first process of a sandbox: starts the runner, reaps what it leaves, and ends when the runner ends.

    init.py UP PROCESSES REAP COMMAND...

UP is a descriptor that is told `init` and closed once COMMAND runs (or told why it could not). PROCESSES is a limit
on processes of this user namespace, or 0. REAP is `ns` for the first process of a process namespace, where the
kernel ends all others with it, or `tree` without one: there END_TREE does what SIGKILL does in a namespace, and the
keeper's death is told by it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
END_TREE = signal.SIGUSR2
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main(arguments: list[str]) -> None:
    up, processes, reap, *command = arguments
    report = int(up)
    os.set_inheritable(report, False)
    os.write(report, b"init\n")
    _harden(tree=reap == "tree")
    if int(processes):
        resource.setrlimit(resource.RLIMIT_NPROC, (int(processes), int(processes)))
    child = 0
    is_killed = False

    def end(number: int, _: FrameType | None) -> None:
        nonlocal is_killed
        del number
        is_killed = True
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    if reap == "tree":
        signal.signal(END_TREE, end)
    child = os.fork()
    if child == 0:
        _run(report, command)
    if is_killed:
        os.kill(child, signal.SIGKILL)

    def forward(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _ENDING:
        signal.signal(number, forward)
    # Last, since whoever waits for `up` to close may send a signal at once.
    listener = os.environ.pop("ASH_LISTEN_FD", None)
    if listener is not None:
        os.close(int(listener))
    os.close(report)
    status = _reaped(child)
    if reap == "tree":
        _end_tree()
    if is_killed:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(os.waitstatus_to_exitcode(status) % 256 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _harden(*, tree: bool) -> None:
    """Keep this process out of reach of what runs inside.

    Its memory and environment are not readable then, and nobody can make it outlive the keeper.
    """
    try:
        import ctypes

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, OSError, AttributeError) as error:
        print(f"init: the first process is not hardened: {error}", file=sys.stderr)  # noqa: T201 - the sandbox's log
        return
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if tree:
        prctl(_PR_SET_PDEATHSIG, END_TREE, 0, 0, 0)
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _run(report: int, command: list[str]) -> None:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(report, f"could not run {command[0]}: {error.strerror}".encode())
    finally:
        os._exit(127)


def _reaped(child: int) -> int:
    while True:
        pid, status = os.wait()
        if pid == child:
            return status


def _end_tree() -> None:
    """Kill every descendant: those whose parents are gone have become children of this process."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.wait()


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


if __name__ == "__main__":
    main(sys.argv[1:])
