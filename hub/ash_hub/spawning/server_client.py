"""The hub's own requests to an image that is an MCP server by itself: does it answer, which tools has it, read this.

It has no runner, so there is neither token nor proof. It is spoken to in the handshake era, which every server knows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import anyio

from ash_hub.spawning.sandbox_requests import MAX_ANSWER_BYTES, SandboxRequests, error_text, last_event
from ash_mcp.errors import AshError, AshTimeout, RemoteProtocolError, StreamBroken
from ash_mcp.types import Endpoint, SandboxId
from ash_router.bounds.limits import DEFAULT_LIMITS
from ash_router.sessions.handshakes import session_id_of, version_of
from ash_router.sessions.session_map import HANDSHAKE_VERSIONS
from ash_router.upstream.pool import Answer, address_uncertain
from ash_router.upstream.proof import SandboxKeys

__all__ = ["ServerClient"]

_NOT_YET: Final = (502, 503, 504)
"""What a server's own front end answers while it starts."""
_PAUSE_SECONDS: Final = 0.25
_GOODBYE_SECONDS: Final = 2.0


class ServerClient(SandboxRequests):
    """Speaks to one such server. Cheap to make; each request has a session of its own.

    Args:
        stale: As with `ConnectionPool`: meanwhile nothing is sent.
    """

    _session: Mapping[str, str] | None = None
    """The headers of the session that is open."""

    def __init__(
        self, endpoint: Endpoint, keys: SandboxKeys, sandbox_id: SandboxId, stale: Callable[[], str | None]
    ) -> None:
        super().__init__(endpoint, keys, sandbox_id)
        self._stale = stale
        self._ids = itertools.count(1)

    async def wait_ready(self, timeout_seconds: float) -> None:
        with anyio.move_on_after(timeout_seconds) as bound:
            while True:
                if await self._first_answer(self._says_hello, timeout_seconds):
                    return
                await anyio.sleep(_PAUSE_SECONDS)
        if bound.cancelled_caught:
            raise AshTimeout(f"its MCP server did not answer within {timeout_seconds:g} s")

    async def list_tools(self, timeout_seconds: float) -> list[Any]:
        async with self._in_session(timeout_seconds):
            return await super().list_tools(timeout_seconds)

    async def read_resource(self, uri: str, timeout_seconds: float) -> list[Any]:
        async with self._in_session(timeout_seconds):
            return await super().read_resource(uri, timeout_seconds)

    async def _says_hello(self, seconds: float) -> bool:
        """Open a session and end it; False where the server is not ready for one yet."""
        if self._stale() is not None:
            return False
        try:
            async with self._in_session(seconds):
                return True
        except (StreamBroken, AshTimeout, _NotYet):  # it listens, and is about to serve
            return False

    @asynccontextmanager
    async def _in_session(self, seconds: float) -> AsyncGenerator[None]:
        path = self._endpoint.mcp_path
        hello = {
            "protocolVersion": HANDSHAKE_VERSIONS[-1],
            "capabilities": {},
            "clientInfo": {"name": "ash-hub", "version": "0"},
        }
        bound = min(seconds, DEFAULT_LIMITS.handshake_timeout_seconds)
        answer = await self._post("initialize", hello, bound, max_bytes=DEFAULT_LIMITS.max_handshake_bytes)
        if answer.status in _NOT_YET:
            raise _NotYet(f"its MCP server at {path} answered {answer.status}")
        try:
            session_id, version = session_id_of(answer.headers), version_of(bytes(answer.body))
        except RemoteProtocolError as error:
            said = error_text(last_event(bytes(answer.body)), f"whoever listens there answered {answer.status}")
            raise RemoteProtocolError(
                f"no MCP server answers at {path} of port {self._endpoint.port}: {said}"
            ) from error
        named = {"mcp-session-id": session_id.decode()} if session_id is not None else {}
        self._session = {**named, "mcp-protocol-version": version.decode()}
        try:
            await self._post("notifications/initialized", None, seconds)
            yield
        finally:
            with anyio.move_on_after(_GOODBYE_SECONDS, shield=True), suppress(AshError):
                if named:
                    await self._request("DELETE", path, headers=self._session, timeout_seconds=_GOODBYE_SECONDS)
            self._session = None

    async def _ask(
        self,
        method: str,
        params: Mapping[str, Any],
        timeout_seconds: float,
        *,
        name: str | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> tuple[int, bytes]:
        del name  # a header of the other era
        answer = await self._post(method, params, timeout_seconds, max_bytes=max_bytes)
        return answer.status, bytes(answer.body)

    async def _post(
        self, method: str, params: Mapping[str, Any] | None, seconds: float, *, max_bytes: int = MAX_ANSWER_BYTES
    ) -> Answer:
        """Send a request, or where `params` is None a notification."""
        if (why := self._stale()) is not None:
            raise address_uncertain(why)
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
        if params is not None:
            message |= {"id": next(self._ids), "params": dict(params)}
        return await self._request(
            "POST",
            self._endpoint.mcp_path,
            body=json.dumps(message).encode(),
            headers=self._session,
            timeout_seconds=seconds,
            max_bytes=max_bytes,
        )


class _NotYet(RemoteProtocolError):
    """The server is not ready yet."""
