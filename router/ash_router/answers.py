"""What the hive itself writes to callers: heads, refusals, failures. Pure."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Final, Protocol

import orjson

from ash_mcp.errors import AshError, CapacityExceeded
from ash_mcp.wire import (
    HEADER_NONCE,
    HEADER_ORIGIN,
    ORIGIN_HUB,
    ORIGIN_SANDBOX,
    failure_to_json,
    http_status,
    tool_failure,
)
from ash_router import _framing
from ash_router._framing import Headers
from ash_router.bodies import RequestId

__all__ = ["FROM_HUB", "FROM_SANDBOX", "NONCE", "Caller", "accepted", "failure", "head", "refusal", "whole_failure"]

NONCE: Final = HEADER_NONCE.encode()
FROM_HUB: Final = (HEADER_ORIGIN.encode(), ORIGIN_HUB.encode())
FROM_SANDBOX: Final = (HEADER_ORIGIN.encode(), ORIGIN_SANDBOX.encode())


class Caller(Protocol):
    """The connection that a call came on, as far as its answer is concerned."""

    @property
    def takes_chunks(self) -> bool:
        """False for HTTP/1.0, where a body of unknown length ends with the connection."""
        ...

    @property
    def keeps_alive(self) -> bool: ...

    @property
    def default_headers(self) -> Headers: ...

    def write(self, data: bytes) -> None: ...

    def finished(self) -> None:
        """The answer is complete."""
        ...

    def broken_off(self) -> None:
        """The answer cannot be completed; only the end of the connection can say so."""
        ...


def head(caller: Caller, status: int, *headers: Headers) -> bytes:
    """Return the head of an answer, which says so if the connection ends with it."""
    closing = [] if caller.keeps_alive else [(b"connection", b"close")]
    return _framing.response_head(status, caller.default_headers, *headers, closing)


def accepted(caller: Caller) -> bytes:
    """Return a whole answer that says that a notification was taken."""
    return head(caller, 202, [(b"content-length", b"0"), FROM_HUB])


def failure(request_id: RequestId, error: AshError, *, nonce: str | None, is_modern: bool) -> bytes:
    """Return `error` as the JSON-RPC answer to a tool call."""
    result = tool_failure(error, nonce=nonce)
    if is_modern:
        result = {"resultType": "complete", **result}
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}, default=str)


def retry_after(error: AshError) -> list[tuple[bytes, bytes]]:
    """Return the header that says when to come back, if `error` does."""
    if not isinstance(error, CapacityExceeded) or not error.retryable:
        return []
    return [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_seconds)))]


def whole_failure(caller: Caller, body: bytes, error: AshError, more: Headers) -> bytes:
    """Return a failure, as `failure` wrote it, as a whole answer of the hive's."""
    ours = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        FROM_HUB,
        (NONCE, secrets.token_hex(16).encode()),
    ]
    return head(caller, 200, ours, retry_after(error), more) + body


def refusal(caller: Caller, error: AshError, status: int | None, headers: Sequence[tuple[str, str]]) -> bytes:
    """Return a whole answer that says why a request is not even looked at."""
    body = orjson.dumps({"error": failure_to_json(error)}, default=str)
    said = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    ours = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), FROM_HUB]
    return head(caller, status or http_status(error), said, retry_after(error), ours) + body
