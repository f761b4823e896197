"""An app and a relay served on a listener, as hives and routers serve them."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import anyio
import uvicorn

from ash_hub.settings import HubSettings
from ash_mcp.errors import ConfigError
from ash_mcp.wire import MCP_PATH
from ash_router.dataplane import DataPlane

__all__ = ["Server", "server_of", "url_of"]

_PARTING_SECONDS: Final = 1.0
_INSIDE_SECONDS: Final = 5.0
"""What answers to other replicas may take when it is their listener's turn to end: after callers' own have had all."""
_BACKLOG: Final = 2048
# libuv accepts one connection of a listener in a turn of the loop, so that beside many busy ones a new caller would
# wait for seconds. It does so for each descriptor, and these are descriptors of the same listener.
_ACCEPTS_AT_ONCE: Final = 32


class Server(uvicorn.Server):
    """Says when it has started, and leaves signals to whoever runs it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._up = anyio.Event()
        self._down = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._up.set()

    def stop(self) -> None:
        self.should_exit = True

    async def drain(self, relay: DataPlane) -> None:
        """Send callers to other replicas; return once the answers that have begun are given, or their time is over.

        For a moment each answer says that its connection ends with it: a request may be on its way on any connection
        that is closed without a word, and nobody could say whether it was done.
        """
        relay.is_leaving = True
        with anyio.move_on_after(_PARTING_SECONDS):
            while self.server_state.connections:  # noqa: ASYNC110 - a set of uvicorn's has no event
                await anyio.sleep(0.05)
        self.stop()
        await self._down.wait()

    @asynccontextmanager
    async def serving(self, listener: socket.socket) -> AsyncGenerator[None]:
        """Serve on `listener` while the context is open, then let answers that have begun finish, bounded.

        Raises:
            ConfigError: Another program has begun to listen there meanwhile.
        """
        try:
            listener.listen(_BACKLOG)
        except OSError as exc:
            raise ConfigError(f"another program has just begun to listen on port {listener.getsockname()[1]}") from exc
        async with anyio.create_task_group() as group:
            group.start_soon(self._run, listener)
            try:
                await self._up.wait()
                yield
            finally:
                self.stop()

    async def _run(self, listener: socket.socket) -> None:
        copies = [listener.dup() for _ in range(_ACCEPTS_AT_ONCE - 1)]
        try:
            await self._serve([listener, *copies])
        finally:
            self._down.set()
            for copy in copies:  # open still where the start was broken off
                copy.close()


def server_of(app: object, protocol: type[asyncio.Protocol], settings: HubSettings, *, inside: bool = False) -> Server:
    """Return a server that is not started yet.

    Args:
        inside: Whether it is for other replicas, which speak no TLS.
    """
    config = uvicorn.Config(
        cast("Any", app),
        http=cast("Any", protocol),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,  # who calls is the socket's word, not a header's
        backlog=_BACKLOG,
        timeout_keep_alive=settings.relay.keep_alive_seconds,
        ssl_certfile=None if inside else settings.tls_cert,
        ssl_keyfile=None if inside else settings.tls_key,
        timeout_graceful_shutdown=math.ceil(min(settings.drain_seconds, _INSIDE_SECONDS if inside else math.inf)),
    )
    return Server(config)


def url_of(settings: HubSettings, port: int) -> str:
    """Return the URL at which callers on this machine reach what is served."""
    scheme = "http" if settings.tls_cert is None else "https"
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{shown}:{port}{MCP_PATH}"
