"""The SDK's HTTP connection to a hive: one POST per call, over one pool, with retries and a deadline."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import anyio

from ash_mcp._protocol import as_object, build_request
from ash_mcp._reading import OnProgress, read_stream, read_whole
from ash_mcp._retry import call_again
from ash_mcp._verdict import Head, error_of_message, is_result_lost
from ash_mcp.errors import (
    AshError,
    AshTimeout,
    ConfigError,
    ConnectFailed,
    LocalProtocolError,
    RemoteProtocolError,
    StreamBroken,
    TransportError,
)
from ash_mcp.results import Progress
from ash_mcp.settings import ClientSettings
from ash_mcp.wire import HEADER_SCOPE

if TYPE_CHECKING:
    import httpx

    from ash_mcp._websocket import WebSocket

__all__ = ["Connection", "OnProgress", "new_client", "translated"]

_KEEPALIVE_SECONDS: Final = 4.0
"""Below uvicorn's 5: an idle connection is let go before the other side may close it under a call."""


class Connection:
    """Calls tools of a hive. Opens its pool at the first call; runs no background task.

    Args:
        settings: Where the hive is and how long to wait.
        transport: Takes the place of the network, in tests.
    """

    def __init__(self, settings: ClientSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.settings = settings
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._process = os.getpid()
        self._inherited: list[httpx.AsyncClient] = []
        """Pools of the processes that forked this one. Never closed here: that would disturb theirs."""
        self._closed = False
        self._ids = itertools.count(1)

    def another(self) -> Connection:
        """Return one to the same hive, with a pool of its own."""
        return Connection(self.settings, self._transport)

    async def aclose(self) -> None:
        """Close the pool; calls afterwards are refused. Idempotent."""
        self._leave_inherited()
        self._closed = True
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def call_tool(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        timeout_seconds: float | None = None,
        repeatable: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Mapping[str, Any]:
        """Call a tool of the hive and return its result as it came, also one with `isError`.

        Args:
            name: The tool.
            arguments: Its arguments, JSON values.
            timeout_seconds: The bound of the call, its retries included; None takes the settings' value.
            repeatable: Whether a call whose answer was lost may be sent again.
            on_progress: Called with the call's progress and with each retry.

        Raises:
            AshError: The hive failed or refused, or the connection did.
        """
        limit = self.settings.timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = anyio.current_time() + limit

        connection_broke = False

        async def attempt() -> tuple[Head, Mapping[str, Any]]:
            return await self._exchange({"name": name, "arguments": dict(arguments)}, on_progress)

        def report_retry(error: AshError, delay: float) -> None:
            nonlocal connection_broke
            connection_broke = connection_broke or isinstance(error, TransportError)
            if on_progress is not None:
                on_progress(Progress(0.0, None, f"trying again in {delay:.1f} s: {error.message}"))

        with anyio.move_on_after(limit):
            head, result = await call_again(
                attempt,
                remaining_seconds=lambda: deadline - anyio.current_time(),
                repeatable=repeatable,
                on_wait=report_retry,
            )
            if connection_broke and is_result_lost(head, result):
                raise StreamBroken(f"the connection to the sandbox was broken for so long that it gave up {name}")
            return result
        raise AshTimeout(f"the hive did not answer {name} within {limit:g} s; whether it ran is unknown")

    async def _exchange(
        self, params: Mapping[str, Any], on_progress: OnProgress | None
    ) -> tuple[Head, Mapping[str, Any]]:
        """Send one call, without retries, and return the head of the response and the tool's result."""
        client = self._open()
        try:
            request = build_request("tools/call", params, request_id=next(self._ids), progress=on_progress is not None)
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"the arguments of {params['name']} cannot be sent as JSON: {exc}") from exc
        headers = {**request.headers, **self._auth_headers()}
        async with (
            translated(self.settings.url),
            client.stream("POST", self.settings.url, content=request.body, headers=headers) as response,
        ):
            head = Head.of(response.status_code, response.headers)
            limit = self.settings.max_reply_bytes
            if head.is_stream and head.status == 200:
                message = await read_stream(
                    response, head, request_id=request.id, max_bytes=limit, on_progress=on_progress
                )
            else:
                message = await read_whole(response, head, max_bytes=limit)
        error = error_of_message(head, message)
        if error is not None:
            raise error
        return head, as_object(message.get("result")) or {}

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str],
        quiet_seconds: float,
        content: AsyncIterator[bytes] | None = None,
    ) -> AsyncGenerator[httpx.Response, None]:
        """Send one request that is not MCP, once, and yield its response as it comes.

        Args:
            target: Path and query at the hive.
            quiet_seconds: How long nothing may come or go.

        Raises:
            AshError: The connection failed.
        """
        import httpx

        timeout = httpx.Timeout(quiet_seconds, connect=self.settings.connect_timeout_seconds, pool=None)
        async with (
            translated(self.settings.url),
            self._open().stream(
                method,
                self.settings.base_url + target,
                content=content,
                headers={**headers, **self._auth_headers()},
                timeout=timeout,
            ) as response,
        ):
            yield response

    async def open_websocket(self, sandbox_id: str, door: str) -> WebSocket:
        """Open a WebSocket to a sandbox, through one of its doors.

        Raises:
            AshError: The hive or the sandbox refused, or could not be reached.
        """
        from ash_mcp._websocket import WebSocket

        client = self._open()
        async with translated(self.settings.url):
            return await WebSocket.open(client, self.settings.door_url(sandbox_id, door), self._auth_headers())

    def _auth_headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.settings.token is not None:
            headers["authorization"] = f"Bearer {self.settings.token}"
        if self.settings.scope is not None:
            headers[HEADER_SCOPE] = self.settings.scope
        return headers

    def _open(self) -> httpx.AsyncClient:
        if self._closed:
            raise LocalProtocolError("this Hive is closed; make a new one")
        self._leave_inherited()
        if self._client is None:
            self._client = new_client(self.settings, self._transport)
        return self._client

    def _leave_inherited(self) -> None:
        """After a fork, set the parent's pool aside: its connections belong to the parent."""
        if self._process != os.getpid():
            self._process = os.getpid()
            if self._client is not None:
                self._inherited.append(self._client)
            self._client = None


