"""The client side of MCP's stateless era: requests to bytes, bytes to messages. Pure, no I/O.

Each call is one POST. Its answer is one JSON-RPC message, or a `text/event-stream` of notifications that ends with it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from ash_mcp import __version__
from ash_mcp.wire import MODERN_VERSION

__all__ = ["EventDecoder", "EventTooLarge", "Request", "as_object", "build_request", "header_value", "parse_message"]

META_VERSION: Final = "io.modelcontextprotocol/protocolVersion"
META_CLIENT: Final = "io.modelcontextprotocol/clientInfo"
META_CAPABILITIES: Final = "io.modelcontextprotocol/clientCapabilities"

_CLIENT_INFO: Final = {"name": "ash-mcp", "version": __version__}
_HEADER_SAFE = re.compile(r"[\x21-\x7E](?:[\x20-\x7E]*[\x21-\x7E])?")


class EventTooLarge(ValueError):
    """An event of a stream is longer than the bound."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call, ready for the wire."""

    id: int
    headers: Mapping[str, str]
    body: bytes


def build_request(method: str, params: Mapping[str, Any], *, request_id: int, progress: bool = False) -> Request:
    """Return the request that calls `method`; with `progress` it asks for notifications under its own id.

    Raises:
        TypeError: The parameters are not JSON values.
        ValueError: They hold a number that JSON does not have, or half of a surrogate pair.
    """
    meta: dict[str, Any] = {META_VERSION: MODERN_VERSION, META_CLIENT: _CLIENT_INFO, META_CAPABILITIES: {}}
    if progress:
        meta["progressToken"] = request_id
    message = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": {**params, "_meta": meta}}
    headers = {
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "mcp-protocol-version": MODERN_VERSION,
        "mcp-method": method,
    }
    name = params.get("name")
    if method == "tools/call" and isinstance(name, str):
        headers["mcp-name"] = header_value(name)
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Request(request_id, headers, body.encode())


def header_value(text: str) -> str:
    """Return `text` as a header value, in the protocol's base64 envelope unless it is plain ASCII."""
    if _HEADER_SAFE.fullmatch(text) and not (text.startswith("=?base64?") and text.endswith("?=")):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


def parse_message(data: bytes) -> Mapping[str, Any] | None:
    """Return a JSON object, or None for anything else."""
    try:
        return as_object(json.loads(data))
    except (ValueError, RecursionError):
        return None


def as_object(value: Any) -> Mapping[str, Any] | None:
    """Return `value` if it is a JSON object, else None."""
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else None


class EventDecoder:
    """Cuts a `text/event-stream` into the data of its events; comments, ids and event names are skipped.

    Its own rather than httpx-sse's, which holds an unfinished line or event of any size.
    """

    def __init__(self, *, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._buffer = bytearray()
        self._data: list[bytes] = []
        self._held = 0
        self._scanned = 0

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield the data of every event that `piece` completes.

        Raises:
            EventTooLarge: An unfinished event is over the bound.
        """
        self._buffer += piece
        while (line := self._next_line()) is not None:
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                self._data, self._held = [], 0
            elif line.startswith(b"data:"):
                value = line[5:].removeprefix(b" ")
                self._data.append(value)
                self._held += len(value)
        if self._held + len(self._buffer) > self._max:
            raise EventTooLarge(f"an event is longer than {self._max} bytes")

    def _next_line(self) -> bytes | None:
        """Take one line, ended by LF, CRLF or CR; a CR at the very end waits for what may follow it."""
        end = self._buffer.find(b"\n", self._scanned)
        bare = self._buffer.find(b"\r", self._scanned, end if end >= 0 else len(self._buffer))
        if bare >= 0 and (end < 0 or bare < end - 1):
            if bare == len(self._buffer) - 1:
                self._scanned = bare
                return None
            end, stop = (bare + 1 if self._buffer[bare + 1] == 0x0A else bare), bare
        elif end >= 0:
            stop = bare if bare >= 0 else end
        else:
            self._scanned = len(self._buffer)
            return None
        line = bytes(self._buffer[:stop])
        del self._buffer[: end + 1]
        self._scanned = 0
        return line
