"""Notices a host that has vanished: not one whose process is slow, which the network stack answers for.

While nothing is under way the kernel probes by itself. While something is, it sends it again for a quarter of an hour;
its one bound for that, TCP_USER_TIMEOUT, would also end connections to a process that reads nothing for so long. So
what the kernel knows of its attempts is looked at instead.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, Protocol

__all__ = ["is_silent", "keep_alive"]

_TCP_INFO: Final = struct.Struct("=8B12I")
"""The beginning of Linux's `struct tcp_info`, up to the time of the last ACK."""
_RETRANSMITS: Final = 2
_PROBES: Final = 3
_LAST_ACK: Final = 19
_PROBES_BEFORE_END: Final = 3


class Socket(Protocol):
    """What there is of a socket where a loop has wrapped it."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def keep_alive(its_socket: Socket, seconds: int) -> None:
    """Have the kernel end a connection whose other host answers no probe for about so long."""
    its_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, seconds // (_PROBES_BEFORE_END + 1))
    for name, value in {"KEEPIDLE": every, "KEEPINTVL": every, "KEEPCNT": _PROBES_BEFORE_END}.items():
        option = getattr(socket, f"TCP_{name}", None)  # not every system has all
        if option is not None:
            its_socket.setsockopt(socket.IPPROTO_TCP, option, value)


def is_silent(its_socket: Socket, seconds: int) -> bool:
    """Say whether the kernel sends something again, and had no answer for so long; False where it does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return False
    try:
        told = its_socket.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO.size)
    except OSError:  # it has ended
        return False
    if len(told) < _TCP_INFO.size:
        return False
    info = _TCP_INFO.unpack(told)
    return bool(info[_RETRANSMITS] or info[_PROBES]) and info[_LAST_ACK] >= 1000 * seconds
