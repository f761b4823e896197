"""Limits of one sandbox at the proxy. Sizes are in bytes, durations in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["LimitReached", "Limits", "Meter"]

_GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The defaults let a package manager or a browser work as usual."""

    connections: int = 128
    """At once; further ones are refused."""
    look_ups: int = 8
    """Names that are resolved at once; one that nobody answers counts until the C library gives it up."""
    head_bytes: int = 32 * 1024
    """Of a request's head, and of an answer's."""
    head_seconds: float = 15.0
    """Until a request's head, or a tunnel's ClientHello, is there."""
    connect_seconds: float = 15.0
    """To wait for a turn to resolve a name, again to resolve it, and again to connect."""
    idle_seconds: float = 120.0
    """Without a byte in either direction."""
    total_seconds: float = 4 * 3600.0
    """Of one connection."""
    connection_bytes: int = 16 * _GIB
    """Of one connection, both directions together."""
    sandbox_bytes: int = 256 * _GIB
    """Of all connections of a sandbox in its life."""
    encrypted_hello: bool = False
    """Whether a tunnel to a named domain may carry an Encrypted Client Hello. Browsers, and what imitates them, always
    send one, mostly a decoy. A real one hides the name that counts: a large host of many sites, asked for one that is
    listed, would serve any of its others."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Limits:
        """Return the limits with those of `values` in place of the defaults."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


class LimitReached(Exception):
    """A connection is cut; the message names the limit."""


class Meter:
    """Counts bytes against a limit, and against the limit of what it is a part of."""

    def __init__(self, limit: int, name: str, whole: Meter | None = None) -> None:
        self._limit = limit
        self._name = name
        self._whole = whole
        self.count = 0

    def add(self, count: int) -> None:
        """Count `count` bytes.

        Raises:
            LimitReached: That is more than there may be.
        """
        self.count += count
        if self._whole is not None:
            self._whole.add(count)
        if self.count > self._limit:
            raise LimitReached(self._name)
