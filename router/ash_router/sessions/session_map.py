"""The map of the handshake era: which hub session has which sessions on which sandboxes.

The MCP SDK keeps the hub's transport session. The entry here holds what the relay needs to act as its client towards
sandboxes: who opened it and in what scope, the `initialize` params, and its calls in flight. It lives as long as the
SDK's session. `session_gate.py` makes entries and lets no request past them.

Callers know a session by an id that begins with its replica (`session_ids.py`), so that every replica sees in a
request's head which replica has its session; one that was reopened keeps the id that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, cast

import orjson

from ash_mcp.types import SandboxId
from ash_mcp.wire import MODERN_VERSION
from ash_router.admission.base import Admitted
from ash_router.http import framing
from ash_router.routes import Route

__all__ = [
    "HANDSHAKE_VERSIONS",
    "Ask",
    "Era",
    "LegacySession",
    "LegacySessions",
    "UpstreamSession",
    "era_of",
]

HANDSHAKE_VERSIONS: Final = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
"""The protocol revisions that begin with `initialize`."""

MAX_PARAMS_BYTES: Final = 16 * 1024
"""The most that is kept of a client's `initialize` params; of longer ones only the version is kept."""

# Tasks outlive their request, under ids that the relay does not know. Sandboxes are told that the client does not
# support them, so that their tools fail at once instead of hanging.
_UNROUTED_CAPABILITIES: Final = frozenset({"tasks"})

_ASKABLE: Final = frozenset({"elicitation", "sampling", "roots"})

_HANDSHAKE: Final = frozenset(version.encode() for version in HANDSHAKE_VERSIONS)
_MODERN: Final = MODERN_VERSION.encode()


class Era(Enum):
    """Which era of the protocol a request is of."""

    HANDSHAKE = auto()
    STATELESS = auto()
    UNKNOWN = auto()


def era_of(version: bytes | None) -> Era:
    """Read it from a request's `MCP-Protocol-Version`, which `initialize` and old clients do without."""
    if version is None or version in _HANDSHAKE:
        return Era.HANDSHAKE
    return Era.STATELESS if version == _MODERN else Era.UNKNOWN


@dataclass(slots=True, eq=False)
class UpstreamSession:
    """The MCP session that one hub session has on one sandbox."""

    route: Route
    id: bytes | None
    """None on a server that keeps no sessions."""
    version: bytes
    """The protocol version negotiated with the sandbox; it may be older than the hub session's."""
    open_streams: dict[object, Callable[[bytes], None]] = field(default_factory=dict[object, Callable[[bytes], None]])
    """For each open call of this session, what injects an event into its answer. The latest call is last."""
    listening: Callable[[], None] | None = None
    """Closes the standalone stream; None if it is not open."""
    lines: bytes = field(init=False)
    """`headers` as they stand in a head."""

    def __post_init__(self) -> None:
        self.lines = framing.lines_of(self.headers().items())

    def stop_listening(self) -> None:
        stop, self.listening = self.listening, None
        if stop is not None:
            stop()

    def headers(self) -> dict[bytes, bytes]:
        """Return the session and version headers of a request in this session."""
        session = {} if self.id is None else {b"mcp-session-id": self.id}
        return {**session, b"mcp-protocol-version": self.version}


@dataclass(frozen=True, slots=True)
class Ask:
    """A sandbox's request to a client, under the id that the sandbox gave it."""

    upstream: UpstreamSession
    request_id: str | int


@dataclass(slots=True, eq=False)
class LegacySession:
    """One hub session of the handshake era."""

    id: str
    """As callers know it."""
    sdk_id: str
    """As the SDK knows it."""
    admitted: Admitted
    """The verdict on its first request, whose scope and expansion hold for all later ones."""
    params: Mapping[str, Any]
    """The client's `initialize` params, at most `MAX_PARAMS_BYTES`."""
    version: str
    """The protocol version negotiated with the client."""
    has_unannounced_change: bool = False
    """Whether its client, whose replica is gone, does not know yet that its list of tools may have changed."""
    log_level: str | None = None
    upstreams: dict[SandboxId, UpstreamSession] = field(default_factory=dict[SandboxId, UpstreamSession])
    calls: dict[str | int, UpstreamSession] = field(default_factory=dict[str | int, UpstreamSession])
    """Relayed requests in flight, by the client's id."""
    asks: dict[str, Ask] = field(default_factory=dict[str, Ask])
    """Unanswered requests of sandboxes to the client, by the id that the hive gave each."""

    @property
    def can_be_asked(self) -> bool:
        """Whether the client accepts requests of servers (sampling, elicitation, roots)."""
        return not _ASKABLE.isdisjoint(self.initialize_params()["capabilities"])

    def forget(self, sandbox_id: SandboxId) -> None:
        """Drop the session on a sandbox, and what it has asked."""
        upstream = self.upstreams.pop(sandbox_id, None)
        if upstream is not None:
            upstream.stop_listening()
            self.asks = {given: ask for given, ask in self.asks.items() if ask.upstream is not upstream}

    def initialize_params(self) -> dict[str, Any]:
        """Return the `initialize` params that the relay sends to a sandbox for this client."""
        capabilities: Any = self.params.get("capabilities")
        kept = cast("dict[str, Any]", capabilities if isinstance(capabilities, dict) else {})
        info: Any = self.params.get("clientInfo")
        return {
            "protocolVersion": self.version,
            "capabilities": {key: value for key, value in kept.items() if key not in _UNROUTED_CAPABILITIES},
            "clientInfo": info if isinstance(info, dict) else {"name": "ash", "version": "0"},
        }


