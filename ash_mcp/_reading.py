"""Readers of one call's HTTP response, a JSON body or an event stream; both bound its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import anyio

from ash_mcp._protocol import EventDecoder, EventTooLarge, as_object, parse_message
from ash_mcp._verdict import Head, error_of_status, misbehaviour
from ash_mcp.errors import StreamBroken
from ash_mcp.results import Progress

if TYPE_CHECKING:
    import httpx

__all__ = ["OnProgress", "read_body", "read_stream", "read_whole"]

OnProgress = Callable[[Progress], object]
"""Called in the event loop with each progress notification of a call; it must not block."""

_TAIL_SECONDS: Final = 0.5
"""How long a stream may stay open after its answer. Its connection is reused only if it is read to its end."""


async def read_whole(response: httpx.Response, head: Head, *, max_bytes: int) -> Mapping[str, Any]:
    """Return the JSON-RPC answer that a whole body holds.

    Raises:
        AshError: It holds a refusal, or no answer.
    """
    message = parse_message(await read_body(response, head, max_bytes=max_bytes))
    error = error_of_status(head, message)
    if error is not None:
        raise error
    return message or {}


async def read_body(response: httpx.Response, head: Head, *, max_bytes: int) -> bytes:
    """Return a whole body; raises a `RemoteProtocolError`, of a sandbox's a `SandboxRefused`, over `max_bytes`."""
    body = bytearray()

    def take(piece: bytes, _scope: anyio.CancelScope) -> None:
        body.extend(piece)
        if len(body) > max_bytes:
            raise misbehaviour(head, f"answered more than {max_bytes} bytes")

    await _each_piece(response, take)
    return bytes(body)


async def read_stream(
    response: httpx.Response, head: Head, *, request_id: int, max_bytes: int, on_progress: OnProgress | None
) -> Mapping[str, Any]:
    """Return the JSON-RPC answer that ends an event stream; progress before it goes to `on_progress`.

    Raises:
        StreamBroken: The hive's stream ended without one.
        SandboxRefused: A sandbox's stream did, or it broke the protocol in another way.
    """
    decoder = EventDecoder(max_event_bytes=max_bytes)
    found: list[Mapping[str, Any]] = []

    def take(piece: bytes, scope: anyio.CancelScope) -> None:
        for message in _messages(decoder, piece, head):
            if found:
                raise misbehaviour(head, "went on after its answer")
            if "method" in message:
                _report_progress(message, request_id, on_progress)
            elif message.get("id") == request_id:
                found.append(message)
                scope.deadline = anyio.current_time() + _TAIL_SECONDS

    await _each_piece(response, take)
    if found:
        return found[0]
    if head.from_sandbox:
        raise misbehaviour(head, "ended its stream before the answer")
    raise StreamBroken("the hive's stream ended before the answer; whether the call ran is unknown")


async def _each_piece(response: httpx.Response, take: Callable[[bytes, anyio.CancelScope], None]) -> None:
    """Call `take` with each piece of the body; an exception of its own ends the reading and is raised here."""
    fault: Exception | None = None
    with anyio.CancelScope() as scope:
        async for piece in response.aiter_bytes():
            # httpx nests generators here. Left early they would wait for the garbage collector, so a fault leaves
            # them from inside, by the next read's being cancelled.
            if fault is None:
                try:
                    take(piece, scope)
                except Exception as exc:
                    fault = exc
                    scope.cancel()
    if fault is not None:
        raise fault


def _messages(decoder: EventDecoder, piece: bytes, head: Head) -> list[Mapping[str, Any]]:
    """Return the messages that `piece` completes; data that is not a JSON object is skipped."""
    try:
        found = [parse_message(data) for data in decoder.feed(piece)]
    except EventTooLarge as exc:
        raise misbehaviour(head, f"sent too much: {exc}") from exc
    return [message for message in found if message is not None]


def _report_progress(message: Mapping[str, Any], token: int, on_progress: OnProgress | None) -> None:
    params = as_object(message.get("params")) or {}
    if on_progress is None or message.get("method") != "notifications/progress":
        return
    if params.get("progressToken") != token:
        return
    done, total, text = params.get("progress"), params.get("total"), params.get("message")
    on_progress(
        Progress(
            done=float(done) if isinstance(done, int | float) else math.nan,
            total=float(total) if isinstance(total, int | float) else None,
            message=str(text) if text is not None else None,
        )
    )
