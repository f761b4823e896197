"""Handshake-era sessions on sandboxes: opens them, sets their log level, sends notifications, and ends them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, cast

import orjson

from ash_mcp.errors import AshError, RemoteProtocolError, StreamBroken
from ash_mcp.types import SandboxId
from ash_mcp.wire import HEADER_TOKEN
from ash_router.bounds.limits import RelayLimits
from ash_router.http import framing
from ash_router.routes import Route
from ash_router.sessions.backchannel import Backchannel
from ash_router.sessions.session_map import HANDSHAKE_VERSIONS, LegacySession, UpstreamSession
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.connection import Connection
from ash_router.upstream.pool import ConnectionPool

__all__ = ["Handshakes"]

log = logging.getLogger(__name__)

_ACCEPT: Final = (b"accept", b"application/json, text/event-stream")
_JSON: Final = (b"content-type", b"application/json")
_DATA_LINE: Final = re.compile(rb"^data: ?(.*?)\r?$", re.MULTILINE)
_SESSION_ID: Final = re.compile(rb"[\x21-\x7e]{1,256}")
_MAX_GOODBYES: Final = 32
"""How many upstream sessions are ended at the same time."""
_GOODBYE_SECONDS: Final = 2.0
_LISTEN_SECONDS: Final = 5.0


class Handshakes:
    """Sessions on sandboxes, opened once per hub session and sandbox, on first use."""

    def __init__(
        self,
        upstreams: ConnectionPool,
        tokens: CallTokens,
        limits: RelayLimits,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._upstreams = upstreams
        self._tokens = tokens
        self._limits = limits
        self._spawn = spawn
        self._opening: dict[tuple[str, SandboxId], asyncio.Lock] = {}
        self._goodbyes = asyncio.Semaphore(_MAX_GOODBYES)
        self._ids = itertools.count(1)
        self._listening: Counter[str] = Counter()
        """The number of open standalone streams, by principal."""

    async def session_on(self, session: LegacySession, route: Route) -> UpstreamSession:
        """Return the session's own session on a sandbox, opening it if there is none.

        Raises:
            CapacityExceeded: Its principal has as many standalone streams open as it may.
            TransportError: The sandbox could not be reached or did not answer.
            RemoteProtocolError: It refused, or answered something else.
        """
        sandbox_id = route.sandbox_id
        lock = self._opening.setdefault((session.id, sandbox_id), asyncio.Lock())
        try:
            async with lock:
                known = session.upstreams.get(sandbox_id)
                if known is None:
                    known = session.upstreams[sandbox_id] = await self._open(session, route)
                return known
        finally:
            if not lock.locked():
                self._opening.pop((session.id, sandbox_id), None)

    async def notify(self, upstream: UpstreamSession, message: bytes) -> None:
        """Send a client's notification or answer to a sandbox; a failure is logged only.

        It is sent a second time if the connection broke. That is safe: a sandbox ignores what it does not wait for.
        """
        for last in (False, True):
            try:
                await self._post(upstream.route, message, upstream.headers())
                return
            except StreamBroken:
                if last:
                    log.info("sandbox %s did not take a notification", upstream.route.sandbox_id)
            except AshError as error:
                log.info("sandbox %s did not take a notification: %s", upstream.route.sandbox_id, error)
                return

    def tell(self, upstream: UpstreamSession, message: bytes) -> None:
        """Like `notify`, in the background."""
        self._spawn(self.notify(upstream, message))

    async def set_level(self, upstream: UpstreamSession, level: str) -> None:
        """Set the log level of a session on a sandbox, as its client did on the hub."""
        await self.notify(upstream, self._request("logging/setLevel", {"level": level}))

    async def end(self, upstream: UpstreamSession) -> None:
        """End a session on a sandbox, if it can be reached; bounded in time and in number."""
        upstream.stop_listening()
        if upstream.id is None:
            return
        head = self._head(upstream.route, upstream.headers(), 0, method=b"DELETE")
        async with self._goodbyes:
            try:
                await self._upstreams.request(
                    upstream.route.endpoint,
                    head,
                    timeout_seconds=_GOODBYE_SECONDS,
                    max_bytes=self._limits.max_head_bytes,
                )
            except AshError as error:
                log.info("a session on sandbox %s was not ended: %s", upstream.route.sandbox_id, error)

    async def _open(self, session: LegacySession, route: Route) -> UpstreamSession:
        principal = session.admitted.principal
        limit = self._limits.backchannels_of(principal)
        if session.can_be_asked and self._listening[principal.subject] >= limit.most:
            raise limit.reached("backchannels")
        hello = self._request("initialize", session.initialize_params())
        answer = await self._post(route, hello, {b"mcp-protocol-version": session.version.encode()})
        if answer[0] != 200:
            raise RemoteProtocolError(f"the sandbox refused to open a session: it answered {answer[0]}")
        upstream = UpstreamSession(route, _session_id(answer[1]), _negotiated(answer[2]))
        await self._post(route, _NOTHING_MORE, upstream.headers())
        if session.log_level is not None:
            await self.set_level(upstream, session.log_level)
        if session.can_be_asked and upstream.id is not None:
            await self._listen(session, upstream)
        return upstream

    async def _listen(self, session: LegacySession, upstream: UpstreamSession) -> None:
        """Open the session's standalone stream, if the sandbox offers one."""
        channel = Backchannel(session, upstream, self.tell)
        route = upstream.route
        try:
            connection = self._upstreams.idle(route.endpoint) or await self._upstreams.connect(route.endpoint)
            connection.send(self._head(route, upstream.headers(), 0, method=b"GET"), channel)
            upstream.listening = partial(self._stop_listening, session.admitted.principal.subject, connection)
            self._listening[session.admitted.principal.subject] += 1
            async with asyncio.timeout(_LISTEN_SECONDS):
                await channel.answered.wait()
        except (AshError, TimeoutError) as error:
            upstream.stop_listening()
            log.info("sandbox %s cannot be listened to: %s", route.sandbox_id, error)

    def _stop_listening(self, owner: str, connection: Connection) -> None:
        self._listening[owner] -= 1
        if not self._listening[owner]:
            del self._listening[owner]
        connection.close()

    def _request(self, method: str, params: dict[str, Any]) -> bytes:
        return orjson.dumps({"jsonrpc": "2.0", "id": f"ash-{next(self._ids)}", "method": method, "params": params})

    async def _post(
        self, route: Route, body: bytes, headers: dict[bytes, bytes]
    ) -> tuple[int, framing.Headers, bytes]:
        answer = await self._upstreams.request(
            route.endpoint,
            self._head(route, headers, len(body)) + body,
            timeout_seconds=self._limits.handshake_timeout_seconds,
            max_bytes=self._limits.max_handshake_bytes,
        )
        return answer.status, answer.headers, bytes(answer.body)

    def _head(self, route: Route, headers: dict[bytes, bytes], length: int, *, method: bytes = b"POST") -> bytes:
        token = self._tokens.mint(route.sandbox_id)
        lines = framing.lines_of([_ACCEPT, _JSON, (HEADER_TOKEN.encode(), token), *headers.items()])
        return framing.request_head(method, route.endpoint.authority, length, lines)


_NOTHING_MORE: Final = orjson.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"})


def _session_id(headers: framing.Headers) -> bytes | None:
    value = framing.one(headers, b"mcp-session-id")
    if value is not None and _SESSION_ID.fullmatch(value) is None:
        raise RemoteProtocolError("the sandbox gave its session an id that cannot be one")
    return value


def _negotiated(body: bytes) -> bytes:
    for text in (body, *_DATA_LINE.findall(body)):
        try:
            message: Any = orjson.loads(text)
        except orjson.JSONDecodeError:
            continue
        result: Any = cast("dict[str, Any]", message).get("result") if isinstance(message, dict) else None
        version: Any = cast("dict[str, Any]", result).get("protocolVersion") if isinstance(result, dict) else None
        if version in HANDSHAKE_VERSIONS:
            return str(version).encode()
    raise RemoteProtocolError("the sandbox's answer to initialize names no protocol version that is known")
