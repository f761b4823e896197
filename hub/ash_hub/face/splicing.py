"""Puts tools that are bytes already into an answer that the MCP SDK makes.

The SDK checks the request, its session and its cursor and writes the answer, with an empty array of tools; on its
way out the array is filled. So a list of a thousand tools costs what an empty one does, and everything else about
the answer stays the SDK's.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["leave_tools", "splicing"]

_KEY: Final = "ash.tools"
# A quote inside of a JSON string is escaped, so this is a key wherever it stands; no other is written like it.
_EMPTY: Final = re.compile(rb'"tools"\s*:\s*\[(?=\s*\])')


def splicing(app: ASGIApp) -> ASGIApp:
    """Wrap an MCP endpoint so that its handlers may `leave_tools`."""

    async def with_splice(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        splice = _Splice(send)
        await app({**scope, _KEY: splice}, receive, splice.send)

    return with_splice


def leave_tools(scope: MutableMapping[str, Any], tools: bytes) -> None:
    """Have `tools` stand in the answer to the request of `scope`, where it will have an empty array of them.

    Raises:
        KeyError: The request did not come through `splicing`.
    """
    scope[_KEY].tools = tools


class _Splice:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self.tools: bytes | None = None

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
