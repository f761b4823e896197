"""The sockets on which a hive listens: for its callers, and for the other replicas of it."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from ipaddress import ip_address

from ash_hub.settings import HubSettings
from ash_mcp.errors import ConfigError
from ash_router.replicas.membership import split_address
from ash_router.store.base import SeedAddress

__all__ = ["ReplicaListener", "listen", "listen_for_replicas", "require_redis", "seed_address"]


@dataclass(frozen=True, slots=True)
class ReplicaListener:
    """The internal listener of this replica, and the address at which the others reach it."""

    listener: socket.socket
    address: str
    """What they are told: `host:port`."""


def require_redis(settings: HubSettings) -> None:
    """Refuse settings for replicas that no Redis makes one hive.

    Raises:
        ConfigError: What to set.
    """
    if settings.advertise is not None and settings.redis_url is None:
        raise ConfigError(
            "an address for other hives is of no use without a Redis that they share: set ASH_HUB_REDIS_URL "
            "(--redis-url) too, or leave ASH_HUB_ADVERTISE (--advertise) out"
        )


def listen(host: str, port: int) -> socket.socket:
    """Take the port for callers. Connections are refused, not kept waiting, until it is served: a load balancer then
    tries another replica.

    Raises:
        ConfigError: The port cannot be had; what to do.
    """
    try:
        return _listen(host, port)
    except OSError as exc:
        raise ConfigError(
            f"port {port} of {host} cannot be used: {exc.strerror}. If a hive runs there already, just use it "
            "(ash list); otherwise choose another port with --port"
        ) from exc


def listen_for_replicas(advertise: str | None) -> ReplicaListener:
    """Take a port for the other replicas: where `advertise` says, or on a free port that only this machine reaches.

    Raises:
        ConfigError: The port cannot be had; what to do.
    """
    if advertise is None:
        listener = _listen("127.0.0.1", 0)
        return ReplicaListener(listener, f"127.0.0.1:{listener.getsockname()[1]}")
    host, port = split_address(advertise)
    try:
        return ReplicaListener(_listen_at_or_for(host, port), advertise)
    except OSError as exc:
        raise ConfigError(
            f"port {port} cannot be used for the other hives: {exc.strerror}; choose another in ASH_HUB_ADVERTISE "
            "(--advertise)"
        ) from exc


def _listen_at_or_for(host: str, port: int) -> socket.socket:
    """Listen at an address of this machine, or on all of them for one that leads here some other way."""
    try:
        return _listen(host, port)
    except socket.gaierror:
        pass
    except OSError as exc:
        if exc.errno != errno.EADDRNOTAVAIL:
            raise
    return _listen("::" if ":" in host else "0.0.0.0", port)


def seed_address(settings: HubSettings, listener: socket.socket) -> SeedAddress | None:
    """Return where the seed's gateway reaches the hive that serves `listener`; None: nowhere, as it speaks no TLS."""
    if settings.seed.address is not None:
        host, port = split_address(settings.seed.address)
        return SeedAddress(_bracketed(host), port)
    if settings.tls_cert is not None:
        return None
    host, port = listener.getsockname()[:2]
    return SeedAddress(None if ip_address(host).is_unspecified else _bracketed(host), port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named, asyncio turns Nagle off on what is accepted; else a small answer waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
