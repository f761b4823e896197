"""Which store a hive has, chosen by its URL."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from ash_mcp.errors import ConfigError
from ash_router.store.base import Store
from ash_router.store.memory import MemoryStore

__all__ = ["DEFAULT_PREFIX", "open_store"]

DEFAULT_PREFIX = "ash"


@asynccontextmanager
async def open_store(url: str | None = None, prefix: str = DEFAULT_PREFIX) -> AsyncGenerator[Store]:
    """Keep a store open: the in-process one without a URL, else the Redis or Valkey at it.

    Args:
        url: `redis://[user:password@]host[:port][/database]`, `rediss://…` for TLS, `unix:///path`, or
            `redis+sentinel://[user:password@]host:port[,host:port…]/service[/database]`.
        prefix: Of every key; hives that share a database have different ones.

    Raises:
        ConfigError: It cannot be reached or used; the message says what to do.
    """
    if url is None:
        yield MemoryStore()
        return
    try:
        from ash_router.store.redis import open_redis
    except ModuleNotFoundError as exc:
        raise ConfigError("the client for Redis is missing; install it with: pip install 'ash-mcp[router]'") from exc
    async with open_redis(url, prefix) as store:
        yield store
