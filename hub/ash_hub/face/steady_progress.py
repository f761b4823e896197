"""Keep-alive of long calls to the hive's own tools: repeated progress, or SSE comments. Some hosts give up on silence.

A caller that gave a progress token gets the last progress again. Any other gets a comment in its answer's stream,
which ASGI middleware before the MCP SDK writes; the SDK's own comments come only every 15 s.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ash_router.http.responses import QUIET_COMMENT

__all__ = ["SteadyProgress", "comment_on", "with_comments"]

QUIET_SECONDS: Final = 9.0
_STEP: Final = 1e-6
"""Per second: progress must grow with each report, and leave room for the next step."""
_KEY: Final = "ash.answer"
_STREAM: Final = b"text/event-stream"

Report = Callable[[float, float | None, str | None], Awaitable[None]]


class SteadyProgress:
    """Reports progress when called, and every `quiet_seconds` repeats it, a little further, or comments.

    Args:
        report: Sends progress to the caller; does nothing if it gave no progress token.
        comment: Writes a comment instead of repeated progress; None if the caller gave a progress token.
    """

    def __init__(
        self,
        report: Report,
        comment: Callable[[], Awaitable[None]] | None = None,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self._report = report
        self._comment = comment
        self._quiet_seconds = quiet_seconds
        self._done = 0.0
        self._message = "working"

    async def __call__(self, done: float, message: str) -> None:
        self._done, self._message = done, message
        await self._report(done, 1.0, message)

    @asynccontextmanager
    async def repeated(self) -> AsyncGenerator[None]:
        """Go on reporting while the context is open, which nothing may raise out of."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._repeat)
            yield
            group.cancel_scope.cancel()

    async def _repeat(self) -> None:
        began = anyio.current_time()
        while True:
            await anyio.sleep(self._quiet_seconds)
            seconds = anyio.current_time() - began
            if self._comment is None:
                await self._report(self._done + seconds * _STEP, 1.0, f"{self._message}, after {seconds:.0f} s")
            else:
                await self._comment()


def with_comments(app: ASGIApp) -> ASGIApp:
    """Wrap an MCP endpoint so that its handlers may `comment_on` the requests that they answer."""

    async def with_answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await app({**scope, _KEY: answer}, receive, answer.send)
        finally:
            answer.is_over = True

    return with_answer


async def comment_on(scope: MutableMapping[str, Any]) -> None:
    """Write a comment into the answer to the request of `scope`, which becomes a stream if it has not begun.

    Raises:
        KeyError: The request did not come through `with_comments`.
    """
    answer: _Answer = scope[_KEY]
    await answer.comment()


class _Answer:
    """An answer of the SDK's, each of whose messages ends with an event."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream: bool | None = None
        """None until it has begun."""
        self._begun_early = False
        self._wraps = False
        """Whether the SDK answers in JSON what was begun as a stream."""
        self.is_over = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_stream = any(k.lower() == b"content-type" and v.startswith(_STREAM) for k, v in message["headers"])
            if self._begun_early:
                self._wraps = not is_stream
                return
            self._is_stream = is_stream
        else:
            self.is_over = not message.get("more_body", False)
            if self._wraps:
                message = {**message, "body": b"event: message\ndata: " + message.get("body", b"") + b"\n\n"}
        await self._send(message)

    async def comment(self) -> None:
        if self._is_stream is None:
            self._is_stream = self._begun_early = True
            headers = [(b"content-type", _STREAM), (b"cache-control", b"no-cache, no-transform")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if self._is_stream and not self.is_over:
            await self._send({"type": "http.response.body", "body": QUIET_COMMENT, "more_body": True})
