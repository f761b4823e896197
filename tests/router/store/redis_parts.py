"""What the tests of the store in Redis share."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio

from ash_mcp.types import Endpoint, SandboxId, Scope, SessionName
from ash_router.routes import Route
from ash_router.store.redis import RedisStore, open_redis
from tests.redis_server import RedisServer

PATIENCE = 60.0
"""Of the stores in tests: how long a step is tried. A busy machine does not use it up."""
HURRY = 0.4
"""The same, where Redis is away and a step is to fail."""

_NUMBERS = itertools.count()


def fresh_prefix() -> str:
    """Return a prefix that no other test of this run has."""
    return f"test-{next(_NUMBERS)}"


@asynccontextmanager
async def open_quick(server: RedisServer, prefix: str, patience: float = PATIENCE) -> AsyncGenerator[RedisStore]:
    """Open a store that looks again sooner than a hive's."""
    async with open_redis(
        server.url, prefix, patience_seconds=patience, look_seconds=0.05, grace_seconds=0.3
    ) as store:
        yield store


@contextmanager
def hurried(*stores: RedisStore, seconds: float = HURRY) -> Generator[None]:
    """Have the steps that begin meanwhile tried for so long only."""
    for store in stores:
        store._link._patience = store._feed._patience = seconds  # pyright: ignore[reportPrivateUsage]
    yield
    for store in stores:
        store._link._patience = store._feed._patience = PATIENCE  # pyright: ignore[reportPrivateUsage]


async def until(holds: Callable[[], Any], seconds: float = 30.0) -> None:
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
