"""Streams of guests to the hive's own endpoint, which end when the share that they came with does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import anyio

__all__ = ["serve_while"]

LOOK_SECONDS: Final = 1.0
"""How often it is checked whether the share is still good."""

ASGIMessage = MutableMapping[str, Any]
ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


async def serve_while(
    is_good: Callable[[], bool], app: ASGIApp, scope: ASGIScope, receive: Receive, send: Send
) -> None:
    """Serve a request with `app` until `is_good` says no: to the app its client leaves then, and the answer ends."""
    is_over = anyio.Event()
    is_open = False
    """Whether an answer has begun and not ended."""

    async def watch() -> None:
        while is_good():  # noqa: ASYNC110 - a share that expires makes no event
            await anyio.sleep(LOOK_SECONDS)
        is_over.set()

    async def received() -> ASGIMessage:
        found: list[ASGIMessage] = []

        async def wait_for_message() -> None:
            found.append(await receive())
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(wait_for_message)
            await is_over.wait()
            group.cancel_scope.cancel()
        return found[0] if found else {"type": "http.disconnect"}

    async def noted(message: ASGIMessage) -> None:
        nonlocal is_open
        is_open = bool(message["type"] == "http.response.start" or message.get("more_body"))
        await send(message)

    async with anyio.create_task_group() as watching:
        watching.start_soon(watch)
        await app(scope, received, noted)
        watching.cancel_scope.cancel()
    if is_open and is_over.is_set():
        await send({"type": "http.response.body", "body": b"", "more_body": False})
