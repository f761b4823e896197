"""Reads the hashes in which the seed's control plane says where its sandboxes listen: `sandbox:<uuid>`."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio

from ash_mcp.errors import AshError, ProtocolError
from ash_mcp.types import Endpoint
from ash_router.store.redis.address import Address
from ash_router.store.redis.link import Link
from ash_router.store.redis.opening import greet

__all__ = ["SeedHashes", "open_seed_hashes"]

_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|\[?[0-9A-Fa-f:.]{2,45}\]?")
_DEFAULT_PORT: Final = "3000"
"""As the seed's gateway has it, where a hash has none."""


class SeedHashes:
    """The `SeedRoutes` in a Redis."""

    def __init__(self, client: Any, link: Link) -> None:
        self._client = client
        self._link = link

    async def find(self, uuid: str) -> Endpoint | None:
        host, port = await self._link.do(lambda: self._client.hmget(f"sandbox:{uuid}", "host", "port"))
        if not host:
            return None
        port = port or _DEFAULT_PORT
        if _HOST.fullmatch(host) is None or re.fullmatch("[0-9]{1,5}", port) is None or int(port) > 65535:
            raise ProtocolError(f"the hash of {uuid} in Redis has no host and port that can be used")
        return Endpoint(host=host.strip("[]"), port=int(port), proves=False)

    async def unready(self) -> str | None:
        """Return why no route can be found now, or None."""
        try:
            await self._link.do(self._client.ping)
        except AshError:
            return "redis not ready"
        return None


@asynccontextmanager
async def open_seed_hashes(url: str, *, patience_seconds: float) -> AsyncGenerator[SeedHashes]:
    """Keep a client of the Redis at `url` while the context is open.

    Args:
        patience_seconds: How long a look-up is tried while Redis does not answer.

    Raises:
        ConfigError: It cannot be reached, refuses us or is too old; the message says what to do.
    """
    address = Address.parse(url, patience_seconds / 2)
    client, sentinel = address.client()
    try:
        await greet(client, address)
        yield SeedHashes(client, Link(address.shown, patience_seconds))
    finally:
        with anyio.CancelScope(shield=True):
            await client.aclose()
            for asked in sentinel.sentinels if sentinel is not None else ():
                await asked.aclose()
