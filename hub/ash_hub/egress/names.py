"""Hosts, ports and targets as clients and policies write them, in one accepted spelling each. No I/O.

Resolvers and URL parsers read many more: `0x7f.1`, `2130706433`, `127.1`, full-width digits, a zone after `%`. What
two programs may read in two ways is refused here, not repaired.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from .refusal import Refusal

__all__ = ["Address", "Host", "Target", "parse_authority", "parse_host", "parse_port"]

Address = IPv4Address | IPv6Address
Host = str | Address

_LONGEST_NAME = 253
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_QUAD = re.compile(r"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request wants to go."""

    host: Host
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if isinstance(self.host, IPv6Address) else f"{self.host}:{self.port}"


def parse_host(text: str) -> Host:
    """Return a name in lower case, or an address.

    Raises:
        Refusal: It is neither, or not in the one spelling that everybody reads alike.
    """
    if not text or not text.isascii():
        raise Refusal("odd_name", "host names are ASCII here: write an internationalised name as xn--…")
    if text.startswith("["):
        return _bracketed(text)
    name = text.lower()
    if name.endswith("."):
        raise Refusal("odd_name", "leave out the dot at the end of the host name")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _quad(name)
    if len(name) > _LONGEST_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise Refusal("odd_name", "this is not a host name")
    return name


def _quad(text: str) -> IPv4Address:
    try:
        if _QUAD.fullmatch(text):
            return IPv4Address(text)
    except AddressValueError:
        pass  # four numbers, but one of them over 255: as odd as the rest
    raise Refusal("odd_address", "write an IPv4 address as four decimal numbers without leading zeros")


def _bracketed(text: str) -> IPv6Address:
    inside = text[1:-1]
    try:
        if text.endswith("]") and "%" not in inside:
            return IPv6Address(inside)
    except AddressValueError:
        pass  # told below, with the other spellings that are not accepted
    raise Refusal("odd_address", "write an IPv6 address in brackets and without a zone")


def parse_port(text: str) -> int:
    """Return a port.

    Raises:
        Refusal: It is not a decimal number from 1 to 65535 without leading zeros.
    """
    if not _PORT.fullmatch(text) or int(text) > 65_535:
        raise Refusal("odd_port", "a port is a number from 1 to 65535")
    return int(text)


def parse_authority(text: str, default_port: int | None = None) -> Target:
    """Return the target of `host:port`, or of `host` where there is a default.

    Raises:
        Refusal: A part is missing or oddly written, or there is something before an `@`.
    """
    if "@" in text:
        raise Refusal("userinfo", "leave out the user name and the password before the host")
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
        if default_port is None:
            raise Refusal("odd_port", "name the port")
        return Target(parse_host(host), default_port)
    return Target(parse_host(host), parse_port(port))
