"""Log lines that name clients and their protocol when they connect: bounded in number and in length."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

from mcp_types import Implementation

__all__ = ["ClientLog"]

log = logging.getLogger("ash.hub")

MAX_TEXT_CHARS: Final = 64
MAX_KNOWN: Final = 4096
LINES_A_MINUTE: Final = 60
AGAIN_SECONDS: Final = 3600.0


class ClientLog:
    """Writes one line for each connection, at most `LINES_A_MINUTE`; what was left out is counted in the next."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[Hashable, float] = OrderedDict()
        """When each connection was written down; the least recent first."""
        self._minute = -1
        self._lines = 0
        self._left_out = 0

    def note(self, connection: Hashable, client: Implementation | None, protocol: str, owner: str) -> None:
        """Write down who connects, unless that connection was within the hour.

        Args:
            connection: A session's id; or what there is instead where the protocol has no sessions.
        """
        now = self._clock()
        if now - self._known.get(connection, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        self._known[connection] = now
        self._known.move_to_end(connection)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        if not self._may_write(now):
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        said = {"client": "unknown", "version": ""}
        if client is not None:
            said = {"client": _shown(client.name), "version": _shown(client.version)}
        extra = {**said, "protocol": _shown(protocol), "owner": owner, **({"left_out": left_out} if left_out else {})}
        log.info("client connected", extra=extra)

    def _may_write(self, now: float) -> bool:
        minute = int(now // 60)
        if minute != self._minute:
            self._minute, self._lines = minute, 0
        self._lines += 1
        return self._lines <= LINES_A_MINUTE


def _shown(text: str) -> str:
    """Return a text of a client's without what could end a line or move a cursor."""
    cut = text[:MAX_TEXT_CHARS]
    return "".join(character if character.isprintable() else "?" for character in cut)
