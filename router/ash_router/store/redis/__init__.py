"""The store that replicas share: Redis from 6.2, or Valkey."""

from __future__ import annotations

from ash_router.store.redis.opening import open_redis
from ash_router.store.redis.store import RedisStore

__all__ = ["RedisStore", "open_redis"]
