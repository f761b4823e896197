"""Requests of handshake-era sessions that live on another replica: forwarded to it, one hop, as bytes that pass.

It goes to the owner's internal listener, with a voucher for the caller that this replica has admitted. The owner is
trusted: its answer passes with the head that it gave it. An owner that is gone is answered for as the MCP SDK answers
for a session that it does not know, so that the client begins a new one, with whichever replica it reaches.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ash_mcp.errors import AshError, ConnectFailed, HiveFault, RemoteProtocolError, StreamBroken
from ash_mcp.types import DEFAULT_SCOPE, Endpoint, SandboxId, SessionName
from ash_mcp.wire import MCP_PATH, MODERN_VERSION
from ash_router.admission.base import Admitted
from ash_router.bounds.limits import DEFAULT_LIMITS, RelayLimits
from ash_router.calls.direct import DirectRequest
from ash_router.calls.door import MCP_DOOR
from ash_router.calls.passage import Passage, Sender
from ash_router.calls.sandbox_exchange import Services
from ash_router.calls.sandbox_response import Reply
from ash_router.http import bodies, framing, responses
from ash_router.http.framing import ResponseHead
from ash_router.http.heads import Fields, RequestHead
from ash_router.replicas.membership import Replicas, split_address
from ash_router.replicas.vouchers import VOUCHER_HEADER, Vouchers
from ash_router.routes import Route
from ash_router.sessions.session_gate import NO_SESSION
from ash_router.sessions.session_ids import MAX_ID_CHARS
from ash_router.upstream.pool import ConnectionPool

__all__ = ["Forward", "Forwarder", "Forwarding"]

CONNECT_SECONDS: Final = 0.8
REACH_SECONDS: Final = 0.9
"""For finding the owner and connecting to it: a client is answered within a second."""
SILENT_SECONDS: Final = 8
"""How long the host of an owner may be silent under a request, its network stack and not its process."""

_SESSION_ID: Final = re.compile(rb"([a-z0-9]{8})\.[\x21-\x7e]{1,%d}" % MAX_ID_CHARS)
_MODERN: Final = MODERN_VERSION.encode()
_HOP_BY_HOP: Final = frozenset({b"connection", b"content-length", b"keep-alive", b"transfer-encoding"})
_BROKEN: Final = "the replica that holds the session broke off; whether the call did its work is unknown"
_NOWHERE: Final = Endpoint(host="", port=0)


@dataclass(frozen=True, slots=True)
class Forward:
    """A request for another replica."""

    replica: str
    admitted: Admitted
    method: str
    session_id: str


class Forwarder:
    """What the forwardings of one process share.

    Args:
        replicas: Where the others are.
        takes_up: Whether a session, by its owner and id, is reopened here when its replica is gone.
    """

    def __init__(
        self,
        replicas: Replicas,
        vouchers: Vouchers,
        limits: RelayLimits = DEFAULT_LIMITS,
        *,
        takes_up: Callable[[str, str], bool] = lambda _, __: False,
    ) -> None:
        self.takes_up = takes_up
        self.refused: set[str] = set()
        """Replicas that are announced still, and whose address nobody listens at any more."""
        self.replicas = replicas
        self.vouchers = vouchers
        self.upstreams = ConnectionPool(
            connect_timeout_seconds=CONNECT_SECONDS,
            max_idle=limits.max_idle_upstreams,
            idle_seconds=limits.idle_upstream_seconds,
            max_head_bytes=limits.max_head_bytes,
            max_headers=limits.max_headers,
            silent_seconds=SILENT_SECONDS,
        )
        self._endpoints: dict[str, Endpoint] = {}
        """Where replicas were reached; the id of one is new with each start, so it stays there."""
        replicas.on_left.append(self._forget)

    def forward_of(self, admitted: Admitted, method: str, fields: Fields) -> Forward | None:
        """Say to which other replica a request belongs; None: to this one, or to any."""
        session_id = fields.get(b"mcp-session-id")
        if session_id is None or admitted.path != MCP_PATH or not MCP_DOOR.takes(method):
            return None
        if fields.get(b"mcp-protocol-version") == _MODERN:
            return None  # there a session means nothing
        named = _SESSION_ID.fullmatch(session_id)
        replica = named[1].decode() if named is not None else self.replicas.id
        return (
            None if replica == self.replicas.id else Forward(replica, admitted, method, session_id.decode("latin-1"))
        )

    def endpoint_of(self, replica: str) -> Endpoint:
        """Return where a replica was reached; nowhere, if it was not yet."""
        return self._endpoints.get(replica, _NOWHERE)

    async def find(self, replica: str) -> Endpoint | None:
        """Return where a replica listens; None: there is none of that id."""
        address = await self.replicas.address_of(replica)
        if address is None:
            return None
        host, port = split_address(address)
        endpoint = self._endpoints[replica] = Endpoint(host=host, port=port)
        return endpoint

    def is_reached(self, replica: str) -> bool:
        """Say whether a connection to a replica is open for the next request."""
        return replica in self.replicas.others() and self.upstreams.has_idle(self.endpoint_of(replica))

    async def is_gone(self, replica: str) -> bool:
        """Say whether a replica lives no more. To one that lives a connection is open then."""
        if replica in self.refused:
            return True
        try:
            async with asyncio.timeout(REACH_SECONDS):
                endpoint = await self.find(replica)
                if endpoint is None:
                    return self.replicas.knows_all()
                self.upstreams.put_back(await self.upstreams.connect(endpoint))
        except (ConnectFailed, TimeoutError) as error:
            if not isinstance(error.__cause__, ConnectionRefusedError):
                return False
            self.refused.add(replica)
            return True
        return False

    def _forget(self, replica: str) -> None:
        self.refused.discard(replica)
        left = self._endpoints.pop(replica, None)
        self.upstreams.forget(lambda endpoint: endpoint == left)

    def close(self) -> None:
        self.upstreams.close()


class Forwarding(Passage):
    """A `Sink` between the replica that holds a session and a caller of this one.

    Args:
        head: The caller's own; of it the owner gets those that a sandbox gets at its own endpoint.
        services: Of this replica's relay.
    """

    def __init__(
        self,
        sender: Sender,
        forward: Forward,
        head: RequestHead,
        forwarder: Forwarder,
        services: Services,
        *,
        paused: bool = False,
    ) -> None:
        direct = DirectRequest(
            forward.admitted.principal, _route_to(forward.replica, forward.admitted), forward.method
        )
        super().__init__(sender, direct, head, b"", replace(services, upstreams=forwarder.upstreams), paused=paused)
        self._endpoint = forwarder.endpoint_of(forward.replica)
        self._reply = _OwnersReply(sender)
        self._forward = forward
        self._forwarder = forwarder
        self._max_kept_bytes = services.limits.max_body_bytes

    def body_ended(self) -> None:
        super().body_ended()
        # whether it is a call is known only now; the owner does nothing before it has the end of the body
        if not self._done and self._entry is None and self._is_call():
            super()._count(None)

    def _count(self, sandbox_id: SandboxId | None) -> bool:
        return True  # a cancellation, or an answer to what a sandbox asks, must pass whatever is in flight

    def _is_call(self) -> bool:
        message = bodies.read_message(bytes(self._kept)) if self._kept else None
        return self._kept is None or (message is not None and message.method == "tools/call")

    def _may_tell(self) -> bool:
        return False  # the owner does

    def _token_line(self) -> bytes:
        voucher = self._forwarder.vouchers.write(self._forward.replica, self._forward.admitted)
        return framing.lines_of([(VOUCHER_HEADER, voucher)])

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(REACH_SECONDS):
                endpoint = await self._forwarder.find(self._forward.replica)
                if endpoint is None:
                    self._fail_unreached(self._forwarder.replicas.can_judge())
                    return
                connection = await self._services.upstreams.connect(endpoint)
        except (ConnectFailed, TimeoutError) as error:
            self._fail_unreached(isinstance(error.__cause__, ConnectionRefusedError))
            return
        self._pause_caller(False)
        self._send(connection)

    def _fail_unreached(self, is_dead: bool) -> None:
        """End the answer where the owner was not reached: a dead one's sessions are gone, a slow one may have them."""
        replica, owner = self._forward.replica, self._forward.admitted.principal.subject
        refused = self._forwarder.refused
        if is_dead and replica not in refused and self._forwarder.takes_up(owner, self._forward.session_id):
            refused.add(replica)
            self.fail(ConnectFailed("the replica that held this session is gone; try again to go on with another"))
        elif is_dead:
            self._answer_no_session()
        else:
            self.fail(ConnectFailed("the replica that holds this session cannot be reached now; try again"))

    def _answer_no_session(self) -> None:
        """Say that there is no such session: its owner is gone, and it with it."""
        if self._done:
            return
        self._end()
        said = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(NO_SESSION))]
        self._sender.write(responses.head(self._sender, 404, said, [responses.FROM_HUB]) + NO_SESSION)
        self._sender.finished()

    def fail(self, error: AshError, status: int | None = None) -> None:
        """End the answer with `error`: as the result of the call that it answers, where it is one."""
        failure = None if self._done or self._reply.begun else self._failure(error)
        if failure is None:
            super().fail(error, status)
            return
        self._end()
        session_id = framing.one(self._head.headers, b"mcp-session-id") or b""
        more = [(b"mcp-session-id", session_id)]
        self._sender.write(responses.whole_failure(self._sender, failure, error, more))
        self._sender.finished()

    async def _fail_explained(self, error: AshError, status: int | None = None) -> None:
        if isinstance(error, RemoteProtocolError):
            error = HiveFault("another replica refuses to be asked; give all one hive.key, and their clocks one time")
        self.fail(StreamBroken(_BROKEN) if isinstance(error, StreamBroken) else error)


class _OwnersReply(Reply):
    """An answer whose head is the owner's, but for its framing."""

    def _said(self, head: ResponseHead) -> tuple[bytes, bytes]:
        nonce = framing.one(head.headers, responses.NONCE)
        self.nonce = responses.new_nonce() if nonce is None else nonce
        passed = framing.lines_of((key, value) for key, value in head.headers if key not in _HOP_BY_HOP)
        ours = [(responses.NONCE, self.nonce)] if nonce is None else []
        return framing.status_line(head.status) + passed, framing.lines_of(ours)


def _route_to(replica: str, admitted: Admitted) -> Route:
    """Return the way to a replica in the form that connections and books know; where it is is found out later."""
    owner = admitted.principal.subject
    return Route(
        sandbox_id=SandboxId(replica),
        owner=owner,
        scope=DEFAULT_SCOPE,
        session=SessionName(""),
        endpoint=_NOWHERE,
    )
