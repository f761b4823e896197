"""JSON-RPC messages of the bridge: their kind, their era, their HTTP headers. Pure, no I/O.

A message is forwarded byte for byte; only the fields that route it are parsed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ash_mcp._protocol import META_VERSION, as_object, header_value
from ash_mcp.errors import AshError
from ash_mcp.wire import failure_to_json, jsonrpc_code

__all__ = [
    "BadFrame",
    "Frame",
    "RequestId",
    "answer_to",
    "error_line",
    "notification_line",
    "one_line",
    "read_frame",
    "result_line",
]

RequestId = str | int
META_SUBSCRIPTION: Final = "io.modelcontextprotocol/subscriptionId"

_NAMED_BY: Final = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_INVALID_PARAMS: Final = -32602
_INVALID_REQUEST: Final = -32600
_PARSE_ERROR: Final = -32700


class BadFrame(ValueError):
    """A line that cannot be passed on; `answer` is the line to send back."""

    def __init__(self, code: int, message: str, request_id: RequestId | None = None) -> None:
        super().__init__(message)
        error = {"code": code, "message": message}
        self.answer = json.dumps({"jsonrpc": "2.0", "id": request_id, "error": error}).encode()


@dataclass(frozen=True, slots=True)
class Frame:
    """One message from the host."""

    raw: bytes
    method: str | None
    """None for an answer to a request of the server's."""
    id: RequestId | None
    """None for a notification."""
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    version: str | None = None
    """The stateless revision that its envelope names; None in the handshake era."""

    @property
    def is_request(self) -> bool:
        return self.method is not None and self.id is not None

    def modern_headers(self) -> dict[str, str]:
        """Return the headers that must mirror a stateless request's body.

        Raises:
            BadFrame: The name cannot be encoded.
        """
        assert self.version is not None and self.method is not None
        name = self.params.get(_NAMED_BY.get(self.method, ""))
        try:
            named = {"mcp-name": header_value(name)} if isinstance(name, str) else {}
            versioned = {"mcp-protocol-version": header_value(self.version), "mcp-method": header_value(self.method)}
        except UnicodeEncodeError as exc:
            raise BadFrame(_INVALID_PARAMS, "a name holds half of a surrogate pair", self.id) from exc
        return {**versioned, **named}


def read_frame(line: bytes) -> Frame:
    """Return the message on a line.

    Raises:
        BadFrame: It is no single JSON-RPC message.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise BadFrame(_PARSE_ERROR, "the line is not JSON; send one JSON-RPC message a line") from exc
    message = as_object(value)
    if message is None:
        raise BadFrame(_INVALID_REQUEST, "send one JSON-RPC object a line; batches are not taken")
    request_id, method = message.get("id"), message.get("method")
    if isinstance(request_id, bool) or not isinstance(request_id, str | int | None):
        raise BadFrame(_INVALID_REQUEST, "the id of a message is a string or a whole number")
    if "id" in message and request_id is None:
        raise BadFrame(_INVALID_REQUEST, "the id of a message is a string or a whole number, not null")
    if method is None and ("result" in message or "error" in message):
        return Frame(one_line(line), None, request_id)
    if not isinstance(method, str):
        raise BadFrame(_INVALID_REQUEST, "the message has no method, no result and no error", request_id)
    params = as_object(message.get("params")) or {}
    version = (as_object(params.get("_meta")) or {}).get(META_VERSION)
    modern = version if isinstance(version, str) and method != "initialize" else None
    return Frame(one_line(line), method, request_id, params, modern)


def one_line(data: bytes) -> bytes:
    """Return JSON without line breaks; raw ones only stand between its tokens, where a space does as well."""
    return data.replace(b"\r", b" ").replace(b"\n", b" ").strip()


def answer_to(frame: Frame, raw: bytes, message: Mapping[str, Any]) -> bytes | None:
    """Return the line that answers `frame` if `message` does, under the id that was asked with, else None.

    A server that refuses a request before it has read its id answers under none.
    """
    if "method" in message or not ("result" in message or "error" in message):
        return None
    if message.get("id") == frame.id:
        return one_line(raw)
    if message.get("id") is None and "error" in message:
        return json.dumps({**message, "id": frame.id}).encode()
    return None


def error_line(request_id: RequestId | None, error: AshError) -> bytes:
    """Return a typed failure as the answer to a request."""
    shape = {"code": jsonrpc_code(error), "message": error.message, "data": failure_to_json(error)}
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": shape}).encode()


def result_line(request_id: RequestId | None, result: Mapping[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}).encode()


def notification_line(
    method: str, subscription: RequestId | None = None, params: Mapping[str, Any] | None = None
) -> bytes:
    """Return a notification; `subscription` is the id of the stateless era's request for such."""
    meta = {} if subscription is None else {"_meta": {META_SUBSCRIPTION: subscription}}
    told = {**(params or {}), **meta}
    return json.dumps({"jsonrpc": "2.0", "method": method, **({"params": told} if told else {})}).encode()
