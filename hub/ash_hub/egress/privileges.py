"""The privileges that the proxy's process gives up before it serves anybody."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import ctypes
import os
import resource
import selectors
import signal

__all__ = ["give_up_privileges", "polling_loop"]

_NOBODY = 65_534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION = 0x20080522


def give_up_privileges(*, tied: bool) -> None:
    """Become nobody if this is root, and be without capabilities and any way back to them.

    Files stay as writable as they are to that user: to nobody where this was root, and to the same user as before
    where it was not. So what is in its place must be right; no wall is behind it.

    Args:
        tied: Whether this process ends with the thread that started it.

    Raises:
        OSError: Capabilities could not be dropped.
    """
    for signal_number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    for encoding in ("ascii", "idna", "latin-1"):
        codecs.lookup(encoding)  # loads it, while this process may still read Python's own files
    if os.geteuid() == 0:
        # Where no other user is mapped, in a container, capabilities are all that can be dropped.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capabilities could not be dropped")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if tied:
        # After the change of user, which clears it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def polling_loop() -> asyncio.AbstractEventLoop:
    """Make a loop that does not wait by epoll: what a user may watch with that, sandboxes may have used up."""
    return asyncio.SelectorEventLoop(selectors.PollSelector())
