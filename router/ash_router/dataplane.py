"""What the relay is made of, without the protocol: one for all connections of a process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ash_mcp.errors import AshError, ConfigError, ConnectFailed, SandboxNotFound, StreamBroken
from ash_mcp.types import SandboxId
from ash_mcp.wire import MCP_PATH
from ash_router.admission import Admitted, Refusal
from ash_router.calls import Calls, Cancellation, ClientAnswer, LevelChange, RootsChange
from ash_router.direct import METHODS, Door, door_of, name_in, resumption_of
from ash_router.exchange import Services
from ash_router.forwarding import Forwarder
from ash_router.handshakes import Handshakes
from ash_router.heads import RequestHead
from ash_router.ledger import Ledger
from ash_router.limits import DEFAULT_LIMITS, RelayLimits
from ash_router.rounds import Rounds
from ash_router.routes import Route, Routes
from ash_router.sessions import LegacySessions, UpstreamSession
from ash_router.streams import OpenStreams
from ash_router.tokens import CallTokens
from ash_router.upstream import Upstreams

__all__ = ["DataPlane"]


class DataPlane:
    """The data plane of one process.

    Args:
        sessions: The handshake-era map; its middleware must stand before the hive's MCP endpoint.
        explain: Says why the sandbox of a route is gone, or that it is not.
        forwarder: Reaches the other replicas of the hive; None where there are none.
        look_up: Learns of routes that other processes bound; None where there are none.
        missing: Says why a caller has no route to what it names, where it may know: because that has ended, say.
    """

    def __init__(
        self,
        *,
        routes: Routes,
        tokens: CallTokens,
        ledger: Ledger,
        sessions: LegacySessions,
        explain: Callable[[Route], Awaitable[AshError]],
        limits: RelayLimits = DEFAULT_LIMITS,
        forwarder: Forwarder | None = None,
        look_up: Callable[[], Awaitable[None]] | None = None,
        missing: Callable[[Admitted, str], AshError | None] = lambda _, __: None,
    ) -> None:
        self.limits = limits
        self._look_up = look_up
        self.forwarder = forwarder
        self.routes = routes
        self._missing = missing
        self.calls = Calls(routes, sessions)
        self._sessions = sessions
        self._upstreams = Upstreams(
            connect_timeout_seconds=limits.connect_timeout_seconds,
            max_idle=limits.max_idle_upstreams,
            idle_seconds=limits.idle_upstream_seconds,
            max_head_bytes=limits.max_head_bytes,
            max_headers=limits.max_headers,
        )
        self._handshakes = Handshakes(self._upstreams, tokens, limits, self.spawn)
        self._tasks: set[asyncio.Task[None]] = set()
        self.services = Services(
            self._upstreams,
            self._handshakes,
            tokens,
            ledger,
            limits,
            OpenStreams(limits.max_streams_per_owner),
            Rounds(limits.round_seconds),
            explain,
            self.spawn,
        )
        sessions.attach(self._end_sessions)

    def forget(self, sandbox_id: SandboxId) -> None:
        """Drop what is kept of a sandbox that has ended: idle connections and sessions on it."""
        self._upstreams.forget(sandbox_id)
        self._sessions.forget_sandbox(sandbox_id)

    async def aclose(self) -> None:
        """Abort what is in flight and close every connection to a sandbox."""
        stopping = StreamBroken("the hive stopped during the call; whether the call did its work is unknown")
        self.services.ledger.abort_all(stopping)
        self.services.streams.fail_all(stopping)
        self.services.rounds.close()
        self._upstreams.close()
        if self.forwarder is not None:
            self.forwarder.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside the protocol's callbacks until it ends or the relay is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def door(self, admitted: Admitted, method: str, head: RequestHead) -> Door | Refusal | None:
        """Say to which sandbox's own endpoint a request goes, or why to none; None: it is not meant for one."""
        name = name_in(head, admitted.path)
        if name is None:
            is_resumption = method == "GET" and admitted.path == MCP_PATH
            return resumption_of(self._sessions, admitted, head.fields) if is_resumption else None
        if isinstance(name, AshError):
            return Refusal(name)
        found = door_of(self.routes, admitted, name, method)
        if found is None:
            return Refusal(self._missing(admitted, name) or SandboxNotFound("route not found"))
        if method not in METHODS:
            allowed = ", ".join(sorted(METHODS))
            return Refusal(ConfigError(f"a sandbox's endpoint takes {allowed}"), 405, (("allow", allowed),))
        return found

    @property
    def looks_up(self) -> bool:
        """Whether a sandbox that is not known here may be known elsewhere."""
        return self._look_up is not None

    async def look_up(self) -> AshError | None:
        """Learn of the routes that other processes have bound until now; return why that was not possible."""
        assert self._look_up is not None
        try:
            async with asyncio.timeout(self.limits.lookup_timeout_seconds):
                await self._look_up()
        except TimeoutError:
            return ConnectFailed("the hive could not find out in time whether there is such a sandbox; try again")
        except ConnectFailed as error:
            return error
        return None

    def tell(self, said: Cancellation | ClientAnswer) -> None:
        """Tell a sandbox that its caller no longer waits, or what it answers."""
        body = said.body if isinstance(said, ClientAnswer) else said.message.raw
        self._handshakes.tell(said.upstream, body)

    def roots_changed(self, change: RootsChange) -> None:
        """Tell each sandbox that a session has called that its client's roots have changed."""
        for upstream in change.session.upstreams.values():
            self._handshakes.tell(upstream, change.message.raw)

    def level_changed(self, change: LevelChange) -> None:
        """Set the log level of a session on each sandbox that it has called, and on those that it will."""
        change.session.log_level = change.level
        for upstream in change.session.upstreams.values():
            self.spawn(self._handshakes.set_level(upstream, change.level))

    def _end_sessions(self, ended: list[UpstreamSession]) -> None:
        for upstream in ended:
            self.spawn(self._handshakes.end(upstream))
