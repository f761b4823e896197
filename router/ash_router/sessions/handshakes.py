"""What the relay itself says to sandboxes in the handshake era: it opens, tunes and ends sessions there."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

import orjson

from ash_mcp.errors import AshError, RemoteProtocolError, StreamBroken
from ash_mcp.types import SandboxId
from ash_mcp.wire import HEADER_TOKEN
from ash_router import _framing
from ash_router.backchannel import Backchannel
from ash_router.limits import RelayLimits
from ash_router.routes import Route
from ash_router.sessions import HANDSHAKE_VERSIONS, LegacySession, UpstreamSession
from ash_router.tokens import CallTokens
from ash_router.upstream import Upstreams

__all__ = ["Handshakes"]

log = logging.getLogger(__name__)

_ACCEPT: Final = (b"accept", b"application/json, text/event-stream")
_JSON: Final = (b"content-type", b"application/json")
_DATA_LINE: Final = re.compile(rb"^data: ?(.*?)\r?$", re.MULTILINE)
_SESSION_ID: Final = re.compile(rb"[\x21-\x7e]{1,256}")
_MAX_GOODBYES: Final = 32
"""Upstream sessions that are being ended at once."""
_GOODBYE_SECONDS: Final = 2.0
_LISTEN_SECONDS: Final = 5.0


class Handshakes:
    """Sessions on sandboxes, opened once per hub session and sandbox, on first use."""

    def __init__(
        self,
        upstreams: Upstreams,
        tokens: CallTokens,
        limits: RelayLimits,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._upstreams = upstreams
        self._tokens = tokens
        self._limits = limits
        self._spawn = spawn
        self._opening: dict[tuple[str, SandboxId, int], asyncio.Lock] = {}
        self._goodbyes = asyncio.Semaphore(_MAX_GOODBYES)
        self._ids = itertools.count(1)

    async def session_on(self, session: LegacySession, route: Route) -> UpstreamSession:
        """Return the session's own session on a sandbox, opening it if there is none.

        Raises:
            TransportError: The sandbox could not be reached or did not answer.
            RemoteProtocolError: It refused, or answered something else.
        """
        key = (route.sandbox_id, route.generation)
        lock = self._opening.setdefault((session.id, *key), asyncio.Lock())
        try:
            async with lock:
                known = session.upstreams.get(key)
                if known is None:
                    known = session.upstreams[key] = await self._open(session, route)
                return known
        finally:
            if not lock.locked():
                self._opening.pop((session.id, *key), None)

    async def notify(self, upstream: UpstreamSession, message: bytes) -> None:
        """Pass on what a client says that needs no answer; a sandbox that does not take it leaves a line in the log.

        It may be said twice, where a connection broke under it: a sandbox ignores what it does not wait for.
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
        """`notify`, beside everything else."""
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
                    upstream.route, head, timeout_seconds=_GOODBYE_SECONDS, max_bytes=self._limits.max_head_bytes
                )
            except AshError as error:
                log.info("a session on sandbox %s was not ended: %s", upstream.route.sandbox_id, error)

    async def _open(self, session: LegacySession, route: Route) -> UpstreamSession:
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
        """Hear what the sandbox asks outside of any call, if it has anything to be heard by."""
        channel = Backchannel(session, upstream, self.tell)
        route = upstream.route
        try:
            connection = self._upstreams.idle(route) or await self._upstreams.connect(route)
            connection.send(self._head(route, upstream.headers(), 0, method=b"GET"), channel)
            upstream.listening = connection.close
            async with asyncio.timeout(_LISTEN_SECONDS):
                await channel.answered.wait()
        except (AshError, TimeoutError) as error:
            upstream.stop_listening()
            log.info("sandbox %s cannot be listened to: %s", route.sandbox_id, error)

    def _request(self, method: str, params: dict[str, Any]) -> bytes:
        return orjson.dumps({"jsonrpc": "2.0", "id": f"ash-{next(self._ids)}", "method": method, "params": params})

    async def _post(
        self, route: Route, body: bytes, headers: dict[bytes, bytes]
    ) -> tuple[int, _framing.Headers, bytes]:
        answer = await self._upstreams.request(
            route,
            self._head(route, headers, len(body)) + body,
            timeout_seconds=self._limits.handshake_timeout_seconds,
            max_bytes=self._limits.max_handshake_bytes,
        )
        return answer.status, answer.headers, bytes(answer.body)

    def _head(self, route: Route, headers: dict[bytes, bytes], length: int, *, method: bytes = b"POST") -> bytes:
        token = self._tokens.mint(route.sandbox_id, route.generation)
        lines = _framing.lines_of([_ACCEPT, _JSON, (HEADER_TOKEN.encode(), token), *headers.items()])
        return _framing.request_head(method, length, lines)


_NOTHING_MORE: Final = orjson.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"})


def _session_id(headers: _framing.Headers) -> bytes | None:
    value = _framing.one(headers, b"mcp-session-id")
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
