"""Replicas for the tests of forwarding: relays of one hive, each with an internal listener, on one store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_router.caller.relay import RelayLimits
from ash_router.replicas.forwarding import Forwarder
from ash_router.replicas.membership import Replicas, new_replica_id
from ash_router.replicas.vouchers import VoucherAdmission, Vouchers
from ash_router.store.memory import MemoryStore
from tests.router.relay_parts import Rig, Wire, open_rig
from tests.router.sandbox_parts import Server, config


@dataclass
class Replica:
    """One replica, and what a test may want to look at."""

    rig: Rig
    replicas: Replicas
    vouchers: Vouchers
    internal: Server
    port: int
    """Of its internal listener."""
    requests: list[tuple[str, dict[str, list[str]]]]
    """Method and headers of what came in at the internal listener and was not for a sandbox."""

    @asynccontextmanager
    async def connect_inside(self) -> AsyncGenerator[Wire]:
        """Connect to the internal listener."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        try:
            yield Wire(reader, writer)
        finally:
            writer.close()

    def die(self) -> None:
        """Break every connection of other replicas and take no more, without a word to the store."""
        self.internal.stop()


@asynccontextmanager
async def open_replica(
    directory: Path, store: MemoryStore, key: Ed25519PrivateKey, *, limits: RelayLimits | None = None, app: Any = None
) -> AsyncGenerator[Replica]:
    replicas = Replicas(store, new_replica_id(), grace_seconds=0.0)
    vouchers = Vouchers(key, replicas.id)
    forwarder = Forwarder(replicas, vouchers, limits or RelayLimits())
    requests: list[tuple[str, dict[str, list[str]]]] = []
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(open_rig(directory, limits=limits, app=app, forwarder=forwarder))

        async def noted(scope: Any, receive: Any, send: Any) -> None:
            headers: dict[str, list[str]] = {}
            for name, value in scope["headers"]:
                headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
            requests.append((scope["method"], headers))
            await rig.app(scope, receive, send)

        protocol = rig.relay.protocol(VoucherAdmission(vouchers), forwards=False)
        internal = Server(config(noted, http=protocol, lifespan="off", host="127.0.0.1", port=0))
        await stack.enter_async_context(internal.running())
        port = internal.servers[0].sockets[0].getsockname()[1]
        replicas.address = f"127.0.0.1:{port}"
        group = await stack.enter_async_context(anyio.create_task_group())
        await group.start(replicas.run)
        yield Replica(rig, replicas, vouchers, internal, port, requests)
        group.cancel_scope.cancel()


@dataclass
class Pair:
    """Two replicas of one hive. Sessions are opened on `owner`; `other` is asked."""

    store: MemoryStore
    key: Ed25519PrivateKey
    owner: Replica
    other: Replica


@asynccontextmanager
async def open_pair(directory: Path, *, limits: RelayLimits | None = None, app: Any = None) -> AsyncGenerator[Pair]:
    """Open both; `app` is the owner's, `limits` are the other's."""
    store, key = MemoryStore(), Ed25519PrivateKey.generate()
    async with (
        open_replica(directory, store, key, app=app) as owner,
        open_replica(directory, store, key, limits=limits) as other,
    ):
        yield Pair(store, key, owner, other)
