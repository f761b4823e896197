"""The data plane of one process: what all its connections share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from ash_mcp.errors import AshError, ConfigError, ConnectFailed, HiveFault, SandboxNotFound, StreamBroken, Unsupported
from ash_mcp.types import Principal, SandboxId
from ash_mcp.wire import MCP_PATH
from ash_router.admission.base import Admitted, Preview, Refusal
from ash_router.admission.tickets import without_ticket
from ash_router.bounds.deadlines import TimeoutSweeper
from ash_router.bounds.limits import DEFAULT_LIMITS, RelayLimits
from ash_router.bounds.streams import OpenStreams
from ash_router.bounds.turns import Turns
from ash_router.bounds.unfinished import Unfinished
from ash_router.calls.classifier import Cancellation, ClientAnswer, LevelChange, MessageClassifier, RootsChange
from ash_router.calls.direct import DirectRequest, direct_request_of, door_in, resumption_of
from ash_router.calls.door import browser_refusal
from ash_router.calls.ports import at_port, port_not_allowed, preview_request_of
from ash_router.calls.sandbox_exchange import Services
from ash_router.http.framing import ResponseHead, response_problem
from ash_router.http.heads import RequestHead
from ash_router.ledger import Ledger
from ash_router.replicas.forwarding import Forwarder
from ash_router.routes import Route, Routes
from ash_router.sessions.handshakes import Handshakes
from ash_router.sessions.session_map import LegacySessions, UpstreamSession
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.pool import ConnectionPool

__all__ = ["DataPlane"]

log = logging.getLogger(__name__)

SILENT_SECONDS: Final = 30
"""How long the network stack of a sandbox's host (not the process) may be silent during a request on TCP."""


