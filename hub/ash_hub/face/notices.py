"""Sends `tools/list_changed` notifications to every connection of a principal and scope, in both eras.

They go through the store's events, so that connections to other replicas get them too. Who changed something can wait
here until its own client has fetched the list that shows it (`until_fetched`).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
from mcp.server.session import ServerSession
from mcp.server.subscriptions import ListenHandler, ServerEvent, ToolsListChanged

from ash_mcp.types import EVERY_SCOPE, Scope
from ash_router.store.base import LOST, Store

__all__ = ["ClientKey", "Notices"]

CHANNEL = "tool-lists"
_SEND_BOUND_SECONDS = 1.0
_TAKE_OVER_SECONDS = 0.1
"""How long a host takes to show its model the list that it has fetched: Gemini CLI has done so after 0.1 s."""
log = logging.getLogger("ash.hub")

Audience = tuple[str, Scope]
"""Owner and scope."""

ClientKey = str | tuple[str, ...]
"""A client: the id of its handshake-era session, or, as the stateless era has none, its owner, scope and name."""


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


@dataclass(slots=True, eq=False)
class _Listener:
    """A connection that is told of changes. Counts are of changes that this process made while it listened."""

    audience: Audience
    session: ServerSession | None = None
    """Of the handshake era; None in the stateless one."""
    changes: int = 0
    fetched: int = 0
    """How many of them the list shows that its client fetched last."""
    is_closed: bool = False


class Notices:
    """The connections that listen, and the task that notifies them.

    Args:
        alive: Whether a handshake-era session still exists.
        listens: Whether its client has a stream open for what the server says unasked.
    """

    def __init__(self, store: Store, alive: Callable[[str], bool], listens: Callable[[str], bool]) -> None:
        self._store = store
        self._alive = alive
        self._listens = listens
        self._buses: dict[Audience, tuple[_Bus, ListenHandler]] = {}
        self._sessions: dict[str, _Listener] = {}
        self._streams: dict[ClientKey, list[_Listener]] = {}
        self._came = anyio.Event()
        """Fired, and replaced, when a list was fetched or a listener left."""

    async def announce(self, owner: str, scope: Scope) -> None:
        """Publish to every replica that the tools of an audience changed."""
        for listener in self._listeners():
            if _concerns(listener.audience, owner, scope):
                listener.changes += 1
        await self._store.publish(CHANNEL, json.dumps([owner, scope]))

    def listener(self, owner: str, scope: Scope) -> ListenHandler:
        """Return the handler of `subscriptions/listen` for one audience."""
        for audience in [a for a, (bus, _) in self._buses.items() if not bus.listeners]:
            del self._buses[audience]
        if (owner, scope) not in self._buses:
            bus = _Bus()
            handler = ListenHandler(bus, max_subscriptions=sys.maxsize)  # `quotas.py` has counted the stream
            self._buses[owner, scope] = (bus, handler)
        return self._buses[owner, scope][1]

    @contextmanager
    def listening(self, client: ClientKey, owner: str, scope: Scope) -> Generator[None]:
        """Count a stateless-era client as one that is told of changed tools while the context is open."""
        listener = _Listener((owner, scope))
        self._streams.setdefault(client, []).append(listener)
        try:
            yield
        finally:
            listener.is_closed = True
            self._streams[client].remove(listener)
            if not self._streams[client]:
                del self._streams[client]
            self._wake()

    def add_session(self, session_id: str, owner: str, scope: Scope, session: ServerSession) -> None:
        """Remember a handshake-era connection."""
        self._sessions[session_id] = _Listener((owner, scope), session)

    def fetching(self, client: ClientKey) -> Callable[[], None]:
        """Note what a list that is made now shows; what is returned is called when its client has it."""
        shown = [(listener, listener.changes) for listener in self._of(client)]

        def fetched() -> None:
            for listener, changes in shown:
                listener.fetched = max(listener.fetched, changes)
            self._wake()

        return fetched

    def hears(self, client: ClientKey) -> bool:
        """Say whether a client is told of changes by a stream that it has open here."""
        return any(self._is_open(client, listener) for listener in self._of(client))

    async def until_fetched(self, client: ClientKey, seconds: float) -> None:
        """Wait until a client that listens has fetched a list with all changes until now; at once if none listens."""
        wanted = [(listener, listener.changes) for listener in self._of(client)]
        with anyio.move_on_after(seconds):
            waited = False
            while any(listener.fetched < changes and self._is_open(client, listener) for listener, changes in wanted):
                await self._came.wait()
                waited = True
            if waited:
                await anyio.sleep(_TAKE_OVER_SECONDS)

    def _wake(self) -> None:
        came, self._came = self._came, anyio.Event()
        came.set()

    def _of(self, client: ClientKey) -> list[_Listener]:
        if isinstance(client, str):
            return [self._sessions[client]] if client in self._sessions else []
        return list(self._streams.get(client, ()))

    def _is_open(self, client: ClientKey, listener: _Listener) -> bool:
        return self._listens(client) if isinstance(client, str) else not listener.is_closed

    def _listeners(self) -> Iterator[_Listener]:
        yield from self._sessions.values()
        for listeners in self._streams.values():
            yield from listeners

    async def run(self) -> None:
        """Pass published changes on to this process's connections, until cancelled."""
        async with self._store.subscribe(CHANNEL) as messages:
            async for message in messages:
                if message == LOST:
                    for owner, scope in self._audiences():
                        await self._tell(owner, scope)
                else:
                    owner, scope = json.loads(message)
                    await self._tell(owner, Scope(scope))

    def _audiences(self) -> set[Audience]:
        """Return every audience that has a listener here."""
        return {*self._buses, *(listener.audience for listener in self._sessions.values())}

    def close(self) -> None:
        """End every open subscription by the protocol's own message."""
        for _, handler in self._buses.values():
            handler.close()

    async def _tell(self, owner: str, scope: Scope) -> None:
        for audience in {(owner, scope), (owner, EVERY_SCOPE)}:
            if audience in self._buses:
                await self._buses[audience][0].publish(ToolsListChanged())
        for session_id, listener in list(self._sessions.items()):
            if not self._alive(session_id):
                del self._sessions[session_id]
            elif _concerns(listener.audience, owner, scope) and listener.session is not None:
                await self._tell_session(session_id, listener.session)

    async def _tell_session(self, session_id: str, session: ServerSession) -> None:
        try:
            with anyio.move_on_after(_SEND_BOUND_SECONDS):
                await session.send_tool_list_changed()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            log.debug("a session ended before it could be told", extra={"session": session_id})
            self._sessions.pop(session_id, None)


def _concerns(audience: Audience, owner: str, scope: Scope) -> bool:
    return audience[0] == owner and audience[1] in (scope, EVERY_SCOPE)
