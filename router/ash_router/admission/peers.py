"""The user at the other end of a loopback connection, by the kernel's table of sockets.

Asked of the kernel by netlink (`sock_diag`), or read from `/proc/net/tcp` where that is not allowed.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

__all__ = ["Address", "Peers", "ask_kernel", "peer_user", "read_proc"]

Address = tuple[str, int]

_SOCK_DIAG: Final = 4
_BY_FAMILY: Final = 20
_REQUEST: Final = 1
_ERROR: Final = 2
_ALL_STATES: Final = 0xFFFFFFFF
_NO_COOKIE: Final = b"\xff" * 8
_ENOENT: Final = 2
_BOUND_SECONDS: Final = 1.0
_TABLES: Final = Path("/proc/self/net")


def peer_user(client: Address, server: Address) -> int | None:
    """Return the user id that owns the client's end of a connection to `server`.

    None for a socket without an inode: its process has closed it, and the kernel shows it as root's.

    Raises:
        OSError: This host does not permit the look-up.
    """
    try:
        return ask_kernel(client, server)
    except OSError:
        return read_proc(client, server)


class Peers:
    """Remembers for each connection whether its peer is one of the users that may come in.

    It remembers by the connection and not by its address, which may be another process's a moment later.
    """

    def __init__(self, users: Iterable[int], look_up: Callable[[Address, Address], int | None] = peer_user) -> None:
        self._users = frozenset(users)
        self._look_up = look_up
        self._known: WeakKeyDictionary[object, bool] = WeakKeyDictionary()

    def welcome(self, connection: object | None, client: Address | None, server: Address | None) -> bool:
        """Return whether the peer is one of the users; False if its user cannot be found out."""
        known = self._known.get(connection) if connection is not None else None
        if known is None:
            known = self._ask(client, server)
            if connection is not None:
                self._known[connection] = known
        return known

    def problem(self) -> str | None:
        """Return why peers cannot be looked up on this host, or None; it tries with a connection of its own."""
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                with socket.create_connection(listener.getsockname(), timeout=_BOUND_SECONDS) as probe:
                    found = self._look_up(probe.getsockname(), listener.getsockname())
        except OSError as exc:
            return exc.strerror or str(exc)
        return None if found == os.geteuid() else f"this host says that our own socket belongs to user {found}"

    def _ask(self, client: Address | None, server: Address | None) -> bool:
        if client is None or server is None:
            return False
        with suppress(OSError, ValueError):
            return self._look_up(client, server) in self._users
        return False


def _plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def ask_kernel(client: Address, server: Address) -> int | None:
    """Do as `peer_user`, by netlink."""
    near, far = _plain(client[0]), _plain(server[0])
    family = socket.AF_INET if near.version == 4 else socket.AF_INET6
    ports = struct.pack("!HH", client[1], server[1])
    identity = ports + near.packed.ljust(16, b"\0") + far.packed.ljust(16, b"\0") + struct.pack("=I", 0) + _NO_COOKIE
    body = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, _ALL_STATES) + identity
    head = struct.pack("=IHHII", 16 + len(body), _BY_FAMILY, _REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as link:
        link.settimeout(_BOUND_SECONDS)
        link.send(head + body)
        answer = link.recv(4096)
    (kind,) = struct.unpack_from("=H", answer, 4)
    if kind == _ERROR:
        (code,) = struct.unpack_from("=i", answer, 16)
        if code == -_ENOENT:
            return None
        raise OSError(-code, os.strerror(-code))
    if kind != _BY_FAMILY or answer[20:24] != ports:
        return None  # a listener is what the kernel finds where there is no such connection
    user, inode = struct.unpack_from("=II", answer, 80)
    return user if inode else None


def read_proc(client: Address, server: Address) -> int | None:
    """Do as `peer_user`, by reading both tables: a client may reach an IPv4 address through an IPv6 socket."""
    has_table = False
    for table in ("tcp", "tcp6"):
        try:
            lines = (_TABLES / table).read_text(encoding="ascii").splitlines()[1:]
        except FileNotFoundError:
            continue
        has_table = True
        wanted = [f"{_hex(_plain(host), table)}:{port:04X}" for host, port in (client[:2], server[:2])]
        for line in lines:
            fields = line.split()
            if fields[1:3] == wanted:
                return int(fields[7]) if int(fields[9]) else None
    if not has_table:
        raise FileNotFoundError(_ENOENT, "neither sock_diag nor /proc/net/tcp can be used here")
    return None


def _hex(address: ipaddress.IPv4Address | ipaddress.IPv6Address, table: str) -> str:
    """Write an address as `/proc/net` does: words of 32 bits in the machine's own order."""
    raw = address.packed
    if table == "tcp6" and address.version == 4:
        raw = bytes(10) + b"\xff\xff" + raw
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{word:08X}" for word in words)
