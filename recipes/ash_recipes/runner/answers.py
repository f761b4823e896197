"""ASGI helpers of the runner's private surface: headers and bodies of requests, JSON answers and refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
from starlette.types import Receive, Scope, Send

from ash_recipes.runner.problems import Problem, refusal

__all__ = ["answer", "body", "ended_with_caller", "header", "refuse", "send_pieces", "start"]

Headers = Sequence[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return a header's value; None where it is absent or comes more than once."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0] if len(found) == 1 else None


async def body(receive: Receive, limit: int) -> bytes:
    """Return a request's whole body.

    Raises:
        Problem: It is longer than `limit`.
    """
    read = bytearray()
    while True:
        message = await receive()
        read += message.get("body", b"")
        if len(read) > limit:
            raise Problem("bad_request", f"the body is larger than {limit} bytes")
        if not message.get("more_body"):
            return bytes(read)


async def start(send: Send, status: int, content_type: bytes, length: int | None, more: Headers = ()) -> None:
    """Begin an answer.

    Args:
        length: Bytes of the body; None: it is chunked.
    """
    headers = [(b"content-type", content_type), *more]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def answer(send: Send, status: int, shape: Any, more: Headers = ()) -> None:
    said = json.dumps(shape).encode()
    await start(send, status, b"application/json", len(said), more)
    await send({"type": "http.response.body", "body": said})


async def refuse(send: Send, status: int, kind: str, message: str, more: Headers = ()) -> None:
    await answer(send, status, refusal(kind, message), more)


async def send_pieces(send: Send, pieces: Iterator[bytes]) -> None:
    """Send a body whose pieces block while they are made; each is made when the one before has gone."""
    while piece := await anyio.to_thread.run_sync(next, pieces, b""):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def ended_with_caller(receive: Receive) -> AsyncGenerator[None]:
    """Cancel what is inside when the caller has left; a server drops what is sent to nobody without a word."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()
