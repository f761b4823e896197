"""Public addresses told from private ones and from those of this host. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from .names import Address

__all__ = ["NAMEABLE", "Network", "Surroundings", "kind_of", "local_networks4", "local_networks6"]

Network = IPv4Network | IPv6Network

NAMEABLE = frozenset({"loopback", "private", "shared", "documentation", "benchmark", "this_host"})
"""Kinds that a policy can allow by naming one address of them. The others are never let out, whatever a policy says:
they are not the address of a server, hide another address, or, as the metadata services of clouds, hand out keys."""

_TABLE = {
    "unspecified": "0.0.0.0/8 ::/128",
    "loopback": "127.0.0.0/8 ::1/128",
    "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7",
    "shared": "100.64.0.0/10",
    "metadata": "168.63.129.16/32 100.100.100.200/32 192.0.0.192/32 fd00:ec2::254/128 fd20:ce::254/128",
    "link_local": "169.254.0.0/16 fe80::/10",
    "site_local": "fec0::/10",
    "documentation": "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20",
    "benchmark": "198.18.0.0/15 2001:2::/48",
    "multicast": "224.0.0.0/4 ff00::/8",
    "mapped": "::ffff:0:0/96 ::ffff:0:0:0/96",
    "compatible": "::/96",
    "nat64": "64:ff9b::/96 64:ff9b:1::/48",
    "6to4": "192.88.99.0/24 2002::/16",
    "teredo": "2001::/32",
    "reserved": "192.0.0.0/24 240.0.0.0/4 2001::/23 3ffe::/16 5f00::/16 100::/64 100:0:0:1::/64",
}


def _read_table() -> tuple[tuple[Network, str], ...]:
    rows = [(ip_network(text), kind) for kind, networks in _TABLE.items() for text in networks.split()]
    return tuple(sorted(rows, key=lambda row: -row[0].prefixlen))


_KINDS = _read_table()
"""The longest prefix first."""

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


def kind_of(address: Address) -> str | None:
    """Return None for a public address, otherwise what it is."""
    for network, kind in _KINDS:
        if address.version == network.version and address in network:
            return kind
    if isinstance(address, IPv6Address):
        if address not in _GLOBAL_UNICAST:
            return "reserved"
        if (int(address) >> 32) & 0xFFFF_FFFF in _ISATAP:
            return "isatap"
    return None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a decision needs to know of the host."""

    networks: tuple[Network, ...] = ()
    """Addresses that are bound on this host."""
    own_ports: frozenset[int] = frozenset()
    """Ports on which the hive itself listens."""

    def here(self, address: Address) -> bool:
        """Say whether a connection to `address` would end on this host."""
        if address.is_loopback or address.is_unspecified:
            return True
        return any(address.version == network.version and address in network for network in self.networks)


_LEAF = re.compile(r"\|-- ([0-9.]+)")
_LOCAL = re.compile(r"/([0-9]+) host LOCAL")


def local_networks4(text: str) -> Iterable[IPv4Network]:
    """Yield what `/proc/net/fib_trie` calls local: bound addresses, and routes that end here."""
    leaf: IPv4Address | None = None
    for line in text.splitlines():
        if match := _LEAF.search(line):
            leaf = IPv4Address(match[1])
        elif leaf is not None and (match := _LOCAL.search(line)):
            yield IPv4Network((leaf, int(match[1])))


def local_networks6(text: str) -> Iterable[IPv6Network]:
    """Yield the addresses of `/proc/net/if_inet6`."""
    for line in text.splitlines():
        word = line.partition(" ")[0]
        if len(word) == 32:
            yield IPv6Network((int(word, 16), 128))
