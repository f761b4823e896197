"""Network policies: what they say of a target, before its name is resolved, and of an address after. No I/O.

    none                       nothing goes out
    internet                   every public address
    a list of entries          only what an entry names:
        example.com            that name, at public addresses
        *.example.com          every name below it, not itself
        192.0.2.7:8080         that address, even if it is this host's or a private one
        [fd00::7]:8080         likewise
        api.test=10.0.0.7:443  that name, which is not resolved but always stands for that address

A target's port is 80 or 443 unless an entry ends in `:port`; then it is exactly that one. Programs in a sandbox keep
requests to loopback addresses to themselves, so a server of this host is best given a name, as in the last line. Names
that no entry covers are not resolved, since a question to a name server already carries data out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .addresses import NAMEABLE, Surroundings, kind_of
from .names import Address, Host, Target, parse_authority, parse_host
from .refusal import Refusal

__all__ = ["Entry", "Grant", "Policy", "PolicyError", "check_address"]

USUAL_PORTS = frozenset({80, 443})
MOST_ENTRIES = 256
_SHOWN = 200


class PolicyError(ValueError):
    """A policy cannot be read; the message says which part and what is accepted."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a list."""

    host: Host
    ports: frozenset[int] = USUAL_PORTS
    below: bool = False
    """Whether it stands for every name below `host` instead of `host`."""
    address: Address | None = None
    """What `host` stands for, where the entry says so."""

    def covers(self, host: Host) -> bool:
        if self.below:
            return isinstance(host, str) and host.endswith(f".{self.host}")
        return host == self.host


