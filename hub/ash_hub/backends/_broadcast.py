"""One stream of backend events for any number of watchers, none of which can hold up the others."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncIterator

import anyio

from ash_hub.backends.base import BackendEvent, Instance

__all__ = ["Broadcast"]

_QUEUE_LIMIT = 1024


class Broadcast:
    """Hands every published instance to every watcher that began before."""

    def __init__(self, limit: int = _QUEUE_LIMIT) -> None:
        self._limit = limit
        self._watchers: weakref.WeakSet[_Watcher] = weakref.WeakSet()

    def publish(self, instance: Instance) -> None:
        for watcher in list(self._watchers):
            watcher.push(BackendEvent(instance))

    def close(self) -> None:
        """End every watcher once it has read what it was sent."""
        for watcher in list(self._watchers):
            watcher.finish()

    def watch(self) -> AsyncIterator[BackendEvent]:
        watcher = _Watcher(self._limit)
        self._watchers.add(watcher)
        return watcher


class _Watcher(AsyncIterator[BackendEvent]):
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._events: deque[BackendEvent] = deque()
        self._wake = anyio.Event()
        self._finished = False

    def push(self, event: BackendEvent) -> None:
        if len(self._events) >= self._limit:
            self._events.clear()
            event = BackendEvent(None, lost=True)
        if not (self._events and self._events[-1].lost):
            self._events.append(event)
        self._wake.set()

    def finish(self) -> None:
        self._finished = True
        self._wake.set()

    async def __anext__(self) -> BackendEvent:
        while not self._events:
            if self._finished:
                raise StopAsyncIteration
            self._wake = anyio.Event()
            await self._wake.wait()
        return self._events.popleft()
