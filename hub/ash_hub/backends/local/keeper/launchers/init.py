"""The first process of a sandbox: starts the runner, reaps what it leaves, and ends when the runner ends.

    init.py UP LIFE PROCESSES REAP COMMAND...

UP is a descriptor that is told `init` and closed once COMMAND runs (or told why it could not). LIFE is a pipe to which
only the keeper can write: when the keeper closes it or dies, everything here ends. PROCESSES is a limit on processes
of this user namespace, or 0. REAP is `ns` for the first process of a process namespace, where the kernel ends all
others with it, or `tree` without one. The variable ASH_HOLD_FD names a descriptor that is kept here until the end.
ASH_STDIN_FD, ASH_STDOUT_FD and ASH_STDERR_FD name what COMMAND has as these, and nobody else. ASH_OUTLET_FD names a
socket over which a listener of this network is handed out, at the port of the egress proxy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import sys

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_AWAITED = {*_PASSED_ON, signal.SIGCHLD, signal.SIGIO}
_STANDARD = ("ASH_STDIN_FD", "ASH_STDOUT_FD", "ASH_STDERR_FD")
_PROXY = ("127.0.0.1", 3128)
_BACKLOG = 512


def main(arguments: list[str]) -> None:
    up, life, processes, reap, *command = arguments
    report, lifeline = int(up), int(life)
    hold = os.environ.pop("ASH_HOLD_FD", None)
    for descriptor in (report, lifeline, *(() if hold is None else (int(hold),))):
        os.set_inheritable(descriptor, False)
    usual = watch(lifeline)
    os.write(report, b"init\n")
    harden(tree=reap == "tree")
    if int(processes):
        resource.setrlimit(resource.RLIMIT_NPROC, (int(processes), int(processes)))
    if (outlet := os.environ.pop("ASH_OUTLET_FD", None)) is not None:
        _hand_out_listener(int(outlet))
    standard = [(number, int(os.environ.pop(name))) for number, name in enumerate(_STANDARD) if name in os.environ]
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)
        for number, descriptor in standard:
            os.dup2(descriptor, number)
            os.close(descriptor)
        _run(report, command)
    for _, descriptor in standard:
        os.close(descriptor)
    # Last, since whoever waits for `up` to close may send a signal at once.
    listener = os.environ.pop("ASH_LISTEN_FD", None)
    if listener is not None:
        os.close(int(listener))
    os.close(report)
    status = until_ended(child, lifeline)
    if reap == "tree":
        _end_tree()
    os._exit(exit_code(status))


def _hand_out_listener(outlet: int) -> None:
    """Listen where programs here look for the egress proxy, which accepts on that socket from outside."""
    import socket

    with socket.socket(fileno=outlet) as out, socket.create_server(_PROXY, backlog=_BACKLOG) as listener:
        socket.send_fds(out, [b"+"], [listener.fileno()])


def watch(lifeline: int) -> set[signal.Signals]:
    """Have signals wait from here on, with one for the end of the pipe; return those that waited before."""
    # All signals are waited for: a handler's would be lost between its check and the wait.
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)  # from here on its end is told by SIGIO
    return {signal.Signals(number) for number in usual}


def exit_code(status: int | None) -> int:
    """Return what the first process ends with, for what `until_ended` returned."""
    if status is None:
        return 128 + signal.SIGKILL
    return os.waitstatus_to_exitcode(status) % 256 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def until_ended(child: int, lifeline: int) -> int | None:
    """Pass signals on until the child has ended, and return its status; None when all is to end."""
    while not _is_closed(lifeline):
        number = signal.sigwait(_AWAITED)
        if number == signal.SIGCHLD:
            if (status := _reaped(child)) is not None:
                return status
        elif number != signal.SIGIO:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
    return None


def harden(*, tree: bool) -> None:
    """Keep this process out of reach of what runs inside: its memory, environment and descriptors are not readable."""
    try:
        import ctypes

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, OSError, AttributeError) as error:
        print(f"init: the first process is not hardened: {error}", file=sys.stderr)  # noqa: T201 - the sandbox's log
        return
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if tree:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _is_closed(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def _run(report: int, command: list[str]) -> None:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(report, f"could not run {command[0]}: {error.strerror}".encode())
    finally:
        os._exit(127)


def _reaped(child: int) -> int | None:
    """Reap what has ended, and return the status of the child if it is among that."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if ended[0] == child:
                found = ended[1]
    return found


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