@dataclass(frozen=True, slots=True)
class Grant:
    """A target that may be looked up and dialled, if its address passes."""

    target: Target
    policy: str
    address: Address | None = None
    """The address to dial without looking anything up."""
    named: bool = False
    """Whether the policy names that very address, which lifts what holds for addresses that are not public."""
    as_host_does: bool = False
    """Whether the name is looked up as this host's own programs do, with its hosts file and search domains."""
    server_name: str | None = None
    """The name that TLS must ask for, where only certain names are allowed."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy. `text` is how messages name it."""

    text: str
    entries: tuple[Entry, ...] | None = ()
    """None is everything public."""

    @classmethod
    def parse(cls, value: str | Sequence[str]) -> Policy:
        """Read a policy as a recipe or a spawn gives it.

        Raises:
            PolicyError: An entry is wrong.
        """
        if isinstance(value, str):
            if value not in ("none", "internet"):
                raise PolicyError(f"{value!r} is no network policy: say none, internet, or a list of domains")
            return cls(value, None if value == "internet" else ())
        if len(value) > MOST_ENTRIES:
            raise PolicyError(f"a network policy has {MOST_ENTRIES} entries at most, not {len(value)}")
        text = ", ".join(value)
        return cls(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…", tuple(_entry(part) for part in value))

    @property
    def private(self) -> tuple[str, ...]:
        """The addresses in it that are not public."""
        named = [entry.address or entry.host for entry in self.entries or ()]
        return tuple(str(address) for address in named if not isinstance(address, str) and kind_of(address))

    def is_within(self, other: Policy) -> bool:
        """Say whether `other` grants all that this policy grants.

        A list is not within `internet` where it names an address, another port than 80 and 443, or a name without a
        dot.
        """
        if self.entries is None:
            return other.entries is None
        return all(self._is_granted(entry, port, other) for entry in self.entries for port in entry.ports)

    def _is_granted(self, entry: Entry, port: int, other: Policy) -> bool:
        if entry.below:
            return other._grants_below(entry.host, port)
        target = Target(entry.host, port)
        try:
            theirs = other.grant(target)
        except Refusal:
            return False
        ours = self.grant(target)
        return not ours.named or (theirs.named and theirs.address == ours.address)

    def _grants_below(self, host: Host, port: int) -> bool:
        if self.entries is None:
            return port in USUAL_PORTS
        return any(
            each.below and port in each.ports and (each.host == host or each.covers(host)) for each in self.entries
        )

    def grant(self, target: Target) -> Grant:
        """Say whether `target` may be looked up.

        Raises:
            Refusal: The policy does not cover it.
        """
        if self.entries is None:
            return self._public(target)
        if not self.entries:
            raise Refusal("no_network", "this sandbox has no network")
        covering = [entry for entry in self.entries if entry.covers(target.host)]
        if not covering:
            raise Refusal("not_listed", f"the policy does not list {target.host}")
        fitting = [entry for entry in covering if target.port in entry.ports]
        if not fitting:
            ports = ", ".join(str(port) for port in sorted(frozenset[int]().union(*(e.ports for e in covering))))
            raise Refusal("port", f"the policy allows {target.host} at port {ports}, not {target.port}")
        entry = next((entry for entry in fitting if not entry.below), fitting[0])
        if not isinstance(target.host, str):
            return Grant(target, self.text, address=target.host, named=True)
        literal = not entry.below
        return Grant(
            target,
            self.text,
            address=entry.address,
            named=entry.address is not None,
            as_host_does=literal,
            server_name=target.host,
        )

    def _public(self, target: Target) -> Grant:
        if target.port not in USUAL_PORTS:
            raise Refusal("port", f"the policy allows ports 80 and 443, not {target.port}")
        if not isinstance(target.host, str):
            return Grant(target, self.text, address=target.host)
        if "." not in target.host:
            raise Refusal("local_name", f"{target.host} is not a name of the public internet")
        return Grant(target, self.text)


def check_address(grant: Grant, address: Address, surroundings: Surroundings) -> None:
    """Say whether `address` may be dialled for `grant`.

    Raises:
        Refusal: It is not public and not named, it is the hive's own, or it can never be let out.
    """
    kind = kind_of(address)
    here = surroundings.here(address)
    if here and grant.target.port in surroundings.own_ports:
        raise Refusal("hive", f"{grant.target} is the hive itself")
    if kind is None and here:
        kind = "this_host"
    if kind is None or (grant.named and kind in NAMEABLE):
        return
    # Not which address: what this host's name servers say of private names is not for a sandbox.
    raise Refusal(kind, f"{grant.target.host} is {_EXPLAINED.get(kind, 'not a public address')}")


_EXPLAINED = {
    "loopback": "this host's loopback",
    "private": "on a private network",
    "shared": "on a carrier's private network",
    "link_local": "on the local link",
    "multicast": "a multicast group",
    "metadata": "a cloud's metadata service",
    "this_host": "an address of this host",
    "mapped": "an IPv4 address in disguise",
    "compatible": "an IPv4 address in disguise",
    "nat64": "an IPv4 address in disguise",
    "6to4": "an IPv4 address in disguise",
    "teredo": "an IPv4 address in disguise",
    "isatap": "an IPv4 address in disguise",
}


def _entry(text: str) -> Entry:
    try:
        return _read_entry(text)
    except Refusal as refusal:
        raise PolicyError(f"{text!r} is no entry of a network policy: {refusal.message}") from refusal


def _read_entry(text: str) -> Entry:
    if "=" in text:
        return _read_alias(text)
    below = text.startswith("*.")
    target, explicit = _target(text[2:] if below else text)
    if isinstance(target.host, str):
        if below and "." not in target.host:
            raise PolicyError(f"{text!r} is too wide: name two labels at least after the star")
        return Entry(target.host, frozenset({target.port}) if explicit else USUAL_PORTS, below)
    if below:
        raise PolicyError(f"{text!r}: there is nothing below an address")
    return Entry(target.host, _ports(target, explicit, text))


def _read_alias(text: str) -> Entry:
    name, _, place = text.partition("=")
    host = parse_host(name)
    target, explicit = _target(place)
    if not isinstance(host, str) or isinstance(target.host, str):
        raise PolicyError(f"{text!r}: a name stands before the =, and an address after it")
    return Entry(host, _ports(target, explicit, text), address=target.host)


def _target(text: str) -> tuple[Target, bool]:
    """Read `host` or `host:port`, and say whether the port was given."""
    if text.rpartition(":")[1] and not text.endswith("]"):
        return parse_authority(text), True
    return parse_authority(text, default_port=443), False


def _ports(target: Target, explicit: bool, text: str) -> frozenset[int]:
    """Return the ports of an entry that names an address."""
    assert not isinstance(target.host, str)
    kind = kind_of(target.host)
    if kind is not None and kind not in NAMEABLE:
        raise PolicyError(f"{text!r}: {target.host} can never be reached from a sandbox ({kind})")
    if kind is not None and not explicit:
        raise PolicyError(f"{text!r}: {target.host} is not public, so name the one port that is meant, as in :8080")
    return frozenset({target.port}) if explicit else USUAL_PORTS
