"""A fair scheduler: each turn of the event loop begins a few requests of each principal, and reads a few answers.

Further requests wait in their principal's own queue. So a flood of one principal delays the others by a few requests
and not by all of them, and what arrives for the others is read in between.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Turns", "Waiter"]

log = logging.getLogger(__name__)


class Waiter(Protocol):
    def begin(self) -> None:
        """Called once, when its turn comes."""
        ...


class Turns:
    """Begins requests in turns.

    A queue has no limit of its own: each of its requests holds a connection and counts among its principal's.

    Args:
        soon: Calls a function in the next turn of the loop, never in this one.
        part: The work of each principal that may begin in a turn of the loop, in calls. With more, a call beside a
            flood waits longer; with less, the kernel wakes a sandbox's process separately for each call of a flood.
    """

    def __init__(self, soon: Callable[[Callable[[], None]], Any], part: int = 4) -> None:
        self._soon = soon
        self._part = part
        self._begun: dict[str, float] = {}
        """Work begun by principal, less `part` for each turn that was counted since."""
        self._queues: dict[str, OrderedDict[Waiter, float]] = {}
        """The waiting requests by principal, with their work."""
        self._going = False
        """Whether turns are counted, as they are while a request waits. Where none does, a principal's requests begin
        at once until they are a part together; the next one has turns counted, and so waits for one short turn."""

    def take(self, owner: str, waiter: Waiter, work: float = 1) -> None:
        """Begin a request now if its principal has work left in this turn, else queue it.

        Args:
            work: Its weight; a call is 1.
        """
        begun = self._begun
        done = begun.get(owner, 0)
        if done < self._part:
            begun[owner] = done + work
            waiter.begin()
            return
        queue = self._queues.get(owner)
        if queue is None:
            queue = self._queues[owner] = OrderedDict()
        queue[waiter] = work
        if not self._going:
            self._going = True
            self._soon(self._next)

    def spend(self, owner: str, work: float) -> None:
        """Count work that needed no turn, so that the principal begins less in the next ones."""
        self._begun[owner] = self._begun.get(owner, 0) + work

    def leave(self, owner: str, waiter: Waiter) -> None:
        """Remove a waiting request; no-op for one that has begun."""
        queue = self._queues.get(owner)
        if queue is not None and queue.pop(waiter, None) is not None and not queue:
            del self._queues[owner]

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._queues.values()))

    def _next(self) -> None:
        part, begun = self._part, self._begun
        for owner, work in list(begun.items()):
            if work > part:
                begun[owner] = work - part
            else:
                del begun[owner]
        for owner in list(self._queues):
            self._begin_more(owner)
        self._going = bool(self._queues)
        if self._going:
            self._soon(self._next)

    def _begin_more(self, owner: str) -> None:
        queue, begun = self._queues.get(owner), self._begun
        while queue and (done := begun.get(owner, 0)) < self._part:
            waiter, work = queue.popitem(last=False)
            begun[owner] = done + work
            try:
                waiter.begin()
            except Exception:
                log.exception("a request could not begin, for a defect in the hive itself")
        if queue is not None and not queue:
            del self._queues[owner]