def new_client(settings: ClientSettings, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """Return a client with a pool of its own; no timeout bounds its exchanges but that of connecting."""
    import httpx

    return httpx.AsyncClient(
        transport=transport,
        # Without TLS there is nothing to verify, and loading the trust store would take 20 ms.
        verify=settings.url.startswith("https:"),
        trust_env=not settings.is_loopback,
        timeout=httpx.Timeout(None, connect=settings.connect_timeout_seconds),
        limits=httpx.Limits(
            max_connections=settings.max_connections,
            max_keepalive_connections=settings.max_connections,
            keepalive_expiry=_KEEPALIVE_SECONDS,
        ),
        headers={"user-agent": "ash-mcp"},
        follow_redirects=False,
    )


@contextlib.asynccontextmanager
async def translated(url: str) -> AsyncGenerator[None, None]:
    """Translate httpx's exceptions into `AshError`s, by whether the request can have been sent."""
    import httpx

    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        raise ConnectFailed(
            f"no hive answers at {url} ({exc or type(exc).__name__}); start one with `ash up`, or set ASH_URL"
        ) from exc
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as exc:
        raise ConfigError(f"the hive's URL or token cannot be used: {exc}") from exc
    except httpx.ProxyError as exc:
        raise ConnectFailed(f"the proxy before {url} refused: {exc}") from exc
    except (httpx.DecodingError, httpx.TooManyRedirects) as exc:
        raise RemoteProtocolError(f"the hive's answer cannot be read: {exc}") from exc
    except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.TimeoutException) as exc:
        raise StreamBroken(
            f"the connection to {url} broke before the answer ({exc or type(exc).__name__}); "
            "whether the call ran is unknown"
        ) from exc
    except httpx.HTTPError as exc:
        raise TransportError(f"the call to {url} failed: {exc}") from exc
