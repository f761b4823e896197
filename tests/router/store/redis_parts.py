"""What the tests of the store in Redis share."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from ash_mcp.types import Endpoint, SandboxId, Scope, SessionName
from ash_router.routes import Route
from ash_router.store.redis import RedisStore, open_redis
from tests.redis_server import RedisServer

PATIENCE = 0.4
"""Of the stores in tests: how long a step is tried while Redis is away."""

_NUMBERS = itertools.count()


def fresh_prefix() -> str:
    """Return a prefix that no other test of this run has."""
    return f"test-{next(_NUMBERS)}"


@asynccontextmanager
async def open_quick(server: RedisServer, prefix: str, patience: float = PATIENCE) -> AsyncGenerator[RedisStore]:
    """Open a store that gives up and looks again sooner than a hive's."""
    async with open_redis(
        server.url, prefix, patience_seconds=patience, look_seconds=0.05, grace_seconds=0.3
    ) as store:
        yield store


async def until(holds: Callable[[], Any], seconds: float = 5.0) -> None:
    """Return when something holds, which must be within a bound."""
    with anyio.fail_after(seconds):
        while not holds():
            await anyio.sleep(0.01)


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"sandbox_id": f"sbx-{number}", **more}


def route(number: int, owner: str = "me", scope: str = "", moved: int = 0) -> Route:
    return Route(
        sandbox_id=SandboxId(f"sbx-{number}"),
        owner=owner,
        scope=Scope(scope),
        session=SessionName(f"sb{number}"),
        endpoint=Endpoint(host="127.0.0.1", port=1000 + number + 1000 * moved),
        tool_names={"short": "a name that was too long"},
    )