class LegacySessions:
    """The hub sessions of this process.

    Args:
        hold: Keeps the SDK's own session, which it knows by the SDK's id, from idling out while entered; None means
            that it does not exist any more.
        name: Returns the id by which callers know a session, of the SDK's id, its owner and its `initialize` params;
            None: the SDK's.
        max_sessions: How many are kept; beyond it the oldest is forgotten, and its calls are left to the ASGI app.
    """

    def __init__(
        self,
        hold: Callable[[str], AbstractContextManager[None] | None],
        *,
        name: Callable[[str, str, Mapping[str, Any]], str] | None = None,
        max_sessions: int = 20_000,
    ) -> None:
        self._hold = hold
        self._name = name
        self._max = max_sessions
        self._sweep_at = 128
        # by the SDK's ids; those of one owner from the one that was used longest ago
        self._sessions: dict[str, LegacySession] = {}
        self._by_id: dict[str, LegacySession] = {}
        self._owned: dict[str, dict[str, LegacySession]] = {}
        self._on_closed: Callable[[list[UpstreamSession]], None] = _ignore

    def attach(self, on_closed: Callable[[list[UpstreamSession]], None]) -> None:
        """Have `on_closed` end the upstream sessions of every hub session that ends from now on."""
        self._on_closed = on_closed

    def get(self, session_id: str) -> LegacySession | None:
        """Return a session by the id that callers know it by."""
        return self._by_id.get(session_id)

    def of(self, admitted: Admitted, session_id: str) -> LegacySession | None:
        """Return a session as `get` does, if it is the caller's."""
        session = self.get(session_id)
        if session is None:
            return None
        opener, caller = session.admitted.principal, admitted.principal
        return session if opener is caller or opener == caller else None

    def mark_used(self, session: LegacySession) -> None:
        """Make a session the most recently used of its owner."""
        sdk_id, owned = session.sdk_id, self._owned.get(session.admitted.principal.subject, {})
        if owned.pop(sdk_id, None) is not None:
            owned[sdk_id] = session

    def count(self, owner: str) -> int:
        return len(self._owned.get(owner, ()))

    def surplus(self, than: int) -> str | None:
        """Return the SDK's id of the session to end first: the least recently used one of the owner who has most.

        Args:
            than: Only an owner with more sessions than this loses one; None is returned if there is none.
        """
        owned = max(self._owned.values(), key=len) if self._owned else ()
        return next(iter(owned)) if len(owned) > than else None

    def admitted(self, sdk_id: str) -> Admitted | None:
        """Return the verdict that a session, which the SDK knows as `sdk_id`, keeps from its first request."""
        session = self._sessions.get(sdk_id)
        return None if session is None else session.admitted

    def hold(self, session: LegacySession) -> AbstractContextManager[None] | None:
        """Return what keeps the SDK's session alive while entered; a session that is gone is forgotten."""
        sdk_id = session.sdk_id
        held = self._hold(sdk_id)
        if held is None:
            self.remove(sdk_id)
        else:
            self.mark_used(session)
        return held

    def add(
        self, sdk_id: str, admitted: Admitted, params: Mapping[str, Any], session_id: str | None = None
    ) -> LegacySession:
        """Remember a session that the SDK has just made; `session_id` is its id for callers, if it has one already."""
        asked: Any = params.get("protocolVersion")
        version = asked if asked in HANDSHAKE_VERSIONS else HANDSHAKE_VERSIONS[-1]
        kept: Mapping[str, Any] = params if len(orjson.dumps(params)) <= MAX_PARAMS_BYTES else {}
        self._make_room()
        owner = admitted.principal.subject
        is_taken_up = session_id is not None
        if session_id is None:
            session_id = sdk_id if self._name is None else self._name(sdk_id, owner, params)
        session = self._sessions[sdk_id] = LegacySession(session_id, sdk_id, admitted, kept, version, is_taken_up)
        self._by_id[session_id] = session
        self._owned.setdefault(owner, {})[sdk_id] = session
        return session

    def remove(self, sdk_id: str) -> None:
        """Forget a session and end what it has on sandboxes; idempotent."""
        session = self._sessions.pop(sdk_id, None)
        if session is None:
            return
        self._by_id.pop(session.id, None)
        owner = session.admitted.principal.subject
        del self._owned[owner][sdk_id]
        if not self._owned[owner]:
            del self._owned[owner]
        if session.upstreams:
            self._on_closed(list(session.upstreams.values()))
            session.upstreams.clear()

    def forget_sandbox(self, sandbox_id: SandboxId) -> None:
        """Drop what sessions have on a sandbox that has ended; nothing is said to it."""
        for session in self._sessions.values():
            session.forget(sandbox_id)

    def __len__(self) -> int:
        return len(self._sessions)

    def _make_room(self) -> None:
        if len(self._sessions) >= min(self._sweep_at, self._max):
            for sdk_id in [known for known in self._sessions if self._hold(known) is None]:
                self.remove(sdk_id)
            self._sweep_at = max(128, 2 * len(self._sessions))
        while len(self._sessions) >= self._max:
            self.remove(next(iter(self._sessions)))


def _ignore(_: list[UpstreamSession]) -> None:
    return None
