"""The proxy of one sandbox: counts its connections, and gives each its exchange."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from .audit import Audit
from .capacity import Share
from .exchange import Exchange, OuterNetwork
from .lease import Lease
from .limits import Limits, Meter
from .policy import Policy
from .refusal import Refusal
from .resolver import LookUps
from .wire import End, open_end

__all__ = ["SandboxProxy"]

_OVERFLOW = 16
"""Connections over the limit that are told so; further ones wait, all but one in the socket's queue."""
_PAUSE_SECONDS = 0.1


class SandboxProxy:
    """Serves whoever connects as one sandbox, under one policy.

    Args:
        lease: How long the policy may be acted on; None: as long as it is the one.
    """

    def __init__(
        self, policy: Policy, limits: Limits, outside: OuterNetwork, audit: Audit, lease: Lease | None = None
    ) -> None:
        self._policy = policy
        self._limits = limits
        self._world = outside
        self._audit = audit
        self._lease = lease
        share = Share(outside.look_ups, limits.look_ups)
        self._look_ups = LookUps(outside.resolve, share, limits.connect_seconds, lease)
        self._total = Meter(limits.sandbox_bytes, "sandbox_bytes")
        self._room = Share(outside.connections, limits.connections + _OVERFLOW)
        self._exchanges: dict[asyncio.Task[None], Exchange] = {}
        self._open = 0
        self._accepted = 0

    def stats(self) -> dict[str, Any]:
        return {
            "open": self._open,
            "accepted": self._accepted,
            "bytes": self._total.count,
            "look_ups": self._look_ups.count,
        }

    def set_policy(self, policy: Policy) -> None:
        """Decide by `policy` from now on, and end what it would not let through as it was let through."""
        before, self._policy = self._policy, policy
        self._audit.always(policy=policy.text)
        for task, exchange in self._exchanges.items():
            exchange.policy = policy
            if not before.is_within(policy) and not exchange.is_still_granted():
                task.cancel()

    async def serve(self, listener: socket.socket) -> None:
        """Accept until cancelled; then every connection is ended. The listener stays its owner's to close."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        async with asyncio.TaskGroup() as exchanges:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError:
                    # Out of descriptors, most likely: those that are open have to end first.
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                try:
                    await self._room.enter()
                except asyncio.CancelledError:
                    connection.close()
                    raise
                self._enter()
                exchanges.create_task(self._exchange(connection))

    async def serve_connection(self, client: End) -> None:
        """Serve a connection that was accepted elsewhere, once there is room for it.

        Raises:
            Refusal: There was none for `connect_seconds`.
        """
        try:
            async with asyncio.timeout(self._limits.connect_seconds):
                await self._room.enter()
        except TimeoutError:
            raise Refusal("too_many_connections", "no connection is free at this proxy", status=429) from None
        except asyncio.CancelledError:
            client.abort()
            raise
        self._enter()
        await self._exchange(client)

    def _enter(self) -> None:
        self._accepted += 1
        self._open += 1

    async def _exchange(self, connection: socket.socket | End) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            is_open = isinstance(connection, End)
            client = connection if is_open else await open_end(connection, self._limits.head_bytes)
            exchange = Exchange(
                client=client,
                policy=self._policy,
                limits=self._limits,
                outside=self._world,
                look_ups=self._look_ups,
                total=self._total,
                report=self._audit,
                lease=self._lease,
                crowded=self._open > self._limits.connections,
            )
            self._exchanges[task] = exchange
            await exchange.run()
        except Exception as fault:
            # A defect ends one connection; it must not end the network of every sandbox.
            self._audit({"decision": "failed", "reason": "fault", "message": f"{type(fault).__name__}: {fault}"})
        finally:
            self._exchanges.pop(task, None)
            self._open -= 1
            self._room.leave()