class DataPlane:
    """The data plane of one process.

    Args:
        sessions: The handshake-era map; its middleware must stand before the hive's MCP endpoint.
        explain: Says why the sandbox of a route is gone, or that it is not.
        forwarder: Reaches the other replicas of the hive; None where there are none.
        look_up: Learns of routes that other processes bound; None where there are none.
        explain_missing_route: Says why a caller has no route to the name it gives (its sandbox has ended, say); None
            where the caller may not know.
        problem_of: Says why an answer of a sandbox is not taken, or None.
        reopen: Opens a session of a replica that is gone anew, by its id, and says whether it is there now.
        stale: As with `ConnectionPool`.
        is_good: Whether the share of a guest is still good; of any other principal always.
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
        explain_missing_route: Callable[[Admitted, str], AshError | None] = lambda _, __: None,
        problem_of: Callable[[ResponseHead], str | None] = response_problem,
        reopen: Callable[[Admitted, str], Awaitable[bool]] | None = None,
        stale: Callable[[], str | None] = lambda: None,
        is_good: Callable[[Principal], bool] = lambda _: True,
    ) -> None:
        self.limits = limits
        self.is_leaving = False
        """Whether callers are to go to other replicas: each answer is the last one of its connection."""
        self._look_up = look_up
        self.forwarder = forwarder
        self.routes = routes
        self._explain_missing_route = explain_missing_route
        self.classifier = MessageClassifier(routes, sessions)
        self._sessions = sessions
        self._reopen = reopen
        self._upstreams = ConnectionPool(
            connect_timeout_seconds=limits.connect_timeout_seconds,
            max_idle=limits.max_idle_upstreams,
            idle_seconds=limits.idle_upstream_seconds,
            max_head_bytes=limits.max_head_bytes,
            max_headers=limits.max_headers,
            silent_seconds=SILENT_SECONDS,
            keys=tokens.sandbox_keys,
            stale=stale,
            problem_of=problem_of,
            mint=tokens.mint,
        )
        self._handshakes = Handshakes(self._upstreams, tokens, limits, self.spawn)
        self._tasks: set[asyncio.Task[None]] = set()
        self.tunnels = OpenStreams()
        """The open WebSockets by the id of their sandbox."""
        self.services = Services(
            self._upstreams,
            self._handshakes,
            tokens,
            ledger,
            limits,
            OpenStreams(),
            Turns(lambda work: asyncio.get_running_loop().call_soon(work)),
            TimeoutSweeper(limits.sweep_seconds),
            explain,
            self.spawn,
            is_good,
            self.tunnels,
        )
        self.unfinished = Unfinished(limits.max_unfinished_per_owner, limits.max_unfinished_bytes_per_owner)
        sessions.attach(self._end_sessions)

    def has_session(self, admitted: Admitted, session_id: str) -> bool:
        """Say whether a handshake-era session of the caller's is here."""
        return self._sessions.of(admitted, session_id) is not None

    async def reopen(self, admitted: Admitted, session_id: str) -> bool:
        """Open the session of a replica that is gone anew, and say whether it is here now."""
        return self._reopen is not None and await self._reopen(admitted, session_id)

    def forget(self, sandbox_id: SandboxId) -> None:
        """Drop what is kept of a sandbox that has ended: idle connections, sessions on it and WebSockets to it."""
        self.tunnels.fail_of(sandbox_id, StreamBroken("the sandbox has ended"))
        self._upstreams.forget(lambda endpoint: endpoint.sandbox == sandbox_id)
        self._sessions.forget_sandbox(sandbox_id)
        self._handshakes.forget(sandbox_id)

    async def aclose(self) -> None:
        """Abort what is in flight and close every connection to a sandbox."""
        stopping = StreamBroken("the hive stopped during the call; whether the call did its work is unknown")
        self.services.ledger.abort_all(stopping)
        self.services.streams.fail_all(stopping)
        self.services.sweeper.close()
        self._upstreams.close()
        if self.forwarder is not None:
            self.forwarder.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as a task of the data plane: cancelled by `aclose`, logged if it fails."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work beside a request failed in the hive itself", exc_info=error)

    def direct_request(self, admitted: Admitted, method: str, head: RequestHead) -> DirectRequest | Refusal | None:
        """Return the direct request that a head makes, the refusal of a bad one, or None if it makes none."""
        if admitted.preview is not None:
            return self._preview_request(admitted, admitted.preview, method, head)
        # a guest's MCP requests are not passed through: each is read, and the hive answers all but its calls
        is_guest = admitted.principal.share is not None and admitted.path == MCP_PATH
        asked = None if is_guest else door_in(head, admitted.path)
        if asked is None:
            is_resumption = method == "GET" and admitted.path == MCP_PATH
            return resumption_of(self._sessions, admitted, head.fields) if is_resumption else None
        if isinstance(asked, AshError):
            return Refusal(asked)
        _, mark, query = without_ticket(head.target).partition(b"?")
        found = direct_request_of(self.routes, admitted, asked, method, mark + query)
        if found is None:
            return Refusal(self._explain_missing_route(admitted, asked.name) or SandboxNotFound("route not found"))
        if not found.door.takes(method):
            allowed = ", ".join(sorted(found.door.methods or ()))
            return Refusal(ConfigError(f"a sandbox's {asked.kind} takes {allowed}"), 405, (("allow", allowed),))
        if asked.port is not None:
            found = at_port(found, asked.port)
        return self._door_refusal(found, head) or found

    def _preview_request(
        self, admitted: Admitted, preview: Preview, method: str, head: RequestHead
    ) -> DirectRequest | Refusal:
        sandbox = admitted.principal.sandbox
        route = self.routes.get(sandbox) if sandbox is not None else None
        if route is None:
            return Refusal(SandboxNotFound("route not found"))
        found = preview_request_of(route, admitted, preview, method, head.target)
        return self._door_refusal(found, head) or found

    def _door_refusal(self, direct: DirectRequest, head: RequestHead) -> Refusal | None:
        """Return why a request to a living sandbox does not pass its door, or None."""
        error = browser_refusal(head.fields) if direct.door.for_programs else None
        if error is None and not direct.door.is_mcp and not direct.route.endpoint.has_runner:
            error = Unsupported("this sandbox is an image that is a server by itself: it has an MCP endpoint only")
        if error is None and direct.port is not None and direct.port not in direct.route.ports:
            error = port_not_allowed(direct.route.session, direct.port, direct.route.ports)
        return None if error is None else Refusal(error)

    @property
    def looks_up(self) -> bool:
        """Whether other processes may know sandboxes that this one does not."""
        return self._look_up is not None

    async def look_up(self) -> AshError | None:
        """Fetch the routes that other processes have bound; return the error if that failed."""
        assert self._look_up is not None
        try:
            async with asyncio.timeout(self.limits.lookup_timeout_seconds):
                await self._look_up()
        except TimeoutError:
            return ConnectFailed("the hive could not find out in time whether there is such a sandbox; try again")
        except AshError as error:
            return error
        except Exception:
            log.exception("the look-up of a sandbox failed in the hive itself")
            return HiveFault("the hive could not find out whether there is such a sandbox; its log has the details")
        return None

    def tell(self, said: Cancellation | ClientAnswer) -> None:
        """Send a client's cancellation or answer to the sandbox, in the background."""
        body = said.body if isinstance(said, ClientAnswer) else said.message.raw
        self._handshakes.tell(said.upstream, body)

    def roots_changed(self, change: RootsChange) -> None:
        """Send a client's change of roots to each sandbox that its session has called."""
        for upstream in change.session.upstreams.values():
            self._handshakes.tell(upstream, change.message.raw)

    def level_changed(self, change: LevelChange) -> None:
        """Set a session's log level on each sandbox that it has called, and on those that it will call."""
        change.session.log_level = change.level
        for upstream in change.session.upstreams.values():
            self.spawn(self._handshakes.set_level(upstream, change.level))

    def _end_sessions(self, ended: list[UpstreamSession]) -> None:
        for upstream in ended:
            self.spawn(self._handshakes.end(upstream))
