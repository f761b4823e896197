"""Opens the store in Redis and watches it: the server's version, whether it answers, whether it lost its content."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from ash_mcp.errors import AshError, ConfigError, ConnectFailed
from ash_router.store.base import SeedAddress
from ash_router.store.redis.address import Address
from ash_router.store.redis.feed import Feed
from ash_router.store.redis.link import Link, why
from ash_router.store.redis.store import RedisStore

__all__ = ["greet", "open_redis"]

PATIENCE_SECONDS: Final = 2.0
LOOK_SECONDS: Final = 1.0
GRACE_SECONDS: Final = 3.0
_OPENING_SECONDS: Final = 10.0
_PREFIX: Final = re.compile(r"[A-Za-z0-9._{}-]{1,64}")
_OLDEST: Final = (6, 2)
log = logging.getLogger("ash.store")


@asynccontextmanager
async def open_redis(
    url: str,
    prefix: str,
    *,
    seed_address: SeedAddress | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
    look_seconds: float = LOOK_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
) -> AsyncGenerator[RedisStore]:
    """Keep a store in the Redis at `url` going while the context is open.

    Args:
        prefix: Of all keys and channels.
        seed_address: Where the seed's gateway reaches this process; None writes no hashes for it.
        patience_seconds: How long a step is tried where Redis does not answer.
        look_seconds: How often it is looked whether Redis answers and still holds what it did.
        grace_seconds: How long no name is given after it was found to have lost them: until all replicas have put back
            theirs.

    Raises:
        ConfigError: It cannot be reached, refuses us, is too old, or has keys of an unknown layout; the message
            says what to do.
    """
    if _PREFIX.fullmatch(prefix) is None:
        raise ConfigError(f"the prefix of keys in Redis is 1 to 64 of A-Z a-z 0-9 . _ - {{ }}, not {prefix!r}")
    address = Address.parse(url, patience_seconds / 2)
    client, sentinel = address.client()
    alone: BaseException | None = None
    try:
        info = await greet(client, address)
        link = Link(address.shown, patience_seconds)
        database = client.connection_pool.connection_kwargs.get("db", 0)
        # channels are not of one database, as keys are
        feed = Feed(client, f"{prefix}@{database}:", patience_seconds)
        store = RedisStore(client, link, feed, prefix)
        store.warned = _warnings(info, address)
        for warning in store.warned:
            log.warning(warning)
        store.seed_address = await _seen_address(client, seed_address)
        store.restored_epoch = await _first_epoch(store, address)
        keeper = _Keeper(store, link.came_back, look_seconds, grace_seconds)
        async with anyio.create_task_group() as group:
            group.start_soon(feed.run)
            group.start_soon(keeper.run)
            yield store
            await _leave(store)
            group.cancel_scope.cancel()
    except BaseExceptionGroup as found:
        if len(found.exceptions) != 1:
            raise
        alone = found.exceptions[0]  # the user's own; it must not come out otherwise than it went in
    finally:
        with anyio.CancelScope(shield=True):
            await client.aclose()
            for asked in sentinel.sentinels if sentinel is not None else ():
                await asked.aclose()
    if alone is not None:  # not above, where the group, which holds it, would become its context
        raise alone


class _Keeper:
    """Watches one store: notices a new epoch, has everything restored, and sends what had to wait."""

    def __init__(self, store: RedisStore, came_back: asyncio.Event, look_seconds: float, grace_seconds: float) -> None:
        self._store = store
        self._came_back = came_back
        self._pause = look_seconds
        self._grace = grace_seconds
        self._known = store.restored_epoch
        self._seen_at = 0.0
        self._is_restored = True

    async def run(self) -> None:
        """Check Redis every `look_seconds`, and when it comes back, until cancelled."""
        while True:
            with anyio.move_on_after(self._pause):
                await self._came_back.wait()
            self._came_back.clear()
            try:
                await self._look()
            except ConnectFailed:
                continue  # the link has logged it
            except ConfigError as exc:
                log.error("another release changed the keys in Redis", extra={"why": exc.message})
            except AshError as exc:
                log.warning("what Redis lost is not put back yet", extra={"why": exc.message})

    async def _look(self) -> None:
        found = await self._store.current_epoch()
        if found != self._known:
            log.warning("Redis was emptied, restarted or replaced; what it held is put back")
            self._known, self._seen_at, self._is_restored = found, time.monotonic(), False
            self._store.refilling = True
        if not self._is_restored:
            await self._store.raise_numbers()
            for restore in self._store.restorers:
                await restore()
            self._is_restored = True
        if self._store.refilling and time.monotonic() >= self._seen_at + self._grace:
            self._store.restored_epoch, self._store.refilling = found, False
            await self._store.prune_calls()
        await self._store.settle()


async def greet(client: Any, address: Address) -> Mapping[str, Any]:
    """Check that the server is usable, and return its INFO."""
    try:
        async with asyncio.timeout(_OPENING_SECONDS):
            await client.ping()
            info = {**await _info(client, "server"), **await _info(client, "memory")}
    except AuthenticationError as exc:
        raise ConfigError(
            f"Redis at {address.shown} refuses the user or the password ({why(exc)}); they stand in the URL: "
            "redis://user:password@host"
        ) from exc
    except (RedisError, OSError, TimeoutError) as exc:
        reason = why(exc) if str(exc) else f"no answer within {_OPENING_SECONDS:g} s"
        raise ConfigError(
            f"Redis at {address.shown} cannot be used: {reason}. Is it running and its address right, and does it "
            "want TLS (rediss://) or a password?"
        ) from exc
    version = tuple(int(part) for part in str(info.get("redis_version", "6.2")).split(".")[:2])
    if version < _OLDEST:
        raise ConfigError(f"Redis at {address.shown} is {info['redis_version']}; Ash needs 6.2, or Valkey")
    return info


async def _seen_address(client: Any, told: SeedAddress | None) -> tuple[str, int] | None:
    """Return host and port of a seed address; the host that Redis sees where it names none, None where that fails."""
    if told is None or told.host is not None:
        return None if told is None else (told.host or "", told.port)
    try:
        seen = str((await client.client_info())["addr"]).rpartition(":")[0]
    except (RedisError, OSError, TimeoutError, KeyError) as exc:
        log.warning("no hashes for the seed's gateway: set ASH_HUB_SEED__ADDRESS", extra={"why": why(exc)})
        return None
    return ("127.0.0.1" if seen.startswith("/") else seen, told.port)  # a Unix socket is of this machine


async def _info(client: Any, section: str) -> Mapping[str, Any]:
    """Return one section of INFO; empty if this user may not read it."""
    try:
        return await client.info(section)
    except NoPermissionError:
        return {}


async def _first_epoch(store: RedisStore, address: Address) -> str:
    try:
        return await store.current_epoch()
    except ConfigError:
        raise
    except AshError as exc:
        raise ConfigError(f"Redis at {address.shown} cannot be used: {exc.message}") from exc


def _warnings(info: Mapping[str, Any], address: Address) -> tuple[str, ...]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return ()
    return (
        f"Redis at {address.shown} evicts (maxmemory-policy {policy}): when its memory is full, routes and names "
        "vanish while their sandboxes live. Set its maxmemory-policy to noeviction",
    )


async def _leave(store: RedisStore) -> None:
    """Send what still waits, if Redis answers."""
    try:
        await store.settle()
    except AshError as exc:
        log.warning("left without giving back what is held in Redis", extra={"why": exc.message})
