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

__all__ = [
    "FROM_HUB",
    "FROM_SANDBOX",
    "NONCE",
    "Caller",
    "accepted",
    "failure",
    "head",
    "new_nonce",
    "passed_head",
    "refusal",
    "whole_failure",
]

NONCE: Final = HEADER_NONCE.encode()
FROM_HUB: Final = (HEADER_ORIGIN.encode(), ORIGIN_HUB.encode())
FROM_SANDBOX: Final = (HEADER_ORIGIN.encode(), ORIGIN_SANDBOX.encode())

_NONCE_BYTES: Final = 16
_NONCES: Final[list[bytes]] = []


class Caller(Protocol):
    """The connection that a call came on, as far as its answer is concerned."""

    @property
    def takes_chunks(self) -> bool:
        """False for HTTP/1.0, where a body of unknown length ends with the connection."""
        ...

    @property
    def keeps_alive(self) -> bool: ...

    @property
    def default_lines(self) -> bytes:
        """The headers that stand in every answer of the process, ready."""
        ...

    def write(self, data: bytes) -> None: ...

    def finished(self) -> None:
        """The answer is complete."""
        ...

    def broken_off(self) -> None:
        """The answer cannot be completed; only the end of the connection can say so."""
        ...


def head(caller: Caller, status: int, *headers: Headers) -> bytes:
    """Return the head of an answer, which says so if the connection ends with it."""
    lines = [_framing.lines_of(group) for group in headers]
    return b"".join((_framing.status_line(status), caller.default_lines, *lines, _end(caller)))


def passed_head(caller: Caller, *lines: bytes) -> bytes:
    """Return the head of an answer that is not the hive's own.

    Args:
        lines: What passes of its head, from the status on, and what the hive adds.
    """
    return b"".join((*lines, caller.default_lines, _end(caller)))


def _end(caller: Caller) -> bytes:
    return b"\r\n" if caller.keeps_alive else b"connection: close\r\n\r\n"


def new_nonce() -> bytes:
    """Return what nobody can guess, whatever others of it are known."""
    if not _NONCES:
        # the kernel is asked for many at once
        random = secrets.token_hex(_NONCE_BYTES * 256).encode()
        _NONCES.extend(random[at : at + 2 * _NONCE_BYTES] for at in range(0, len(random), 2 * _NONCE_BYTES))
    return _NONCES.pop()


def accepted(caller: Caller) -> bytes:
    """Return a whole answer that says that a notification was taken."""
    return head(caller, 202, [(b"content-length", b"0"), FROM_HUB])


def failure(request_id: RequestId, error: AshError, *, nonce: bytes | None, is_modern: bool) -> bytes:
    """Return `error` as the JSON-RPC answer to a tool call."""
    result = tool_failure(error, nonce=None if nonce is None else nonce.decode("latin-1"))
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
        (NONCE, new_nonce()),
    ]
    return head(caller, 200, ours, retry_after(error), more) + body


def refusal(caller: Caller, error: AshError, status: int | None, headers: Sequence[tuple[str, str]]) -> bytes:
    """Return a whole answer that says why a request is not even looked at."""
    body = orjson.dumps({"error": failure_to_json(error)}, default=str)
    said = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    ours = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), FROM_HUB]
    return head(caller, status or http_status(error), said, retry_after(error), ours) + body
