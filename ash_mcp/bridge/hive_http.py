"""The bridge's streamable HTTP client: sends messages and hands on each answer as it arrives."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio

from ash_mcp._protocol import EventDecoder, EventTooLarge, parse_message
from ash_mcp._verdict import Head, error_of_status, misbehaviour
from ash_mcp.errors import ConnectFailed, StreamBroken
from ash_mcp.settings import ClientSettings
from ash_mcp.wire import HEADER_SCOPE

if TYPE_CHECKING:
    import httpx

__all__ = ["HiveHttp", "Reply", "load_httpx"]

Taker = Callable[[bytes, Mapping[str, Any]], Awaitable[bool]]
"""Called with each message's bytes and the message; returns True to stop reading."""

_KEEPALIVE_SECONDS: Final = 4.0
"""An idle connection is let go before the hive may close it under a request."""
_SENT_EVENT: Final = "http11.send_request_body.complete"


@dataclass(frozen=True, slots=True)
class Reply:
    """A response of which the head has been read."""

    head: Head
    session_id: str | None
    _response: httpx.Response
    _max_bytes: int

    async def read(self, take: Taker) -> None:
        """Give each message to `take` until it has enough or the answer ends.

        Raises:
            AshError: The answer is a refusal, or no message.
        """
        if self.head.is_stream and self.head.status == 200:
            await self._read_stream(take)
            return
        body = bytearray()

        async def keep(piece: bytes) -> bool:
            body.extend(piece)
            if len(body) > self._max_bytes:
                raise misbehaviour(self.head, f"answered more than {self._max_bytes} bytes")
            return False

        await _each_piece(self._response, keep)
        message = parse_message(bytes(body))
        error = error_of_status(self.head, message)
        if error is not None:
            raise error
        await take(bytes(body), message or {})

    async def _read_stream(self, take: Taker) -> None:
        decoder = EventDecoder(max_event_bytes=self._max_bytes)

        async def cut(piece: bytes) -> bool:
            try:
                events = list(decoder.feed(piece))
            except EventTooLarge as exc:
                raise misbehaviour(self.head, f"sent too much: {exc}") from exc
            for data in events:
                message = parse_message(data)
                if message is not None and await take(data, message):
                    return True
            return False

        await _each_piece(self._response, cut)


async def _each_piece(response: httpx.Response, take: Callable[[bytes], Awaitable[bool]]) -> None:
    """Give `take` every piece of the body until it says that it has enough; what it raises goes on to the caller."""
    fault: Exception | None = None
    with anyio.CancelScope() as reading:
        async for piece in response.aiter_bytes():
            # httpx nests generators here. Left early they would wait for the garbage collector, so whatever ends the
            # reading does it inside them, as the cancelling of their next read.
            with anyio.CancelScope(shield=True):
                try:
                    if fault is not None or await take(piece):
                        reading.cancel()
                except Exception as exc:
                    fault = exc
                    reading.cancel()
    if fault is not None:
        raise fault


async def load_httpx() -> None:
    """Import httpx in a thread: that takes longer than a host may wait for its first answer."""
    await anyio.to_thread.run_sync(importlib.import_module, "httpx")


class HiveHttp:
    """One pool of connections to a hive, whose URL may change between calls."""

    def __init__(self, settings: ClientSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        self._transport = transport
        self._max_bytes = settings.max_reply_bytes
        self._made: httpx.AsyncClient | None = None

    async def _client(self) -> httpx.AsyncClient:
        await load_httpx()
        if self._made is None:
            self._made = _new_client(self._settings, self._transport)
        return self._made

    async def aclose(self) -> None:
        if self._made is not None:
            await self._made.aclose()

    @asynccontextmanager
    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], on_sent: Callable[[], object] = bool
    ) -> AsyncGenerator[Reply]:
        """Send a message and give its answer as soon as its head has come.

        Args:
            on_sent: Called when all of the message is on its way.

        Raises:
            ConnectFailed: Nothing was sent.
            StreamBroken: The connection broke; whether the message was taken is unknown.
        """

        async def trace(event: str, _: Mapping[str, Any]) -> None:
            if event == _SENT_EVENT:
                on_sent()

        posting = {"content-type": "application/json", "accept": "application/json, text/event-stream", **headers}
        client = await self._client()
        async with (
            _translated(url),
            client.stream("POST", url, content=body, headers=posting, extensions={"trace": trace}) as response,
        ):
            yield self._reply(response)

    @asynccontextmanager
    async def listen(self, url: str, headers: Mapping[str, str]) -> AsyncGenerator[Reply]:
        """Open the stream of server-initiated messages (GET); raises as `post`."""
        listening = {"accept": "text/event-stream", **headers}
        client = await self._client()
        async with _translated(url), client.stream("GET", url, headers=listening) as response:
            yield self._reply(response)

    async def delete(self, url: str, headers: Mapping[str, str]) -> None:
        """End a session; raises as `post`."""
        client = await self._client()
        async with _translated(url):
            await client.delete(url, headers=dict(headers))

    def _reply(self, response: httpx.Response) -> Reply:
        head = Head.of(response.status_code, response.headers)
        return Reply(head, response.headers.get("mcp-session-id"), response, self._max_bytes)


def _new_client(settings: ClientSettings, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    import httpx

    return httpx.AsyncClient(
        transport=transport,
        verify=settings.url.startswith("https:"),
        trust_env=not settings.is_loopback,
        timeout=httpx.Timeout(None, connect=settings.connect_timeout_seconds),
        limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS),
        headers=_standing_headers(settings),
        follow_redirects=False,
    )


def _standing_headers(settings: ClientSettings) -> dict[str, str]:
    headers = {"user-agent": "ash-bridge", "accept-encoding": "identity"}
    if settings.token is not None:
        headers["authorization"] = f"Bearer {settings.token}"
    if settings.scope is not None:
        headers[HEADER_SCOPE] = settings.scope
    return headers


@contextlib.asynccontextmanager
async def _translated(url: str) -> AsyncGenerator[None]:
    import httpx

    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as exc:
        raise ConnectFailed(f"no hive answers at {url} ({exc or type(exc).__name__})") from exc
    except httpx.HTTPError as exc:
        raise StreamBroken(
            f"the connection to the hive broke before the answer ({exc or type(exc).__name__}); "
            "whether the call ran is unknown"
        ) from exc
