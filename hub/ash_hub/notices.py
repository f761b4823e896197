"""News of changed tool lists, to every connection of the same principal and scope, in both eras.

The news goes through the store's events, so that connections to other replicas hear it too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
from mcp.server.session import ServerSession
from mcp.server.subscriptions import ListenHandler, ServerEvent, ToolsListChanged

from ash_mcp.types import EVERY_SCOPE, Scope
from ash_router.store.base import LOST, Store

__all__ = ["Notices"]

CHANNEL = "tool-lists"
_SEND_BOUND_SECONDS = 1.0
log = logging.getLogger("ash.hub")

Audience = tuple[str, Scope]
"""Owner and scope."""


@dataclass(slots=True)
class _Bus:
    """The SDK's subscription bus for one audience."""

    listeners: dict[object, Callable[[ServerEvent], None]] = field(
        default_factory=dict[object, Callable[[ServerEvent], None]]
    )

    async def publish(self, event: ServerEvent) -> None:
        for listener in list(self.listeners.values()):
            listener(event)

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        token = object()
        self.listeners[token] = listener
        return lambda: _discard(self.listeners, token)


def _discard(listeners: dict[object, Callable[[ServerEvent], None]], token: object) -> None:
    listeners.pop(token, None)


class Notices:
    """Who listens, and telling them.

    Args:
        alive: Whether a handshake-era session still exists.
    """

    def __init__(self, store: Store, alive: Callable[[str], bool]) -> None:
        self._store = store
        self._alive = alive
        self._buses: dict[Audience, tuple[_Bus, ListenHandler]] = {}
        self._sessions: dict[str, tuple[Audience, ServerSession]] = {}

    async def announce(self, owner: str, scope: Scope) -> None:
        """Tell every replica that the tools of an audience changed."""
        await self._store.publish(CHANNEL, json.dumps([owner, scope]))

    def listener(self, owner: str, scope: Scope) -> ListenHandler:
        """Return the handler of `subscriptions/listen` for one audience."""
        for audience in [a for a, (bus, _) in self._buses.items() if not bus.listeners]:
            del self._buses[audience]
        if (owner, scope) not in self._buses:
            bus = _Bus()
            self._buses[owner, scope] = (bus, ListenHandler(bus))
        return self._buses[owner, scope][1]

    def joined(self, session_id: str, owner: str, scope: Scope, session: ServerSession) -> None:
        """Remember a handshake-era connection."""
        self._sessions[session_id] = ((owner, scope), session)

    async def run(self) -> None:
        """Pass the news on until cancelled."""
        async with self._store.subscribe(CHANNEL) as messages:
            async for message in messages:
                if message == LOST:
                    for owner, scope in self._audiences():
                        await self._tell(owner, scope)
                else:
                    owner, scope = json.loads(message)
                    await self._tell(owner, Scope(scope))

    def _audiences(self) -> set[Audience]:
        """Return whoever listens."""
        return {*self._buses, *(audience for audience, _ in self._sessions.values())}

    def close(self) -> None:
        """End every open subscription as the protocol wants it ended."""
        for _, handler in self._buses.values():
            handler.close()

    async def _tell(self, owner: str, scope: Scope) -> None:
        for audience in ((owner, scope), (owner, EVERY_SCOPE)):
            if audience in self._buses:
                await self._buses[audience][0].publish(ToolsListChanged())
        for session_id, (audience, session) in list(self._sessions.items()):
            if not self._alive(session_id):
                del self._sessions[session_id]
            elif audience in ((owner, scope), (owner, EVERY_SCOPE)):
                await self._tell_session(session_id, session)

    async def _tell_session(self, session_id: str, session: ServerSession) -> None:
        try:
            with anyio.move_on_after(_SEND_BOUND_SECONDS):
                await session.send_tool_list_changed()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            log.debug("a session ended before it could be told", extra={"session": session_id})
            self._sessions.pop(session_id, None)
