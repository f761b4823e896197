"""The retry policy of the SDK: which failed calls are sent again, and after which delay.

Retried are calls that certainly did not run (the hive was not reached, or refused them as retryable), and repeatable
calls whose answer was lost. Every other error is raised at once.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import anyio

from ash_mcp.errors import AshError, AshTimeout, CapacityExceeded, RequestRefused, TransportError

__all__ = ["call_again", "next_delay"]

TRANSPORT_ATTEMPTS: Final = 4
"""Including the first: that no hive answers should be known within about a second."""

_FIRST_DELAY_SECONDS: Final = 0.1
_SHORTEST_WAIT_SECONDS: Final = 0.05

T = TypeVar("T")


def next_delay(error: BaseException, *, attempt: int, remaining_seconds: float, repeatable: bool) -> float | None:
    """Return the seconds to wait before the next attempt, without jitter; None means raise the error.

    Args:
        error: How the last attempt ended.
        attempt: How many attempts have been made.
        remaining_seconds: What is left of the call's bound; a wait that would outlast it is not begun.
        repeatable: Whether running the call twice does no more than running it once.
    """
    delay: float | None = None
    if isinstance(error, CapacityExceeded) and error.retryable:
        delay = max(error.retry_after_seconds, _SHORTEST_WAIT_SECONDS)
    elif isinstance(error, RequestRefused | TransportError) and attempt < TRANSPORT_ATTEMPTS:
        lost = repeatable and isinstance(error, TransportError) and not isinstance(error, AshTimeout)
        if error.retryable or lost:
            delay = _FIRST_DELAY_SECONDS * 2 ** (attempt - 1)
    return delay if delay is not None and delay < remaining_seconds else None


async def call_again(
    attempt: Callable[[], Awaitable[T]],
    *,
    remaining_seconds: Callable[[], float],
    repeatable: bool,
    on_wait: Callable[[AshError, float], None],
) -> T:
    """Run `attempt` until it succeeds or its error is not to be tried again; that error is raised as it is.

    Args:
        attempt: One try.
        remaining_seconds: What is left of the call's bound, asked after each failure.
        repeatable: As for `next_delay`.
        on_wait: Called with the error and the delay before each wait.
    """
    import tenacity

    delays: list[float] = [0.0]

    def should_retry(error: BaseException) -> bool:
        delay = next_delay(error, attempt=len(delays), remaining_seconds=remaining_seconds(), repeatable=repeatable)
        if delay is None:
            return False
        delays.append(delay + random.uniform(0, delay / 4))
        if isinstance(error, AshError):
            on_wait(error, delay)
        return True

    retrying = tenacity.AsyncRetrying(
        sleep=anyio.sleep,
        retry=tenacity.retry_if_exception(should_retry),
        wait=lambda _state: delays[-1],
    )
    return await retrying(attempt)
