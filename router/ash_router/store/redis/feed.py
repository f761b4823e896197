"""One pub/sub connection for all subscriptions of a process. Readers get `LOST` where messages may be missing.

Redis drops subscriptions with their connection, and what was published meanwhile. So each channel is subscribed anew,
and once the server confirms that, every earlier reader gets `LOST`. Not sooner, or what it reads could change unseen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ash_router.store._reader import Reader
from ash_router.store.redis.link import why

__all__ = ["Feed"]

_HEARTBEAT_SECONDS: Final = 2.0
"""Silence after which the connection is pinged; after as long again without an answer it is given up."""
_PAUSE_SECONDS: Final = 0.2
log = logging.getLogger("ash.store")


@dataclass(eq=False, slots=True)
class _Channel:
    readers: set[Reader] = field(default_factory=set[Reader])
    settled: set[Reader] = field(default_factory=set[Reader])
    """Readers that have been told that the subscription is live."""
    live: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """Passes messages from Redis to readers.

    Args:
        prefix: Stands before each channel's name.
        patience_seconds: How long a new reader waits for its subscription before it goes without.
    """

    def __init__(self, client: Redis, prefix: str, patience_seconds: float) -> None:
        self._client = client
        self._prefix = prefix
        self._patience = patience_seconds
        self._channels: dict[str, _Channel] = {}
        self._connection: Any = None

    def name(self, channel: str) -> str:
        """Return what a channel is called in Redis."""
        return self._prefix + channel

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncGenerator[AsyncIterator[str]]:
        """Receive what is published from now on; where Redis is away, from when it is back, after `LOST`."""
        reader, name = Reader(), self.name(channel)
        place = self._channels.get(name)
        is_new = place is None
        if place is None:
            place = self._channels[name] = _Channel()
        place.readers.add(reader)
        try:
            if is_new:
                await self._ask("SUBSCRIBE", name)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    await place.live.wait()
            place.settled.add(reader)
            yield reader
        finally:
            place.readers.discard(reader)
            place.settled.discard(reader)
            if not place.readers and self._channels.get(name) is place:
                del self._channels[name]
                await self._ask("UNSUBSCRIBE", name)

    async def run(self) -> None:
        """Keep the connection, until cancelled."""
        while True:
            connection: Any = self._client.connection_pool.make_connection()
            try:
                await connection.connect()
                self._connection = connection
                await connection.send_command("SUBSCRIBE", self.name(""), *self._channels, check_health=False)
                await self._follow(connection)
            except (RedisError, OSError) as exc:
                was_there = self._connection is not None
                log.log(logging.INFO if was_there else logging.DEBUG, "no news from Redis", extra={"why": why(exc)})
            finally:
                self._connection = None
                for place in self._channels.values():
                    place.live.clear()
                with anyio.CancelScope(shield=True):
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _follow(self, connection: Any) -> None:
        asked = False
        while connection.is_connected:
            answer: Any = await connection.read_response(timeout=_HEARTBEAT_SECONDS, disconnect_on_error=False)
            if answer is not None:
                asked = False
                self._take(answer)
            elif asked:
                raise RedisConnectionError("no heartbeat")
            else:
                asked = True
                await self._ask("PING")

    def _take(self, answer: list[Any]) -> None:
        kind, name, *more = answer
        place = self._channels.get(name)
        if place is None:
            return
        if kind == "message":
            for reader in place.readers:
                reader.put(more[0])
        elif kind == "subscribe":
            for reader in place.settled:
                reader.lose()
            place.live.set()

    async def _ask(self, *command: str) -> None:
        """Send a command if there is a connection; what the next one needs it asks for itself."""
        connection = self._connection
        if connection is None or not connection.is_connected:
            return
        try:
            with anyio.CancelScope(shield=True):  # bounded by the connection; a half-sent command would end it
                await connection.send_command(*command, check_health=False)
        except (RedisError, OSError) as exc:
            log.debug("asking for news failed", extra={"why": why(exc)})
