"""One exchange by itself, between a caller and connections that a test moves by hand."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import anyio
import pytest

from ash_mcp.errors import AshError, StreamBroken
from ash_mcp.types import DEFAULT_SCOPE, Endpoint, Principal, SandboxId, SessionName
from ash_router.admission.base import Admitted
from ash_router.bounds.deadlines import TimeoutSweeper
from ash_router.bounds.limits import RelayLimits
from ash_router.bounds.streams import OpenStreams
from ash_router.bounds.turns import Turns
from ash_router.calls.exchange import Exchange, RelayedCall, Services, request_start
from ash_router.http.framing import ResponseHead
from ash_router.http.heads import RequestHead
from ash_router.ledger import Ledger
from ash_router.routes import Route
from ash_router.sessions.session_map import LegacySession, UpstreamSession

pytestmark = pytest.mark.anyio

ROUTE = Route(
    sandbox_id=SandboxId("sbx-1"),
    owner="me",
    scope=DEFAULT_SCOPE,
    session=SessionName("sb1"),
    endpoint=Endpoint(unix="/nowhere"),
)
LOST = ResponseHead(404, [(b"content-length", b"9")])
FINE = ResponseHead(200, [(b"content-length", b"2")])


class Caller:
    """Keeps what it is answered."""

    takes_chunks = keeps_alive = True
    default_lines = b""

    def __init__(self) -> None:
        self.said = b""
        self.ends: list[str] = []

    def write(self, data: bytes) -> None:
        self.said += data

    def finished(self) -> None:
        self.ends.append("finished")

    def broken_off(self) -> None:
        self.ends.append("broken off")


class Link:
    """A connection to a sandbox, on which nothing moves by itself."""

    def __init__(self) -> None:
        self.sent = asyncio.Event()
        self.data = b""
        self.reads = True
        self.closed = False

    def send(self, data: bytes, _: Any) -> None:
        self.data = data
        self.sent.set()

    def pause(self) -> None:
        self.reads = False

    def resume(self) -> None:
        self.reads = True

    def close(self) -> None:
        self.closed = True


class Stage:
    """All that an exchange needs, where connections are opened as `links` allow and sessions as `opened` say."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.session = LegacySession("hub", "hub", Admitted(Principal("me"), DEFAULT_SCOPE, "/mcp"), {}, "2025-11-25")
        self.ledger = Ledger()
        self.caller = Caller()
        self._tasks: set[asyncio.Task[None]] = set()

    def take_idle(self, _: Route) -> Link | None:
        return None

    async def connect(self, _: Route) -> Link:
        await self.gate.wait()
        self.links.append(Link())
        return self.links[-1]

    async def session_on(self, session: LegacySession, route: Route) -> UpstreamSession:
        if route.sandbox_id not in session.upstreams:
            session.upstreams[route.sandbox_id] = UpstreamSession(route, b"s%d" % len(self.links), b"2025-11-25")
        return session.upstreams[route.sandbox_id]

    def mint(self, *_: Any) -> bytes:
        return b"token"

    def spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        return task

    async def explain(self, _: Route) -> AshError:
        return StreamBroken("nobody knows")

    def exchange(self) -> Exchange:
        them = cast("Any", self)
        services = Services(
            them,
            them,
            them,
            self.ledger,
            RelayLimits(),
            OpenStreams(),
            Turns(asyncio.get_running_loop().call_soon),
            TimeoutSweeper(60),
            self.explain,
            self.spawn,
        )
        head = RequestHead("1.1", b"POST", b"/mcp", [])
        call = RelayedCall(
            principal=Principal("me"),
            route=ROUTE,
            request_id=1,
            head=head,
            start=request_start(head, ROUTE, "add"),
            body=b"{}",
            tool="add",
            session=self.session,
        )
        return Exchange(self.caller, call, services)

    async def link(self, number: int) -> Link:
        """Wait until the call was sent on this connection."""
        with anyio.fail_after(5):
            while len(self.links) <= number:
                await asyncio.sleep(0)
            await self.links[number].sent.wait()
        return self.links[number]


@pytest.fixture
async def stage() -> Stage:
    return Stage()


