"""Opens the store that a URL names, and the seed's routes there."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from ash_mcp.errors import ConfigError
from ash_router.store.base import SeedAddress, SeedRoutes, Store
from ash_router.store.memory import MemoryStore

__all__ = ["DEFAULT_PREFIX", "open_seed_routes", "open_store"]

DEFAULT_PREFIX = "ash"

_NO_CLIENT = "the client for Redis is missing; install it with: pip install 'ash-mcp[router]'"


@asynccontextmanager
async def open_store(
    url: str | None = None, prefix: str = DEFAULT_PREFIX, *, seed_address: SeedAddress | None = None
) -> AsyncGenerator[Store]:
    """Keep a store open: the in-process one without a URL, else the Redis or Valkey at it.

    Args:
        url: `redis://[user:password@]host[:port][/database]`, `rediss://…` for TLS, `unix:///path`, or
            `redis+sentinel://[user:password@]host:port[,host:port…]/service[/database]`.
        prefix: Of every key; hives that share a database have different ones.
        seed_address: Where the seed's gateway reaches this process, for hashes that tell it; None writes none.

    Raises:
        ConfigError: It cannot be reached or used; the message says what to do.
    """
    if url is None:
        yield MemoryStore()
        return
    try:
        from ash_router.store.redis import open_redis
    except ModuleNotFoundError as exc:
        raise ConfigError(_NO_CLIENT) from exc
    async with open_redis(url, prefix, seed_address=seed_address) as store:
        yield store


@asynccontextmanager
async def open_seed_routes(url: str, *, patience_seconds: float) -> AsyncGenerator[SeedRoutes]:
    """Keep the seed's routes in the Redis at `url` open.

    Args:
        patience_seconds: How long a look-up is tried while Redis does not answer.

    Raises:
        ConfigError: It cannot be reached or used; the message says what to do.
    """
    try:
        from ash_router.store.redis.seed_hashes import open_seed_hashes
    except ModuleNotFoundError as exc:
        raise ConfigError(_NO_CLIENT) from exc
    async with open_seed_hashes(url, patience_seconds=patience_seconds) as routes:
        yield routes
