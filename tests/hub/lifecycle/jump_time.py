"""An event loop whose time jumps to the next timer instead of passing, for tests that wait for minutes."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

__all__ = ["JumpLoop", "run_in_jump_time"]


class _JumpSelector(selectors.DefaultSelector):
    """Waits for nothing: whatever the loop would have waited is added to its time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("every task waits for another one: nothing can happen any more")
            self.now += max(0.0, timeout)
        return ready


class JumpLoop(asyncio.SelectorEventLoop):
    """A loop on its own time, in seconds from 0. It serves no sockets, threads or processes."""

    def __init__(self) -> None:
        self._jumps = _JumpSelector()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now


def run_in_jump_time(test: Callable[[], Awaitable[Any]]) -> None:
    anyio.run(test, backend="asyncio", backend_options={"loop_factory": JumpLoop})