async def test_a_renewed_call_leaves_the_rest_of_the_404_and_its_connection(stage: Stage) -> None:
    exchange = stage.exchange()
    exchange.start()
    first = await stage.link(0)
    exchange.received(LOST, b"no such", False)
    assert first.closed
    second = await stage.link(1)
    assert (b"mcp-session-id: s0\r\n" in first.data, b"mcp-session-id: s1\r\n" in second.data) == (True, True)
    assert stage.caller.said == b""
    exchange.received(FINE, b"{}", True)
    assert stage.caller.said.startswith(b"HTTP/1.1 200 ") and stage.caller.said.endswith(b"\r\n\r\n{}")
    assert (stage.caller.ends, second.closed, len(stage.ledger)) == (["finished"], False, 0)


async def test_a_connection_whose_404_came_whole_is_left_to_the_pool(stage: Stage) -> None:
    exchange = stage.exchange()
    exchange.start()
    first = await stage.link(0)
    exchange.received(LOST, b"no such s", True)
    await stage.link(1)
    assert not first.closed
    exchange.caller_left()


async def test_a_call_is_renewed_once(stage: Stage) -> None:
    exchange = stage.exchange()
    exchange.start()
    for number in range(2):
        await stage.link(number)
        exchange.received(LOST, b"no such s", True)
    assert stage.caller.said.startswith(b"HTTP/1.1 404 ")
    assert (stage.caller.ends, len(stage.links)) == (["finished"], 2)


@pytest.mark.parametrize("when", ["before it is reached", "meanwhile", "before it is renewed"])
async def test_a_caller_who_is_slow_stops_its_sandbox_on_every_connection(stage: Stage, when: str) -> None:
    exchange = stage.exchange()
    if when == "before it is reached":
        stage.gate.clear()
        exchange.start()
        exchange.pause()
        stage.gate.set()
        last = await stage.link(0)
    else:
        exchange.start()
        last = await stage.link(0)
        assert last.reads
        exchange.pause()
        if when == "before it is renewed":
            exchange.received(LOST, b"no such", False)
            last = await stage.link(1)
    assert not last.reads
    exchange.resume()
    assert last.reads
    exchange.caller_left()
    assert last.closed


async def test_a_caller_who_has_caught_up_before_it_is_reached_stops_nothing(stage: Stage) -> None:
    stage.gate.clear()
    exchange = stage.exchange()
    exchange.start()
    exchange.pause()
    exchange.resume()
    stage.gate.set()
    assert (await stage.link(0)).reads
    exchange.caller_left()


PIECE = b"x" * 200_000


async def receiving(stage: Stage) -> tuple[Exchange, Link]:
    exchange = stage.exchange()
    exchange.start()
    link = await stage.link(0)
    exchange.received(ResponseHead(200, [(b"content-length", b"%d" % (4 * len(PIECE)))]), b"x" * 1000, False)
    return exchange, link


async def test_a_long_answer_is_read_a_piece_at_a_time_in_its_principals_turns(stage: Stage) -> None:
    exchange, link = await receiving(stage)
    exchange.received(None, PIECE, False)
    assert link.reads  # the principal had work left
    for _ in range(2):
        exchange.received(None, PIECE, False)
        assert not link.reads
        with anyio.fail_after(5):
            while not link.reads:
                await asyncio.sleep(0)
    exchange.received(None, PIECE[1000:], True)
    assert stage.caller.ends == ["finished"] and stage.caller.said.endswith(4 * PIECE)


async def test_an_answer_that_waits_for_its_turn_goes_on_only_when_its_caller_reads_as_well(stage: Stage) -> None:
    exchange, link = await receiving(stage)
    for _ in range(2):
        exchange.received(None, PIECE, False)
    exchange.pause()
    exchange.resume()
    assert not link.reads  # its turn has not come
    exchange.pause()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not link.reads  # its turn has come, and its caller is slow
    exchange.resume()
    assert link.reads


async def test_an_answer_that_ends_while_it_waits_leaves_its_queue(stage: Stage) -> None:
    exchange, link = await receiving(stage)
    for _ in range(2):
        exchange.received(None, PIECE, False)
    exchange.caller_left()
    for _ in range(20):
        await asyncio.sleep(0)
    assert link.closed and not link.reads
