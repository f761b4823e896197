"""Requests to a hive's REST, for callers that do not await: retries, a deadline, and failures as `AshError`s.

No connection and no thread outlives a request: a program may have a thousand clients, and may fork.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import anyio

from ash_mcp._blocking import LoopThread
from ash_mcp._connection import new_client, translated
from ash_mcp._protocol import as_object, parse_message
from ash_mcp._reading import read_body
from ash_mcp._retry import call_again
from ash_mcp._verdict import Head, error_of_status
from ash_mcp.errors import (
    AshError,
    AshTimeout,
    CapacityExceeded,
    ConfigError,
    Conflict,
    HiveFault,
    NotFound,
    PermissionDenied,
    RemoteProtocolError,
    RequestRefused,
    StreamBroken,
    TransportError,
    Unauthenticated,
)
from ash_mcp.settings import ClientSettings

if TYPE_CHECKING:
    import httpx

__all__ = ["CHECK_SECONDS", "Request", "Rest", "split_key", "was_lost"]

CHECK_SECONDS: Final = 5.0
"""The bound of a request that asks whether a server is there."""

_MAX_REPLY_BYTES: Final = 4 * 1024 * 1024
"""An answer of `DELETE /deprovision-all` has about 50 bytes for each sandbox."""


class Ended(RequestRefused):
    """What the request was to make was ended while it started."""

    kind = "start_ended"


_REFUSALS: Final[Mapping[int, type[AshError]]] = {
    400: ConfigError,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    410: Ended,
    503: RequestRefused,
}


def split_key(url: str) -> tuple[str, str | None]:
    """Return a server's URL without its key and without a last `/`, and the key, if there is one.

    The key is the user, `http://key@host` or `http://key:@host`, or where there is none the password.

    Raises:
        ConfigError: It is no URL of a server.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable, parts = False, urlsplit("")
    if not usable:
        raise ConfigError(f"{url.rpartition('@')[2]!r} is not the URL of a hive, such as http://127.0.0.1:8420")
    base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return base, unquote(parts.username or parts.password or "") or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, and what may be done with it."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout_seconds: float
    """Its bound, retries included."""
    repeatable: bool = False
    """Whether it may be sent again after its answer was lost, whoever the server is."""
    repeatable_by_hive: bool = False
    """Whether it may be where the server is a hive of Ash, which knows `Idempotency-Key`."""


class Rest:
    """The REST of the server at `base_url`, which has no key in it; `token` is sent as a bearer token."""

    def __init__(self, base_url: str, token: str | None) -> None:
        self._base_url = base_url
        self._settings = ClientSettings(url=base_url, token=token)

    def ask(self, request: Request, on_retry: Callable[[AshError, float], None]) -> Mapping[str, Any]:
        """Send a request and return its answer, a JSON object.

        Args:
            on_retry: Called with an error and the seconds until the request is sent again.

        Raises:
            AshError: The server failed or refused, or the connection did.
        """
        return _run(partial(self._ask, request, on_retry))

    def answers(self, path: str) -> bool:
        """Say whether the server answers `path` with 200 within `CHECK_SECONDS`."""
        return _run(partial(self._answers, path))

    async def _ask(self, request: Request, on_retry: Callable[[AshError, float], None]) -> Mapping[str, Any]:
        deadline = anyio.current_time() + request.timeout_seconds
        lost: list[AshError] = []
        async with new_client(self._settings) as client:
            with anyio.move_on_after(request.timeout_seconds):
                return await call_again(
                    partial(self._attempt, client, request, lost),
                    remaining_seconds=lambda: deadline - anyio.current_time(),
                    repeatable=request.repeatable,
                    on_wait=on_retry,
                )
        what = f"{request.method} {request.path}"
        raise AshTimeout(f"{what} was not answered within {request.timeout_seconds:g} s; whether it ran is unknown")

    async def _attempt(self, client: httpx.AsyncClient, request: Request, lost: list[AshError]) -> Mapping[str, Any]:
        """Send a request once; what was lost of it before and now is in `lost`."""
        try:
            head, headers, body = await self._exchange(client, request)
            return _answer_of(head, headers, body)
        except Ended as error:
            # the hive that lost the answer was going down, and with it went the start; the key is free again
            error.retryable = bool(lost)
            raise
        except TransportError as error:
            if was_lost(error) and request.repeatable_by_hive and await self._is_hive(client):
                error.retryable = True
                lost.append(error)
            raise

    async def _exchange(self, client: httpx.AsyncClient, request: Request) -> tuple[Head, httpx.Headers, bytes]:
        url = self._base_url + request.path
        token = self._settings.token
        headers = {**request.headers, **({"authorization": f"Bearer {token}"} if token is not None else {})}
        async with (
            translated(self._base_url),
            client.stream(request.method, url, json=request.body, headers=headers) as response,
        ):
            head = Head.of(response.status_code, response.headers)
            return head, response.headers, await read_body(response, head, max_bytes=_MAX_REPLY_BYTES)

    async def _is_hive(self, client: httpx.AsyncClient) -> bool:
        """Ask what the server is, also one that is just starting again."""
        check = Request(method="GET", path="/healthz", timeout_seconds=CHECK_SECONDS)
        with anyio.move_on_after(CHECK_SECONDS), contextlib.suppress(AshError):
            head, _, _ = await call_again(
                partial(self._exchange, client, check),
                remaining_seconds=lambda: CHECK_SECONDS,
                repeatable=True,
                on_wait=lambda _error, _delay: None,
            )
            return head.from_hub
        return False

    async def _answers(self, path: str) -> bool:
        check = Request(method="GET", path=path, timeout_seconds=CHECK_SECONDS)
        async with new_client(self._settings) as client:
            with anyio.move_on_after(CHECK_SECONDS), contextlib.suppress(AshError):
                head, _, _ = await self._exchange(client, check)
                return head.status == 200
        return False


def was_lost(error: AshError) -> bool:
    """Say whether a request may have been done although no answer came."""
    return isinstance(error, StreamBroken) or (isinstance(error, TransportError) and "status" in error.data)


def _run(do: Callable[[], Any]) -> Any:
    loop = LoopThread()
    try:
        return loop.run(do)
    finally:
        loop.close()


def _answer_of(head: Head, headers: httpx.Headers, body: bytes) -> Mapping[str, Any]:
    message = parse_message(body)
    if head.status < 300 and message is not None:
        return message
    if head.status < 300:
        raise RemoteProtocolError("what answered is not a hive: its answer is no JSON object")
    raise _refusal(head, headers, message or {})


def _refusal(head: Head, headers: httpx.Headers, message: Mapping[str, Any]) -> AshError:
    """Return what a refusal means: typed by the hive, or with the seed's `{"error": words}`, or of a gateway."""
    text = message.get("error")
    if not isinstance(text, str):
        if head.status < 500 and as_object(text) is None:
            return RequestRefused(f"the server answered {head.status}")
        return error_of_status(head, message) or HiveFault(f"the server answered {head.status}")
    after = headers.get("retry-after", "")
    if head.status in (429, 503) and re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", after):
        return CapacityExceeded(text, retry_after_seconds=float(after))
    return _REFUSALS.get(head.status, HiveFault)(text)
