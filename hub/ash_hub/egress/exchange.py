"""One connection of a sandbox: reads its request, decides on it by policy, and forwards it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .addresses import Surroundings
from .audit import Decision, Record
from .capacity import Capacity
from .http import CHUNKED, Request, chunk_size, read_answer, read_request
from .lease import Lease
from .limits import LimitReached, Limits, Meter
from .names import Address
from .policy import Grant, Policy, check_address
from .refusal import Refusal, answer
from .resolver import Dial, LookUps, Resolve
from .tls import ALERT, RECORD_HEAD, ClientHello, asks_again, check_hello, read_hello, record_length
from .wire import Clock, End, copy, open_end, read_head, read_line

__all__ = ["Exchange", "OuterNetwork"]

_MOST_ADDRESSES = 4
_MOST_LOOKED_AT = 32
"""Of the addresses of a name. Whoever owns it can give it thousands, and looking at them keeps all others waiting."""
_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_ANSWER_READ = 16_384
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class OuterNetwork:
    """Name lookup and dialling outside the sandboxes, shared by all of them; tests replace it."""

    resolve: Resolve
    dial: Dial
    surroundings: Callable[[], Surroundings]
    look_ups: Capacity
    connections: Capacity


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request, from its first byte to the end of its connection."""

    client: End
    policy: Policy
    limits: Limits
    outside: OuterNetwork
    look_ups: LookUps
    total: Meter
    report: Callable[[Record], None]
    lease: Lease | None = None
    """How long the policy may be acted on; None: as long as it is the one."""
    crowded: bool = False
    """Whether the sandbox has as many connections as it may."""
    decision: Decision = field(default_factory=Decision)
    _grant: Grant | None = None
    """By what it is let through; None before, and where it is refused after all."""
    _server: End | None = None
    _begun: bool = False
    """Whether the client has been sent anything but a refusal."""
    _tunnel: bool = False

    def is_still_granted(self) -> bool:
        """Say whether the policy, which was changed, grants in the same way what the one before it granted.

        If not, it is reported, and whoever runs this is to cancel it.
        """
        if self._grant is None:
            return True
        with contextlib.suppress(Refusal):
            if replace(self.policy.grant(self._grant.target), policy=self._grant.policy) == self._grant:
                return True
        self.report(self.decision.record("cut", "policy_changed", f"the policy is {self.policy.text} now"))
        return False

    async def run(self) -> None:
        """Carry it out; what goes wrong is reported and told to the client."""
        clock = Clock(self.limits, Meter(self.limits.connection_bytes, "connection_bytes", self.total), self.lease)
        try:
            async with clock.scope:
                await self._carry_out(clock)
        except Refusal as refusal:
            await self._refused(refusal)
        except LimitReached as limit:
            self._cut(str(limit))
        except OSError:  # a TimeoutError is one
            if clock.scope.expired():
                self._cut(clock.spent())
            self._abort()  # one side broke off, so the other learns it
        except asyncio.CancelledError:
            self._abort()  # the sandbox is let go: what was written has no reader any more
            raise
        finally:
            await self._close()

    async def _close(self) -> None:
        """Let what was written go out, but hold nothing open for a peer that doesn't read."""
        ends = [self.client] if self._server is None else [self.client, self._server]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    for end in ends:
                        await end.close()
        finally:
            self._abort()

    async def _carry_out(self, clock: Clock) -> None:
        request = await self._request()
        if request is None:
            return
        self.decision.method, self.decision.target = request.method, request.target
        if self.crowded:
            message = f"more than {self.limits.connections} connections at once"
            raise Refusal("too_many_connections", message, status=429)
        await self._policy_known()
        grant = self._grant = self.policy.grant(request.target)
        self._server = await self._connect(grant)
        if request.tunnel:
            await self._tunnel_through(self._server, grant, clock)
        else:
            await self._lease_held()
            self._allowed()
            await self._forward(request, self._server, clock)

    async def _policy_known(self) -> None:
        """Return once the policy may be acted on.

        Raises:
            Refusal: Whoever says what it is does not answer.
        """
        try:
            async with asyncio.timeout(self.limits.connect_seconds):
                await self._lease_held()
        except TimeoutError:
            message = "the hive does not answer, so that nobody knows what this sandbox may reach"
            raise Refusal("hive_away", message, status=503) from None

    async def _lease_held(self) -> None:
        if self.lease is not None:
            await self.lease.held()

    async def _request(self) -> Request | None:
        try:
            async with asyncio.timeout(self.limits.head_seconds):
                head = await read_head(self.client)
        except TimeoutError:
            raise Refusal("slow_request", "the request took too long to arrive", status=400) from None
        return None if head is None else read_request(head)

    async def _connect(self, grant: Grant) -> End:
        """Look the target up once and connect to an address that passed.

        Raises:
            Refusal: None passed, or none answers.
        """
        passed: list[Address] = []
        refusals: list[tuple[Refusal, Address]] = []
        for address in (await self._addresses(grant))[:_MOST_LOOKED_AT]:
            try:
                check_address(grant, address, self.outside.surroundings())
                passed.append(address)
            except Refusal as refusal:
                refusals.append((refusal, address))
        if not passed:
            if not refusals:
                raise Refusal("unresolved", f"the name {grant.target.host} has no address", status=502)
            refusal, self.decision.address = refusals[0]
            raise refusal
        for address in passed[:_MOST_ADDRESSES]:
            self.decision.address = address
            try:
                async with asyncio.timeout(self.limits.connect_seconds / min(len(passed), _MOST_ADDRESSES)):
                    await self._lease_held()
                    connection = await self.outside.dial(address, grant.target.port)
            except (OSError, TimeoutError):
                continue
            _require_elsewhere(connection, grant)
            return await open_end(connection, self.limits.head_bytes)
        raise Refusal("unreachable", f"{grant.target} does not answer", status=502)

    async def _addresses(self, grant: Grant) -> Sequence[Address]:
        if grant.address is not None:
            return [grant.address]
        return await self.look_ups(str(grant.target.host), as_host_does=grant.as_host_does)

    async def _tunnel_through(self, server: End, grant: Grant, clock: Clock) -> None:
        self._tunnel = self._begun = True
        await self.client.send(_ESTABLISHED)
        if grant.server_name is not None:
            await self._require_name(server, grant.server_name, clock)
        self._allowed()
        await _together(copy(self.client, server, clock), copy(server, self.client, clock))

    async def _require_name(self, server: End, name: str, clock: Clock) -> None:
        """Pass a TLS handshake on up to where no other hello can come. Until then, nothing goes on unread."""
        first = await self._pass_hello(server, name, clock)
        if await self._asked_again(server, clock):
            await self._pass_hello(server, name, clock, first)

    async def _pass_hello(self, server: End, name: str, clock: Clock, first: ClientHello | None = None) -> ClientHello:
        """Pass on the client's records up to the end of its hello, and leave unread what follows."""
        data = b""
        try:
            async with asyncio.timeout(self.limits.head_seconds):
                while (hello := read_hello(data, first)) is None:
                    head = await self.client.reader.readexactly(RECORD_HEAD)
                    data += head + await self.client.reader.readexactly(record_length(head))
        except TimeoutError:
            raise Refusal("not_tls", "no ClientHello came in time") from None
        except asyncio.IncompleteReadError:
            raise Refusal("not_tls", "the tunnel ended before a whole ClientHello had come") from None
        await clock.moved(len(data))
        check_hello(hello, name, encrypted=self.limits.encrypted_hello)
        await server.send(data)
        return hello

    async def _asked_again(self, server: End, clock: Clock) -> bool:
        """Pass on the server's answer until it is clear whether it asks for a second hello."""
        answer = b""
        while (again := asks_again(answer)) is None:
            data = await server.reader.read(_ANSWER_READ)
            if not data:
                return False
            await clock.moved(len(data))
            answer += data
            await self.client.send(data)
        return again

    async def _forward(self, request: Request, server: End, clock: Clock) -> None:
        await server.send(request.head())
        body = asyncio.create_task(self._send_body(request, server, clock))
        passing = asyncio.create_task(self._pass_answer(request, server, clock))
        try:
            await asyncio.wait({body, passing}, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                await body  # a body that is wrong ends all of it
            await passing
        finally:
            await _cancelled(body, passing)

    async def _send_body(self, request: Request, server: End, clock: Clock) -> None:
        try:
            if request.length == CHUNKED:
                await _copy_chunks(self.client, server, clock)
            else:
                await copy(self.client, server, clock, request.length)
        except OSError:
            pass  # a server may answer, and hang up, before it has read everything

    async def _pass_answer(self, request: Request, server: End, clock: Clock) -> None:
        while True:
            try:
                head = await read_head(server)
            except (Refusal, OSError):
                head = None
            if head is None:
                raise Refusal("bad_answer", "the server broke off before its answer", status=502)
            await clock.moved(len(head))
            found = read_answer(head)
            self._begun = True
            await self.client.send(found.head)
            if not found.interim:
                break
        await copy(server, self.client, clock, 0 if request.method == "HEAD" else found.length)

    def _allowed(self) -> None:
        self.report(self.decision.record("allowed", "policy", f"allowed by the policy {self.policy.text}"))

    async def _refused(self, refusal: Refusal) -> None:
        self._grant = None
        self.report(self.decision.record(refusal.verdict, refusal.reason, refusal.message))
        if self._tunnel:
            await self.client.send_last(ALERT)
        elif self._begun:
            self._abort()
        else:
            target = None if self.decision.target is None else str(self.decision.target)
            await self.client.send_last(answer(refusal, policy=self.policy.text, target=target))

    def _cut(self, limit: str) -> None:
        """End it in the middle, so that nobody takes what came for the whole."""
        self.report(self.decision.record("cut", limit, f"the limit {limit} is reached"))
        self._abort()

    def _abort(self) -> None:
        self.client.abort()
        if self._server is not None:
            self._server.abort()


def _require_elsewhere(connection: socket.socket, grant: Grant) -> None:
    """Refuse a connection that has ended on this host although no list of its addresses said so."""
    if connection.family == socket.AF_UNIX or grant.named:
        return
    if connection.getsockname()[0] == connection.getpeername()[0]:
        connection.close()
        raise Refusal("this_host", f"{grant.target.host} is an address of this host")


async def _copy_chunks(source: End, sink: End, clock: Clock) -> None:
    """Copy a chunked body, writing its framing anew and leaving out extensions and trailers."""
    while size := chunk_size(await read_line(source)):
        await sink.send(b"%x\r\n" % size)
        await copy(source, sink, clock, size)
        if await read_line(source) != b"\r\n":
            raise Refusal("bad_request", "a chunk does not end where it should", status=400)
        await sink.send(b"\r\n")
    while (line := await read_line(source)) != b"\r\n":
        await clock.moved(len(line))
    await sink.send(b"0\r\n\r\n")


async def _together(*copies: Coroutine[Any, Any, None]) -> None:
    """Run until all have ended, or one has failed."""
    tasks = [asyncio.create_task(each) for each in copies]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancelled(*tasks)


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
