"""The hive's own responses: heads, refusals, failures. Pure."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from typing import Final, Protocol

import orjson

from ash_mcp.errors import AshError, CapacityExceeded, ConfigError
from ash_mcp.wire import (
    HEADER_NONCE,
    HEADER_ORIGIN,
    ORIGIN_HUB,
    ORIGIN_SANDBOX,
    failure_to_json,
    http_status,
    jsonrpc_code,
    tool_failure,
)
from ash_router.http import framing
from ash_router.http.bodies import RequestId
from ash_router.http.framing import Headers

__all__ = [
    "FROM_HUB",
    "FROM_SANDBOX",
    "NONCE",
    "QUIET_COMMENT",
    "Caller",
    "accepted",
    "failure",
    "head",
    "json_refusal",
    "new_nonce",
    "passed_head",
    "progress_event",
    "refusal",
    "retry_after",
    "text_refusal",
    "unreadable",
    "whole_failure",
    "without_body",
]

NONCE: Final = HEADER_NONCE.encode()
FROM_HUB: Final = (HEADER_ORIGIN.encode(), ORIGIN_HUB.encode())
FROM_SANDBOX: Final = (HEADER_ORIGIN.encode(), ORIGIN_SANDBOX.encode())

QUIET_COMMENT: Final = b": the call goes on\n\n"
"""The SSE comment that keeps a long call's stream alive."""

PARSE_ERROR: Final = -32700
"""As JSON-RPC has it."""

_NONCE_BYTES: Final = 16
_NONCE_PATTERN: Final = re.compile(b"." * 2 * _NONCE_BYTES)
_NONCES: Final[list[bytes]] = []


class Caller(Protocol):
    """The caller's connection, as writers of answers use it."""

    @property
    def takes_chunks(self) -> bool:
        """False for HTTP/1.0, where a body of unknown length ends with the connection."""
        ...

    @property
    def keeps_alive(self) -> bool: ...

    @property
    def default_lines(self) -> bytes:
        """The server's default header lines, which stand in every answer."""
        ...

    def write(self, data: bytes) -> None: ...

    def finished(self) -> None:
        """The answer is complete."""
        ...

    def broken_off(self) -> None:
        """The answer cannot be completed; only the end of the connection can say so."""
        ...


def head(caller: Caller, status: int, *headers: Headers) -> bytes:
    """Return the head of an answer, with `connection: close` if the connection ends after it."""
    lines = [framing.lines_of(group) for group in headers]
    return passed_head(caller, framing.status_line(status), *lines)


def passed_head(caller: Caller, *lines: bytes) -> bytes:
    """Return the head of an answer that is not the hive's own.

    Args:
        lines: The lines of its head that pass, from the status line on, then those that the hive adds.
    """
    return b"".join((*lines, caller.default_lines, b"\r\n" if caller.keeps_alive else b"connection: close\r\n\r\n"))


def new_nonce() -> bytes:
    """Return a random nonce; knowing others does not help to guess it."""
    if not _NONCES:
        # one system call makes 256 of them
        random = secrets.token_hex(_NONCE_BYTES * 256).encode()
        _NONCES.extend(_NONCE_PATTERN.findall(random))
    return _NONCES.pop()


def accepted(caller: Caller) -> bytes:
    """Return the 202 answer to a notification."""
    return head(caller, 202, [(b"content-length", b"0"), FROM_HUB])


def failure(request_id: RequestId, error: AshError, *, nonce: bytes | None, is_modern: bool) -> bytes:
    """Return `error` as the JSON-RPC answer to a tool call."""
    result = tool_failure(error, nonce=None if nonce is None else nonce.decode("latin-1"))
    if is_modern:
        result = {"resultType": "complete", **result}
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}, default=str)


def retry_after(error: AshError) -> list[tuple[bytes, bytes]]:
    """Return the `retry-after` header if `error` says when to come back, else none."""
    if not isinstance(error, CapacityExceeded) or not error.retryable:
        return []
    return [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_seconds)))]


def progress_event(token: str | int, progress: float, seconds: float) -> bytes:
    """Return the event of a stream that tells that a call goes on, `seconds` after it began."""
    params = {"progressToken": token, "progress": progress, "message": f"running for {seconds:.0f} s"}
    message = {"jsonrpc": "2.0", "method": "notifications/progress", "params": params}
    return framing.sse_event(b"", orjson.dumps(message))


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
    """Return the whole answer that refuses a request with `error`."""
    body = json_refusal(error)
    said = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    ours = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), FROM_HUB]
    return head(caller, status or http_status(error), said, retry_after(error), ours) + body


def text_refusal(caller: Caller, words: str, error: AshError, status: int) -> bytes:
    """Return the whole answer that refuses a request as the seed did: in a line of plain text."""
    body = f"{words}\n".encode()
    ours = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body)), FROM_HUB]
    return head(caller, status, ours, retry_after(error)) + body


def without_body(answer: bytes) -> bytes:
    """Return the head of a whole answer, which is what answers a `HEAD`."""
    return answer[: answer.index(b"\r\n\r\n") + 4]


def json_refusal(error: AshError, *, code: int | None = None) -> bytes:
    """Return a refusal as JSON: the typed error, inside a JSON-RPC error for clients that know only those."""
    said = {"code": jsonrpc_code(error) if code is None else code, **failure_to_json(error)}
    return orjson.dumps({"jsonrpc": "2.0", "id": None, "error": said}, default=str)


def unreadable(caller: Caller) -> bytes:
    """Return the whole answer to a body that is not one unambiguous JSON-RPC message."""
    error = ConfigError("the body must be one JSON object as RFC 8259 has it: UTF-8, no NaN, no key twice, no batch")
    body = json_refusal(error, code=PARSE_ERROR)
    ours = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), FROM_HUB]
    return head(caller, 400, ours) + body
