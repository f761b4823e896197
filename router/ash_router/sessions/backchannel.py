"""What a sandbox says in a session without being asked: its standalone stream, heard for the client.

A server may ask its client something outside of any call's stream (`roots/list`, usually). The hive listens where
the client would, and lets what is asked into the answer of a call that the client has open on the same session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson

from ash_mcp.errors import AshError
from ash_router._framing import ResponseHead
from ash_router.asking import answer_to, asked
from ash_router.bodies import read_message
from ash_router.events import EventSplitter
from ash_router.sessions import LegacySession, UpstreamSession

__all__ = ["Backchannel"]


class Backchannel:
    """A `Sink` of the standalone stream of one session on a sandbox.

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
        """Whether the sandbox has said yes or no to being listened to."""

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
        """Pass a request on, and that one is withdrawn. All else is meant for who looks at this sandbox alone."""
        ours = asked(self._session, self._upstream, event) if b'"method"' in event else event
        if ours is event:
            return b""
        voice = next(reversed(self._upstream.voices.values()), None)
        if voice is not None:
            voice(ours)
        else:
            self._refuse(ours)
        return b""

    def _refuse(self, event: bytes) -> None:
        """Tell the sandbox that nobody is there to be asked, so that it does not wait."""
        raw = b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
        message = read_message(raw)
        if message is None or "id" not in message.fields:
            return
        error: dict[str, Any] = {"code": -32001, "message": "the client has no call open that could ask it"}
        said = orjson.dumps({"jsonrpc": "2.0", "id": message.fields["id"], "error": error})
        answer = read_message(said)
        found = answer_to(self._session, answer) if answer is not None else None
        if found is not None:
            self._tell(*found)
