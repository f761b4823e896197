"""Reads a sandbox's standalone stream (GET) of a session in place of the client.

A server may send its client a request outside of any call's stream (`roots/list`, usually). The hive listens there
and injects such a request into the answer of a call that the client has open in the same session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson

from ash_mcp.errors import AshError
from ash_router.http.bodies import read_message
from ash_router.http.event_stream import EventSplitter
from ash_router.http.framing import ResponseHead
from ash_router.sessions.server_requests import answer_for_sandbox, rewrite_request_id
from ash_router.sessions.session_map import LegacySession, UpstreamSession

__all__ = ["Backchannel"]


class Backchannel:
    """The `Sink` of the standalone stream of one session on a sandbox.

    Args:
        tell: Posts a message to the sandbox.
    """

    def __init__(
        self, session: LegacySession, upstream: UpstreamSession, tell: Callable[[UpstreamSession, bytes], None]
    ) -> None:
        self._session = session
        self._upstream = upstream
        self._tell = tell
        self._splitter = EventSplitter(self._heard)
        self.answered = asyncio.Event()
        """Set when the sandbox has accepted or refused the stream."""

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        if head is not None:
            self.answered.set()
            if head.status != 200:
                self._upstream.stop_listening()
                return
        self._splitter.feed(data, last=complete)

    def broken(self, error: AshError) -> None:
        self.answered.set()

    def _heard(self, event: bytes) -> bytes:
        """Inject a request, or the cancellation of one, into an open call; drop all other events."""
        ours = rewrite_request_id(self._session, self._upstream, event) if b'"method"' in event else event
        if ours is event:
            return b""
        inject = next(reversed(self._upstream.open_streams.values()), None)
        if inject is not None:
            inject(ours)
        else:
            self._refuse(ours)
        return b""

    def _refuse(self, event: bytes) -> None:
        """Answer the sandbox's request with an error, so that it does not wait: the client has no call open."""
        raw = b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
        message = read_message(raw)
        if message is None or "id" not in message.fields:
            return
        error: dict[str, Any] = {"code": -32001, "message": "the client has no call open that could ask it"}
        said = orjson.dumps({"jsonrpc": "2.0", "id": message.fields["id"], "error": error})
        answer = read_message(said)
        found = answer_for_sandbox(self._session, answer) if answer is not None else None
        if found is not None:
            self._tell(*found)
