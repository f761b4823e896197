"""The bounds of the relay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ash_mcp.errors import AshError, CapacityExceeded
from ash_mcp.types import Principal
from ash_router.bounds.effective_limits import EffectiveLimit, effective_limit

__all__ = ["DEFAULT_LIMITS", "HeadMeter", "RelayLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What one connection and one call may take. Every wait and every buffer of the relay is bounded here."""

    max_body_bytes: int = 4 * 1024 * 1024
    """Of a message POSTed to `/mcp`; as the MCP SDK's own servers have it. More is 413."""
    max_direct_body_bytes: int = 64 * 1024 * 1024
    """Of a request to a sandbox's own endpoint, which is not kept here. More is 413."""
    max_head_bytes: int = 64 * 1024
    """Of a request's or a response's head. More is 431."""
    max_headers: int = 100
    head_timeout_seconds: float = 10.0
    """From the first byte of a head that does not come in one piece to its last. Longer is 408."""
    body_timeout_seconds: float = 30.0
    """For the whole body of a message to `/mcp`. Longer is 408."""
    connect_timeout_seconds: float = 5.0
    lookup_timeout_seconds: float = 1.0
    """How long the store is asked for a sandbox that this process does not know."""
    explain_timeout_seconds: float = 1.0
    """How long a caller waits to be told why its sandbox went away."""
    handshake_timeout_seconds: float = 30.0
    """For `initialize` on a sandbox, in the handshake era."""
    max_handshake_bytes: int = 256 * 1024
    """Of a sandbox's answer to `initialize`."""
    idle_stream_seconds: float | None = 3600.0
    """How long a call may go on without a byte from its sandbox; None is for ever."""
    quiet_seconds: float = 9.0
    """How long the caller of a call that goes on hears nothing: a second less than it is promised, since a sweep may
    notice it that late."""
    max_idle_upstreams: int = 32
    """Idle connections kept to one sandbox; a caller with more calls at once than that pays for new ones."""
    idle_upstream_seconds: float = 4.0
    """How long one is kept: less than the 5 s of uvicorn in the sandbox, so that we are the one who closes."""
    high_water_bytes: int = 64 * 1024
    """Unsent bytes at which a caller counts as slow and its sandbox is no longer read."""
    max_in_flight_per_owner: int = 256
    """Calls of one principal at once; more are refused with a time to come back, so that nobody starves the others."""
    max_streams_per_owner: int = 2048
    """Open streams of one principal that only listen, to its sandboxes' own endpoints or to the hive."""
    max_backchannels_per_owner: int = 2048
    """Sandboxes' standalone streams that are listened to for one principal's sessions."""
    max_unfinished_per_owner: int = 256
    """Messages of one principal to `/mcp` whose bodies are still coming. More are 429."""
    max_unfinished_bytes_per_owner: int = 64 * 1024 * 1024
    """Of all those together. More is 429."""
    linger_seconds: float = 1.0
    """How long a refused request's remaining bytes are read and dropped, so that the refusal itself arrives."""

    @property
    def sweep_seconds(self) -> float:
        """How often timeouts of exchanges are checked."""
        return min(1.0, (self.idle_stream_seconds or 4.0) / 4, self.body_timeout_seconds / 4, self.quiet_seconds / 4)

    def head_exceeded(self) -> AshError:
        message = f"a head may be at most {self.max_head_bytes} bytes and {self.max_headers} headers long"
        return CapacityExceeded(message, retryable=False)

    def body_exceeded(self) -> AshError:
        return CapacityExceeded(f"a message may be at most {self.max_body_bytes} bytes long", retryable=False)

    def direct_body_exceeded(self, most: int | None = None) -> AshError:
        most = self.max_direct_body_bytes if most is None else most
        message = f"a request to a sandbox may be at most {most} bytes long"
        return CapacityExceeded(message, retryable=False)

    def unfinished_exceeded(self) -> AshError:
        message = (
            f"of your messages {self.max_unfinished_per_owner}, or {self.max_unfinished_bytes_per_owner} bytes, are "
            "still on their way; finish one of them"
        )
        return CapacityExceeded(message, retry_after_seconds=1.0)

    def call_refusal(self, principal: Principal, in_flight: Mapping[str, int]) -> AshError | None:
        """Return why a principal may not have one more call in flight, or None.

        Args:
            in_flight: As `Ledger.in_flight`.
        """
        most, count = principal.limits.calls, in_flight.get(principal.subject, 0)
        if count >= self.max_in_flight_per_owner or (most is not None and count >= most):
            return self.calls_of(principal).reached("calls")
        if principal.share is not None and in_flight.get(principal.guests or "", 0) >= self.max_in_flight_per_owner:
            return self.guests_exceeded("calls")
        return None

    def calls_of(self, principal: Principal) -> EffectiveLimit:
        """Return how many calls a principal may have in flight."""
        by_share = principal.share is not None
        return effective_limit(self.max_in_flight_per_owner, principal.limits.calls, by_share=by_share)

    def guests_exceeded(self, what: Literal["calls", "streams"]) -> CapacityExceeded:
        """Return the refusal of one more of all guests of one sandbox together, who may have what one owner may."""
        most = self.max_in_flight_per_owner if what == "calls" else self.max_streams_per_owner
        message = (
            f"the guests of this sandbox have {most} {what} open together, as many as one owner may; come back later"
        )
        return CapacityExceeded(message, limit="owner", retry_after_seconds=1.0)

    def streams_of(self, principal: Principal) -> EffectiveLimit:
        by_share = principal.share is not None
        return effective_limit(self.max_streams_per_owner, principal.limits.streams, by_share=by_share)

    def backchannels_of(self, principal: Principal) -> EffectiveLimit:
        by_share = principal.share is not None
        return effective_limit(self.max_backchannels_per_owner, principal.limits.backchannels, by_share=by_share)


DEFAULT_LIMITS: Final = RelayLimits()


class HeadMeter:
    """Measures the head of one request: while it arrives, and once it is there."""

    __slots__ = ("_fed", "_limits")

    def __init__(self, limits: RelayLimits) -> None:
        self._limits = limits
        self._fed = 0

    def restart(self) -> None:
        self._fed = 0

    def fed(self, size: int) -> bool:
        """Count what came from the network for a head that is not finished; False when it is over its limits."""
        self._fed += size
        return self._fed <= self._limits.max_head_bytes

    def fits(self, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Say whether a finished head is within its limits."""
        if len(headers) > self._limits.max_headers:
            return False
        size = len(target)
        for name, value in headers:
            size += len(name) + len(value)
        return size <= self._limits.max_head_bytes
