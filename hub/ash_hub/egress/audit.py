"""Reports of what was decided of a sandbox's requests, at a bounded rate; those left out are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .names import Address, Target

__all__ = ["Audit", "Decision", "Record"]

Record = Mapping[str, Any]

_PER_SECOND = 50
_BURST = 200


@dataclass(slots=True)
class Decision:
    """One request and what became of it. Filled in as it is found out."""

    method: str | None = None
    target: Target | None = None
    """None while it could not be read."""
    address: Address | None = None
    """The one that was dialled, or the one for which it was refused."""

    def record(self, verdict: str, reason: str, message: str) -> dict[str, Any]:
        return {
            "decision": verdict,
            "reason": reason,
            "message": message,
            "method": self.method,
            "target": None if self.target is None else str(self.target),
            "address": None if self.address is None else str(self.address),
        }


class Audit:
    """Hands records on, at a bounded rate: a sandbox that floods the proxy must not flood the logs.

    Args:
        send: Takes a record; False if it could not.
    """

    def __init__(self, send: Callable[[Record], bool], **always: Any) -> None:
        self._send = send
        self._always: dict[str, Any] = always
        self._left = float(_BURST)
        self._at = time.monotonic()
        self._omitted = 0

    def always(self, **fields: Any) -> None:
        """Have these fields in every record from now on."""
        self._always.update(fields)

    def __call__(self, record: Record) -> None:
        now = time.monotonic()
        self._left = min(_BURST, self._left + (now - self._at) * _PER_SECOND)
        self._at = now
        if self._left < 1:
            self._omitted += 1
            return
        self._left -= 1
        omitted = {"omitted": self._omitted} if self._omitted else {}
        if self._send({"time": round(time.time(), 3), **self._always, **record, **omitted}):
            self._omitted = 0
        else:
            self._omitted += 1
