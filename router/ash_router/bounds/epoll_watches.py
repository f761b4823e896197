"""Places in uvloop's epoll, taken before uvloop asks for them.

The kernel bounds how many descriptors all processes of one user have in epolls together, sandboxes included, and
libuv aborts the process when it is refused a place. It asks for one when it first watches a descriptor, and again
after it had stopped. One that has its place already is only changed, which needs nothing. So whoever makes a
connection takes its place here first, and is refused with an error. Other loops raise by themselves.

Not covered: what uvloop connects itself (TCP, Redis), and its own pauses under TLS.
"""

from __future__ import annotations

import asyncio
import functools
import os
import select
import socket
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

__all__ = ["connected", "pause", "require_room", "resume", "take_place", "turn_away"]

_START_PLACES: Final = 64
"""More than a hive that starts takes: its listener alone has 32."""
_LINGER_SECONDS: Final = 1.0
_MOST_LINGERING: Final = 64
_UNREAD_BYTES: Final = 65_536

_RESERVED: Final = 32
"""Places kept for connections to sandboxes and to the keeper, so that calls go on while there are no others."""

_lingering: set[socket.socket] = set()


class _Places:
    """The epoll of one uvloop, and places in another one that are given up for it."""

    def __init__(self, backend: int) -> None:
        self.epoll = select.epoll.fromfd(os.dup(backend))  # a descriptor of its own: it is closed with the object
        self._reserve = select.epoll()
        self._held: list[int] = []

    def take(self, descriptor: int) -> None:
        with suppress(FileExistsError):
            self.epoll.register(descriptor, 0)

    def take_reserved(self, descriptor: int) -> None:
        """Take a place, with one of the reserve if there is no other; somebody else may be faster."""
        while True:
            try:
                self.take(descriptor)
            except OSError:
                if not self._held:
                    raise
                self._reserve.unregister(self._held.pop())
            else:
                self._fill()
                return

    def _fill(self) -> None:
        with suppress(OSError):
            for spare in _spare()[len(self._held) :]:
                self._reserve.register(spare, 0)
                self._held.append(spare)


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Places | None] = weakref.WeakKeyDictionary()


def require_room() -> None:
    """Try whether a loop can start now.

    Raises:
        OSError: The kernel has no places left.
    """
    pipe = os.pipe()
    copies = [os.dup(pipe[0]) for _ in range(_START_PLACES)]
    try:
        with select.epoll() as trial:
            for copy in copies:
                trial.register(copy, 0)
    finally:
        for descriptor in (*pipe, *copies):
            os.close(descriptor)


def take_place(descriptor: int) -> None:
    """Have the running loop's epoll hold a descriptor; no-op if it does.

    Raises:
        OSError: The kernel has no place for it.
    """
    places = _places()
    if places is not None:
        places.take(descriptor)


def connected(path: str | os.PathLike[str]) -> socket.socket:
    """Return a connection to a Unix socket that has its place, from the reserve if need be.

    Raises:
        OSError: Nobody listens there, its queue is full, or the kernel has no place for it.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.connect(os.fspath(path))
        places = _places()
        if places is not None:
            places.take_reserved(made.fileno())
    except BaseException:
        made.close()
        raise
    return made


def pause(transport: asyncio.Transport) -> None:
    """Stop reading, and keep the place."""
    if transport.is_closing():
        return
    transport.pause_reading()
    places = _places()
    if places is not None:
        # Else libuv gives the place up at the next byte. Where it has another mask in mind, it is about to set it.
        with suppress(OSError):
            places.epoll.modify(_descriptor(transport), 0)


def resume(transport: asyncio.Transport) -> None:
    """Read again.

    Raises:
        OSError: It had lost its place, since the other side is gone, and there is none.
    """
    if not transport.is_closing():
        take_place(_descriptor(transport))
        transport.resume_reading()


def turn_away(transport: asyncio.Transport, answer: bytes) -> None:
    """Close a new connection that has no place, with a last word for the other side."""
    ours = socket.socket(fileno=os.dup(_descriptor(transport)))
    transport.abort()
    with suppress(OSError):
        ours.send(answer)
        ours.shutdown(socket.SHUT_WR)
    if len(_lingering) >= _MOST_LINGERING:
        ours.close()
        return
    # What it sends is read before the end: bytes that nobody has read would take the answer with them.
    _lingering.add(ours)
    asyncio.get_running_loop().call_later(_LINGER_SECONDS, _end, ours)


def _end(turned_away: socket.socket) -> None:
    _lingering.discard(turned_away)
    with turned_away, suppress(OSError):
        turned_away.recv(_UNREAD_BYTES)


def _descriptor(transport: asyncio.Transport) -> int:
    return transport.get_extra_info("socket").fileno()


def _places() -> _Places | None:
    """Return those of the running loop, or None where it is no uvloop."""
    loop = asyncio.get_running_loop()
    try:
        return _of_loop[loop]
    except KeyError:
        ask: Any = getattr(loop, "_get_backend_id", None)
        places = _of_loop[loop] = None if ask is None else _Places(ask())
        return places


@functools.cache
def _spare() -> Sequence[int]:
    """Return what every reserve of this process is filled with: descriptors that nothing happens on."""
    return [os.eventfd(0) for _ in range(_RESERVED)]
