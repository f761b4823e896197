"""The proxy's resolver: looks names up, connects to addresses, and knows the addresses of this host."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Protocol

from .addresses import Network, Surroundings, local_networks4, local_networks6
from .capacity import Share
from .lease import Lease
from .names import Address
from .refusal import Refusal

__all__ = ["Dial", "HostWatch", "LookUps", "Resolve", "SystemResolver", "dial"]

_MOST_THREADS = 65_536
"""More than there are turns to look up: a look-up that has its turn must not wait for a thread."""
_FRESH_SECONDS = 5.0


class Resolve(Protocol):
    """Asks for the addresses of a name, once."""

    def __call__(self, name: str, *, as_host_does: bool) -> Coroutine[Any, Any, Sequence[Address]]:
        """Return its addresses, the best first.

        Raises:
            OSError: It has none.
        """
        ...


class Dial(Protocol):
    """Connects to an address, and only to that."""

    async def __call__(self, address: Address, port: int) -> socket.socket:
        """Return a connected socket.

        Raises:
            OSError: There is no connection.
        """
        ...


class LookUps:
    """The look-ups of one sandbox. One that nobody waits for any more keeps its place until it has ended.

    Args:
        share: How many there may be at once.
        seconds: How long one waits for its turn, and again for its answer.
        lease: None is asked for while this does not hold.
    """

    def __init__(self, resolve: Resolve, share: Share, seconds: float, lease: Lease | None = None) -> None:
        self._resolve = resolve
        self._share = share
        self._seconds = seconds
        self._lease = lease

    @property
    def count(self) -> int:
        """Those that have begun and not ended."""
        return self._share.taken

    async def __call__(self, name: str, *, as_host_does: bool) -> Sequence[Address]:
        """Return the addresses of a name, the best first.

        Raises:
            Refusal: It has none, or they are not known in time.
        """
        try:
            async with asyncio.timeout(self._seconds):
                await self._share.enter()
        except TimeoutError:
            message = "other names that this sandbox has asked for are still being looked up"
            raise Refusal("too_many_look_ups", message, status=429) from None
        try:
            if self._lease is not None:
                await self._lease.held()
        except asyncio.CancelledError:
            self._share.leave()
            raise
        look_up = asyncio.ensure_future(self._resolve(name, as_host_does=as_host_does))
        look_up.add_done_callback(lambda _: self._share.leave())
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(look_up)
        except TimeoutError:
            raise Refusal("unresolved", f"looking up {name} took too long", status=504) from None
        except OSError:
            raise Refusal("unresolved", f"the name {name} could not be resolved", status=502) from None


class SystemResolver:
    """Asks the C library, on threads, since it has no other way. A thread stays in it for as long as it likes."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="resolve")

    async def __call__(self, name: str, *, as_host_does: bool) -> Sequence[Address]:
        # The dot keeps the host's search domains away from names that the policy does not spell out.
        asked = name if as_host_does else f"{name}."
        try:
            answer = asyncio.get_running_loop().run_in_executor(self._threads, _addresses, asked.encode("ascii"))
        except RuntimeError as error:
            raise OSError("there is no thread left to look a name up") from error
        return await answer


def _addresses(name: bytes) -> list[Address]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    texts = dict.fromkeys(str(entry[4][0]) for entry in found)
    # An address with a zone is link-local, and would lose that by losing its zone.
    return [ip_address(text) for text in texts if "%" not in text]


async def dial(address: Address, port: int) -> socket.socket:
    """Connect to `address` as it is."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connection, (str(address), port))
    except BaseException:
        connection.close()
        raise
    return connection


class HostWatch:
    """Knows the addresses that are bound on this host, at most a few seconds old.

    Args:
        own_ports: Ports on which the hive listens, asked for at each look.
    """

    def __init__(self, own_ports: Callable[[], frozenset[int]], proc: Path = Path("/proc")) -> None:
        self._own_ports = own_ports
        self._proc = proc
        self._networks: tuple[Network, ...] = ()
        self._read_at = float("-inf")

    def __call__(self) -> Surroundings:
        """Return what decisions need to know now."""
        if time.monotonic() - self._read_at > _FRESH_SECONDS:
            self._networks = self._read()
            self._read_at = time.monotonic()
        return Surroundings(self._networks, self._own_ports())

    def _read(self) -> tuple[Network, ...]:
        four = local_networks4(_text(self._proc / "net" / "fib_trie"))
        six = local_networks6(_text(self._proc / "net" / "if_inet6"))
        return tuple(dict.fromkeys((ip_network("127.0.0.0/8"), *four, *six)))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""  # no such protocol on this host; a connection to itself still shows when it is made
