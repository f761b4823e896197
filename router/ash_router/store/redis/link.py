"""Retries Redis commands over a connection that can break: for a bounded time, then a typed failure."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ash_mcp.errors import ConnectFailed, HiveFault

__all__ = ["Link", "why"]

T = TypeVar("T")

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 0.5
_AT_ONCE: Final = 32
_PASSING: Final = ("MISCONF", "MASTERDOWN", "NOREPLICAS", "LOADING", "BUSY", "CLUSTERDOWN", "READONLY", "NOAUTH")
"""Prefixes of error replies that mean that the server cannot serve now, and will later."""
log = logging.getLogger("ash.store")


class Link:
    """One Redis server, as one process reaches it.

    Args:
        shown: Its URL, for messages.
        patience_seconds: How long a step is tried before it fails.
    """

    def __init__(self, shown: str, patience_seconds: float) -> None:
        self.shown = shown
        self._patience = patience_seconds
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._away: tuple[float, str] | None = None
        self._answered_at = 0.0
        self.came_back = asyncio.Event()
        """Set when Redis answers again; for one waiter, who clears it."""

    @property
    def away(self) -> str | None:
        """Why no command succeeds and since when, as text; None while they do."""
        if self._away is None:
            return None
        since, reason = self._away
        return f"Redis at {self.shown} has not answered for {time.monotonic() - since:.0f} s: {reason}"

    async def do(self, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step, again while the connection fails. The step must be safe to repeat.

        Raises:
            ConnectFailed: Redis did not answer in time, or cannot serve for now; retryable.
            HiveFault: It refuses the step itself.
        """
        reasons: list[str] = []
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(self._patience), self._places:
                answer = await _until_done(step, reasons)
        except TimeoutError:
            raise self._failed(reasons[-1] if reasons else "no answer in time", began_at) from None
        except RedisError as exc:
            if not _is_passing(exc):
                raise HiveFault(f"Redis refused a step of the store: {why(exc)}") from exc
            raise self._failed(why(exc), began_at) from exc
        self._answered_at = time.monotonic()
        if self._away is not None:
            log.warning("Redis answers again", extra={"url": self.shown})
            self._away = None
            self.came_back.set()
        return answer

    def _failed(self, reason: str, began_at: float) -> ConnectFailed:
        if self._away is None and self._answered_at > began_at:
            log.warning("a step in Redis failed that others did not", extra={"url": self.shown, "why": reason})
        elif self._away is None:
            log.error("Redis is away", extra={"url": self.shown, "why": reason})
            self._away = (time.monotonic(), reason)
        else:
            self._away = (self._away[0], reason)
        return ConnectFailed(
            f"the hive's store does not answer: {reason}; try again in a moment", retry_after_seconds=1.0
        )


async def _until_done(step: Callable[[], Awaitable[T]], reasons: list[str]) -> T:
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            return await step()
        except (AuthenticationError, AuthorizationError):
            raise
        except (RedisConnectionError, RedisTimeoutError, ReadOnlyError) as exc:
            reasons.append(why(exc))
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _is_passing(error: RedisError) -> bool:
    """Say whether an operator, or time, can mend it."""
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError | OutOfMemoryError):
        return True
    return not isinstance(error, ResponseError) or str(error).startswith(_PASSING)


def why(error: BaseException) -> str:
    """Return a foreign error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
