"""The ledger: which calls are in flight, and when each sandbox was last called.

The hub's controller, a graceful stop and the metrics read it; the relay and the hub's own calls write it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ash_mcp.errors import AshError
from ash_mcp.types import SandboxId

__all__ = ["Call", "Ledger"]


@dataclass(slots=True, eq=False)
class Call:
    """One call in flight."""

    sandbox_id: SandboxId | None
    """None where only another replica knows it."""
    owner: str
    abort: Callable[[AshError], None] | None
    """Ends the call with a typed failure; None where nobody waits for it."""
    guests: str | None = None
    """`Principal.guests` of its caller, for whom it counts as well."""


class Ledger:
    """The calls of this process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._total = 0
        self._calls: dict[SandboxId | None, set[Call]] = {}
        self._last: dict[SandboxId, float] = {}
        """As far as they were taken for the store, or learnt from it."""
        self.in_flight: dict[str, int] = {}
        """How many calls of each owner, or of the guests of one sandbox together, are in flight."""
        self._changed: dict[SandboxId, float] = {}
        """The last calls of this process since."""
        self._closed: dict[SandboxId, AshError] = {}

    @contextmanager
    def closed(self, sandbox_id: SandboxId, interrupted: AshError, refused: AshError) -> Generator[None]:
        """End every call to a sandbox with `interrupted`, and have those that come meanwhile fail as `refused`."""
        self._closed[sandbox_id] = refused
        try:
            self.abort(sandbox_id, interrupted)
            yield
        finally:
            self._closed.pop(sandbox_id, None)

    def refusal(self, sandbox_id: SandboxId | None) -> AshError | None:
        """Return what a call that begins now fails with; None: it may begin."""
        return self._closed.get(sandbox_id) if sandbox_id is not None and self._closed else None

    def begin(
        self,
        sandbox_id: SandboxId | None,
        owner: str,
        abort: Callable[[AshError], None] | None = None,
        guests: str | None = None,
    ) -> Call:
        """Count a call as in flight until `end`."""
        self._total += 1
        call = Call(sandbox_id, owner, abort, guests)
        calls, counts = self._calls.get(sandbox_id), self.in_flight
        if calls is None:
            self._calls[sandbox_id] = {call}
        else:
            calls.add(call)
        counts[owner] = counts.get(owner, 0) + 1
        if guests is not None:
            counts[guests] = counts.get(guests, 0) + 1
        return call

    def end(self, call: Call) -> None:
        """Count it no longer; idempotent."""
        sandbox_id = call.sandbox_id
        calls = self._calls.get(sandbox_id)
        if calls is None or call not in calls:
            return
        calls.remove(call)
        if not calls:
            del self._calls[sandbox_id]
        self._uncount(call.owner)
        if call.guests is not None:
            self._uncount(call.guests)
        if sandbox_id is not None:
            self._changed[sandbox_id] = self._clock()

    def _uncount(self, owner: str) -> None:
        left = self.in_flight[owner] - 1
        if left:
            self.in_flight[owner] = left
        else:
            del self.in_flight[owner]

    def note_use(self, sandbox_id: SandboxId) -> None:
        """Take what is no call, such as typing in a terminal, for one that has just ended: the sandbox is not idle."""
        self._changed[sandbox_id] = self._clock()

    def abort(self, sandbox_id: SandboxId, error: AshError) -> int:
        """End every call to a sandbox with `error` and return how many there were."""
        return self._abort(self._calls.get(sandbox_id, ()), error)

    def abort_all(self, error: AshError) -> int:
        return sum(self._abort(calls, error) for calls in list(self._calls.values()))

    def busy(self, sandbox_id: SandboxId) -> bool:
        return sandbox_id in self._calls

    def last_call(self, sandbox_id: SandboxId) -> float | None:
        """When a sandbox was last called or last answered, in seconds since the epoch."""
        if self.busy(sandbox_id):
            return self._clock()
        return max((last[sandbox_id] for last in (self._last, self._changed) if sandbox_id in last), default=None)

    def take_changed_last_calls(self) -> dict[SandboxId, float]:
        """Return the last calls that changed since this was last asked, for the store; one in flight counts as now."""
        for sandbox_id in self._calls:
            if sandbox_id is not None:
                self._changed[sandbox_id] = self._clock()
        changed, self._changed = self._changed, {}
        self.learn_last_calls(changed)
        return changed

    def learn_last_calls(self, calls: Mapping[SandboxId, float]) -> None:
        """Take over the times of last calls that other replicas have stored."""
        for sandbox_id, at in calls.items():
            self._last[sandbox_id] = max(at, self._last.get(sandbox_id, at))

    def forget(self, sandbox_id: SandboxId) -> None:
        """Drop what is known of a sandbox that has ended."""
        self._last.pop(sandbox_id, None)
        self._changed.pop(sandbox_id, None)

    @property
    def total(self) -> int:
        """How many calls this process has begun."""
        return self._total

    def __len__(self) -> int:
        return sum(len(calls) for calls in self._calls.values())

    @staticmethod
    def _abort(calls: Iterable[Call], error: AshError) -> int:
        count = 0
        for call in list(calls):
            if call.abort is not None:
                call.abort(error)
                count += 1
        return count
