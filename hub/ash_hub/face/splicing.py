"""ASGI middleware that inserts already encoded tools into the MCP SDK's answer to `tools/list`.

The SDK checks the request, its session and its cursor, and writes an answer with an empty array of tools, which is
filled here. So a list of a thousand tools costs the SDK no more than an empty one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["set_listed_tools", "with_spliced_tools"]

_KEY: Final = "ash.tools"
# Quotes inside JSON strings are escaped, so a match is always the key `tools`.
_EMPTY: Final = re.compile(rb'"tools"\s*:\s*\[(?=\s*\])')


def with_spliced_tools(app: ASGIApp) -> ASGIApp:
    """Wrap an MCP endpoint so that its handlers may `set_listed_tools`."""

    async def with_splice(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        splice = _Splice(send)
        await app({**scope, _KEY: splice}, receive, splice.send)

    return with_splice


def set_listed_tools(scope: MutableMapping[str, Any], tools: bytes, on_sent: Callable[[], None] | None = None) -> None:
    """Set the encoded tools (joined by commas) that are inserted into the answer to the request of `scope`.

    Args:
        on_sent: Called when the whole answer was written out.

    Raises:
        KeyError: The request did not come through `with_spliced_tools`.
    """
    splice: _Splice = scope[_KEY]
    splice.tools, splice.on_sent = tools, on_sent


class _Splice:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self.tools: bytes | None = None
        self.on_sent: Callable[[], None] | None = None

    async def send(self, message: Message) -> None:
        if self.tools is not None:
            if message["type"] == "http.response.start":
                self._start = message  # its length is not known yet
                return
            message = self._filled(message, self.tools)
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        await self._send(message)
        if self.on_sent is not None and self.tools is None and not message.get("more_body", False):
            self.on_sent()

    def _filled(self, message: Message, tools: bytes) -> Message:
        body: bytes = message.get("body", b"")
        found = _EMPTY.search(body)
        if found is None:
            return message
        self.tools = None
        if self._start is not None:
            self._start = {**self._start, "headers": _lengthened(self._start["headers"], len(tools))}
        return {**message, "body": b"".join((body[: found.end()], tools, body[found.end() :]))}


def _lengthened(headers: Any, by: int) -> list[tuple[bytes, bytes]]:
    return [(key, b"%d" % (int(value) + by) if key.lower() == b"content-length" else value) for key, value in headers]
