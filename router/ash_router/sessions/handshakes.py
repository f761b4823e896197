"""Handshake-era sessions on sandboxes: opens them, sets their log level, sends notifications, and ends them.

A sandbox without a runner is always spoken to in the handshake era, which every server knows. Stateless calls to it
borrow a session: one call at a time has it, since nothing keeps the request ids of two callers apart, and the next
call of the same caller gets the same one, since servers keep things in sessions.
"""

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

__all__ = ["Handshakes", "session_id_of", "version_of"]

log = logging.getLogger(__name__)

_ACCEPT: Final = (b"accept", b"application/json, text/event-stream")
_JSON: Final = (b"content-type", b"application/json")
_DATA_LINE: Final = re.compile(rb"^data: ?(.*?)\r?$", re.MULTILINE)
_SESSION_ID: Final = re.compile(rb"[\x21-\x7e]{1,256}")
_MAX_GOODBYES: Final = 32
"""How many upstream sessions are ended at the same time."""
_GOODBYE_SECONDS: Final = 2.0
_LISTEN_SECONDS: Final = 5.0
_MAX_LENT: Final = 8
"""How many sessions of one caller on one sandbox are kept for its next stateless calls."""
_MAX_PARTING: Final = 256
"""How many borrowed sessions of one sandbox wait for their end; one that answers has few at a time."""
_OWN_PARAMS: Final[dict[str, Any]] = {
    "protocolVersion": HANDSHAKE_VERSIONS[-1],
    "capabilities": {},
    "clientInfo": {"name": "ash", "version": "0"},
}
"""Of a session that stateless calls borrow: nobody could be asked in it."""


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
        self._lent: dict[SandboxId, dict[str, list[UpstreamSession]]] = {}
        """Sessions that wait for their next stateless call, by sandbox and principal; the latest is last. A sandbox
        has an entry from its first such call to its end."""
        self._parting: Counter[SandboxId] = Counter()
        """The number of borrowed sessions that are being ended, by sandbox."""

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

    def borrow_idle(self, owner: str, route: Route) -> UpstreamSession | None:
        """Take a session that an earlier stateless call of the same principal has left, or None."""
        kept = self._lent.setdefault(route.sandbox_id, {}).get(owner)
        return kept.pop() if kept else None

    async def borrow(self, owner: str, route: Route) -> UpstreamSession:
        """Take a session for one stateless call. Raises as `session_on` does, but for `CapacityExceeded`."""
        return self.borrow_idle(owner, route) or await self._begin(route, _OWN_PARAMS)

    def give_back(self, owner: str, upstream: UpstreamSession, *, usable: bool) -> None:
        """Leave a borrowed session to the next call; end it where its call may still run, or where there are many."""
        sandbox_id = upstream.route.sandbox_id
        lent = self._lent.get(sandbox_id)
        if lent is None:
            return  # the sandbox has ended meanwhile, and its address may be another's
        if usable and len(kept := lent.setdefault(owner, [])) < _MAX_LENT:
            kept.append(upstream)
        elif self._parting[sandbox_id] < _MAX_PARTING:
            self._parting[sandbox_id] += 1
            self._spawn(self._part(upstream))

    def drop_lent(self, owner: str, sandbox_id: SandboxId) -> None:
        """Forget the sessions of a principal on a sandbox that has forgotten one of them."""
        self._lent.get(sandbox_id, {}).pop(owner, None)

    def forget(self, sandbox_id: SandboxId) -> None:
        """Forget the borrowed sessions on a sandbox that has ended."""
        self._lent.pop(sandbox_id, None)

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

    async def _part(self, upstream: UpstreamSession) -> None:
        try:
            await self.end(upstream)
        finally:
            self._parting[upstream.route.sandbox_id] -= 1
            if not self._parting[upstream.route.sandbox_id]:
                del self._parting[upstream.route.sandbox_id]

    async def _open(self, session: LegacySession, route: Route) -> UpstreamSession:
        principal = session.admitted.principal
        limit = self._limits.backchannels_of(principal)
        if session.can_be_asked and self._listening[principal.subject] >= limit.most:
            raise limit.reached("backchannels")
        upstream = await self._begin(route, session.initialize_params())
        if session.log_level is not None:
            await self.set_level(upstream, session.log_level)
        if session.can_be_asked and upstream.id is not None:
            await self._listen(session, upstream)
        return upstream

    async def _begin(self, route: Route, params: dict[str, Any]) -> UpstreamSession:
        hello = self._request("initialize", params)
        answer = await self._post(route, hello, {b"mcp-protocol-version": params["protocolVersion"].encode()})
        if answer[0] != 200:
            raise RemoteProtocolError(f"the sandbox refused to open a session: it answered {answer[0]}")
        upstream = UpstreamSession(route, session_id_of(answer[1]), version_of(answer[2]))
        await self._post(route, _NOTHING_MORE, upstream.headers())
        return upstream

    async def _listen(self, session: LegacySession, upstream: UpstreamSession) -> None:
        """Open the session's standalone stream, if the sandbox offers one."""
        channel = Backchannel(session, upstream, self.tell)
        route = upstream.route
        try:
            connection = self._upstreams.take_idle(route.endpoint) or await self._upstreams.connect(route.endpoint)
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
        endpoint = route.endpoint
        token = [(HEADER_TOKEN.encode(), self._tokens.mint(route.sandbox_id))] if endpoint.has_runner else []
        lines = framing.lines_of([_ACCEPT, _JSON, *token, *headers.items()])
        return framing.request_head(method, endpoint.authority, length, lines, target=endpoint.mcp_path.encode())


_NOTHING_MORE: Final = orjson.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"})


def session_id_of(headers: framing.Headers) -> bytes | None:
    """Return the session that an answer to `initialize` opened; None on a server that keeps none.

    Raises:
        RemoteProtocolError: It cannot be one.
    """
    value = framing.one(headers, b"mcp-session-id")
    if value is not None and _SESSION_ID.fullmatch(value) is None:
        raise RemoteProtocolError("the sandbox gave its session an id that cannot be one")
    return value


def version_of(body: bytes) -> bytes:
    """Return the protocol version that an answer to `initialize` names.

    Raises:
        RemoteProtocolError: It names none of the handshake era.
    """
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
