"""The handshake-era session of a bridge with the hive, opened once there is one, and again when it was lost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from ash_mcp._protocol import as_object
from ash_mcp.bridge.frames import Frame, notification_line, one_line
from ash_mcp.bridge.hive_http import HiveHttp
from ash_mcp.errors import AshError, AshTimeout, RemoteProtocolError

__all__ = ["LegacySession", "SessionLost"]

_LISTEN_DELAYS: Final = (0.0, 1.0, 2.0, 4.0, 8.0)
_LISTEN_OPEN_SECONDS: Final = 2.0
_STEADY_SECONDS: Final = 30.0
"""A stream that lasted this long does not count as a failed attempt."""
_OPEN_ID: Final = "ash-bridge-initialize"
_OPEN_SECONDS: Final = 30.0


class SessionLost(Exception):
    """The hive does not know the session (any more), and has done nothing of what was asked in it."""


class LegacySession:
    """One session with the hive, and the host's `initialize`, with which it is opened.

    Args:
        send: Sends a line to the host.
        streams: Runs the stream of server-initiated messages.
    """

    def __init__(self, http: HiveHttp, send: Callable[[bytes], Awaitable[None]], streams: TaskGroup) -> None:
        self._http = http
        self._send = send
        self._streams = streams
        self._opening: Frame | None = None
        self._initialized = False
        self._id: str | None = None
        self._url: str | None = None
        self._version: str | None = None
        self._listening = anyio.CancelScope()
        self._lock = anyio.Lock()
        """Held while a session is being opened."""

    @property
    def url(self) -> str | None:
        """Where the session lives, or None without one."""
        return self._url if self._id is not None else None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every message of the session; empty without one."""
        if self._id is None:
            return {}
        version = {"mcp-protocol-version": self._version} if self._version is not None else {}
        return {"mcp-session-id": self._id, **version}

    def begin(self, opening: Frame) -> None:
        """Take a host's `initialize`; what was open until then is left to the hive."""
        self._opening, self._initialized, self._id, self._url = opening, False, None, None
        self._listening.cancel()

    def forget(self, session_id: str) -> None:
        """Drop a session that the hive has lost."""
        if self._id == session_id:
            self._id = None
            self._listening.cancel()

    async def ensure(self, url: str) -> dict[str, str]:
        """Return the headers of a session at `url`, opening it if it is not; empty if the host has begun none.

        Raises:
            AshError: It cannot be opened.
        """
        async with self._lock:
            if self._opening is not None and (self._id is None or self._url != url):
                self._listening.cancel()
                await self._open(self._opening, url)
            return self.headers

    async def note_initialized(self) -> None:
        """Say that the host is ready, and listen from now on."""
        self._initialized = True
        await self.post(notification_line("notifications/initialized"))
        self._listening.cancel()
        if self.url is not None:
            self._listening, opened = anyio.CancelScope(), anyio.Event()
            self._streams.start_soon(self._listen, self._listening, self.url, self.headers, opened)
            with anyio.move_on_after(_LISTEN_OPEN_SECONDS):  # what is said before it is open would be lost
                await opened.wait()

    async def post(self, line: bytes) -> None:
        """Forward a message that has no answer; it is dropped where the session is lost."""
        if self._id is None or self._url is None:
            return
        async with self._http.post(self._url, line, self.headers) as reply:
            if reply.head.status == 404:
                self.forget(self._id)

    async def close(self) -> None:
        """End the session with the hive."""
        if self._id is not None and self._url is not None:
            await self._http.delete(self._url, self.headers)

    async def _open(self, opening: Frame, url: str) -> None:
        body = json.dumps(
            {"jsonrpc": "2.0", "id": _OPEN_ID, "method": "initialize", "params": dict(opening.params)}
        ).encode()
        again = self._url is not None
        found: list[Mapping[str, Any]] = []

        async def take(_: bytes, message: Mapping[str, Any]) -> bool:
            if message.get("id") == _OPEN_ID:
                found.append(message)
            return bool(found)

        with anyio.move_on_after(_OPEN_SECONDS) as bound:
            async with self._http.post(url, body, {}) as reply:
                await reply.read(take)
                session_id = reply.session_id
            if not found or "result" not in found[0]:
                raise RemoteProtocolError("the hive did not open a session; connect again")
            self._opened(url, session_id, found[0])
        if bound.cancelled_caught:
            raise AshTimeout(f"the hive did not open a session within {_OPEN_SECONDS:g} s", retryable=True)
        if self._initialized:
            await self.note_initialized()
            if again:
                await self._send(notification_line("notifications/tools/list_changed"))

    def _opened(self, url: str, session_id: str | None, answer: Mapping[str, Any]) -> None:
        version = (as_object(answer.get("result")) or {}).get("protocolVersion")
        self._url, self._id = url, session_id
        self._version = version if isinstance(version, str) else None

    async def _listen(
        self, scope: anyio.CancelScope, url: str, headers: Mapping[str, str], opened: anyio.Event
    ) -> None:
        """Forward server-initiated messages, reconnecting when the stream breaks, until the session is lost."""

        async def take(raw: bytes, message: Mapping[str, Any]) -> bool:
            del message
            await self._send(one_line(raw))
            return False

        tries = 0
        with scope:
            while tries < len(_LISTEN_DELAYS):
                await anyio.sleep(_LISTEN_DELAYS[tries])
                since = anyio.current_time()
                with contextlib.suppress(AshError):  # it will be tried again
                    async with self._http.listen(url, headers) as reply:
                        opened.set()
                        if reply.head.status == 404:
                            self.forget(headers["mcp-session-id"])
                        if reply.head.status != 200:
                            return
                        await reply.read(take)
                opened.set()
                tries = 1 if anyio.current_time() - since > _STEADY_SECONDS else tries + 1
