"""What the relay's tests are made of: a real uvicorn with the relay before a small hub, and sandboxes behind it.

Everything runs in the test's own event loop; the sandboxes are in `sandbox_parts.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastmcp import FastMCP

from ash_mcp.errors import AshError, StreamBroken
from ash_mcp.types import (
    DEFAULT_SCOPE,
    NO_LIMITS,
    Endpoint,
    Principal,
    PrincipalLimits,
    SandboxId,
    SessionName,
    new_sandbox_id,
)
from ash_mcp.wire import MCP_PATH, MODERN_VERSION
from ash_router.admission.base import ADMITTED_KEY, Admission, Admitted, Head, Refusal
from ash_router.bounds.turns import Turns, Waiter
from ash_router.caller.relay import Relay, RelayLimits
from ash_router.ledger import Ledger
from ash_router.replicas.forwarding import Forwarder
from ash_router.routes import Route, Routes
from ash_router.sessions.session_gate import SessionGate
from ash_router.sessions.session_map import LegacySessions
from ash_router.store.base import Store
from ash_router.store.memory import MemoryStore
from ash_router.upstream.call_tokens import CallTokens
from tests.router.sandbox_parts import Script, Server, config, open_script

JSON_TYPE = "content-type: application/json\r\naccept: application/json, text/event-stream\r\n"


class Clock:
    """Stands still until a test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class HeaderAdmission:
    """Admits whoever says its name in `x-principal` (`me` when silent); refuses `nobody`; may take its time."""

    def __init__(self) -> None:
        self.gate: asyncio.Event | None = None
        self.waits = asyncio.Event()
        """Set when somebody waits for the gate."""
        self.asked: list[Head] = []
        self.limits: dict[str, PrincipalLimits] = {}
        """Of the keys of those who have any."""
        self.bound: dict[str, SandboxId] = {}
        """The sandboxes of those who may see one only."""

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        self.asked.append(head)
        name = (head.all(b"x-principal") or ["me"])[0]
        path = unquote(head.target.partition(b"?")[0].decode("latin-1"))
        if name == "nobody":
            error = AshError("go away")
            return Refusal(error, status=401, headers=(("WWW-Authenticate", "Bearer"),))
        principal = Principal(name, limits=self.limits.get(name, NO_LIMITS), sandbox=self.bound.get(name))
        verdict = Admitted(principal, DEFAULT_SCOPE, path.removesuffix("/in/tidy"))
        return verdict if self.gate is None else self._later(verdict, self.gate)

    async def _later(self, verdict: Admitted, gate: asyncio.Event) -> Admitted:
        self.waits.set()
        await gate.wait()
        return verdict


def hub_app() -> Any:
    """An app as the hive's own: a FastMCP server at `/mcp`, and beside it a few plain answers."""
    server = FastMCP("hub")

    @server.tool(name="call", output_schema=None)
    def hive_call(session: str, tool: str, arguments: dict[str, Any] | None = None) -> str:
        return f"the hub has no session {session}"

    @server.tool
    def hello() -> str:
        return "hello from the hub"

    mcp_app = server.http_app(path="/mcp", host_origin_protection=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/mcp"):
            await _plain(scope, receive, send)
        else:
            await mcp_app(scope, receive, send)

    return app


async def _plain(scope: Any, receive: Any, send: Any) -> None:
    """Say what came: who was admitted, to which path, with how long a body, and any trailer among the headers."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    admitted = cast("Admitted", scope[ADMITTED_KEY])
    said = {
        "subject": admitted.principal.subject,
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode(),
        "query": scope["query_string"].decode(),
        "size": size,
        "headers": [key.decode() for key, _ in scope["headers"]],
    }
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def note_work(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list to which the work of all that takes a turn is added."""
    works: list[float] = []
    take = Turns.take

    def noted(turns: Turns, owner: str, waiter: Waiter, work: float = 1) -> None:
        works.append(work)
        take(turns, owner, waiter, work)

    monkeypatch.setattr(Turns, "take", noted)
    return works


def route_to(
    socket: Path, session: str = "sb1", *, owner: str = "me", names: Mapping[str, str] | None = None
) -> Route:
    return Route(
        sandbox_id=new_sandbox_id(),
        owner=owner,
        scope=DEFAULT_SCOPE,
        session=SessionName(session),
        endpoint=Endpoint(unix=str(socket)),
        tool_names=names or {},
    )


@dataclass(repr=False)  # hypothesis would print all of it
class Rig:
    """A running hub and what a test may want to look at."""

    port: int
    relay: Relay
    routes: Routes
    ledger: Ledger
    sessions: LegacySessions
    admission: HeaderAdmission
    directory: Path
    server: Server
    app: Any
    """What the server serves."""
    gone_sessions: set[str] = field(default_factory=set[str])
    ended_sessions: list[str] = field(default_factory=list[str])
    held: list[str] = field(default_factory=list[str])
    let_go: list[str] = field(default_factory=list[str])
    explanation: AshError | None = None
    ended: dict[str, AshError] = field(default_factory=dict[str, AshError])
    """What is said of a name that has no route."""
    silent: bool = False
    """Whether asking why a sandbox went away is left without an answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp"

    async def bind(self, session: str, socket: Path, *, owner: str = "me", **names: str) -> Route:
        route = route_to(socket, session, owner=owner, names=names)
        await self.routes.bind(route)
        return route

    async def take_in(self, holds: Callable[[Any], bool]) -> None:
        """Wait until the one connection that there is has got so far."""
        with anyio.fail_after(10):
            while not any(holds(connection) for connection in self.server.server_state.connections):
                await asyncio.sleep(0)

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Wire]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        try:
            yield Wire(reader, writer)
        finally:
            writer.close()


@asynccontextmanager
async def open_rig(
    directory: Path,
    *,
    limits: RelayLimits | None = None,
    app: Any = None,
    forwarder: Forwarder | None = None,
    shared: Store | None = None,
    gate: Admission | None = None,
    tokens: CallTokens | None = None,
) -> AsyncGenerator[Rig]:
    """Open a hub; over `shared` others may bind routes, which it looks up there; `gate` admits as a hive's own."""
    routes, ledger, admission = Routes(shared or MemoryStore()), Ledger(), HeaderAdmission()

    async def explain(route: Route) -> AshError:
        if rig.silent:
            await asyncio.Event().wait()
        return rig.explanation or StreamBroken("nobody knows")

    def hold(session_id: str) -> AbstractContextManager[None] | None:
        if session_id in rig.gone_sessions:
            return None
        return held(session_id)

    @contextmanager
    def held(session_id: str) -> Generator[None]:
        rig.held.append(session_id)
        yield
        rig.let_go.append(session_id)

    replica = None if forwarder is None else forwarder.replicas.id

    def name(sdk_id: str, owner: str, params: Any) -> str:
        del owner, params
        return sdk_id if replica is None else f"{replica}.{sdk_id}"

    sessions = LegacySessions(hold, name=name)
    relay = Relay(
        routes=routes,
        tokens=tokens or CallTokens(Ed25519PrivateKey.generate()),
        ledger=ledger,
        sessions=sessions,
        explain=explain,
        limits=limits or RelayLimits(),
        forwarder=forwarder,
        look_up=None if shared is None else routes.catch_up,
        explain_missing_route=lambda _, name: rig.ended.get(name),
    )
    seam: Admission = gate or admission

    async def end(session_id: str) -> None:
        rig.ended_sessions.append(session_id)

    behind = app or hub_app()
    gate_before = SessionGate(sessions, behind, end)

    async def served(scope: Any, receive: Any, send: Any) -> None:
        await (gate_before if scope.get("path") == MCP_PATH else behind)(scope, receive, send)

    server = Server(config(served, http=relay.protocol(seam), host="127.0.0.1", port=0))
    async with server.running():
        port = server.servers[0].sockets[0].getsockname()[1]
        rig = Rig(port, relay, routes, ledger, sessions, admission, directory, server, served)
        yield rig
        await relay.aclose()


class Wire:
    """One raw connection to the hub."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        with anyio.fail_after(10):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        line, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(line.split()[1]), headers

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one whole response, however its body is framed."""
        status, headers = await self.head()
        with anyio.fail_after(10):
            if "content-length" in headers:
                return status, headers, await self.reader.readexactly(int(headers["content-length"]))
            if headers.get("transfer-encoding") != "chunked":
                return status, headers, b"" if status in (204, 304) else await self.reader.read()
            body = b""
            while data := await self.chunk():
                body += data
            return status, headers, body

    async def chunk(self) -> bytes:
        with anyio.fail_after(10):
            size = int(await self.reader.readline(), 16)
            data = await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
            return data

    def received(self) -> bool:
        """Say whether anything has come that was not read yet."""
        return bool(self.reader._buffer)  # type: ignore[attr-defined]

    async def ended(self) -> bool:
        """Wait for the end of the connection and say whether nothing more came before it."""
        with anyio.fail_after(10):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


def tool_call(name: str, arguments: Mapping[str, Any] | None = None, *, request_id: Any = 1) -> bytes:
    meta = {
        "io.modelcontextprotocol/protocolVersion": MODERN_VERSION,
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = {"name": name, "arguments": dict(arguments or {}), "_meta": meta}
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}).encode()


def modern(name: str, body: bytes | None = None, *, more: str = "", framing: str | None = None) -> bytes:
    """A whole tools/call request of the stateless era."""
    body = tool_call(name) if body is None else body
    framing = f"content-length: {len(body)}\r\n" if framing is None else framing
    head = (
        f"POST /mcp HTTP/1.1\r\nhost: hub\r\n{JSON_TYPE}mcp-protocol-version: {MODERN_VERSION}\r\n"
        f"mcp-method: tools/call\r\nmcp-name: {name}\r\n{framing}{more}\r\n"
    )
    return head.encode() + body


def legacy(body: bytes, session_id: str | None = None, *, more: str = "", method: str = "POST") -> bytes:
    session = f"mcp-session-id: {session_id}\r\nmcp-protocol-version: 2025-11-25\r\n" if session_id else ""
    head = f"{method} /mcp HTTP/1.1\r\nhost: hub\r\n{JSON_TYPE}{session}content-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def failure(body: bytes) -> dict[str, Any]:
    """The typed failure in a JSON-RPC answer of the hub's."""
    message = json.loads(body)
    assert message["result"]["isError"] is True
    return message["result"]["_meta"]["ash/failure"]


CALL = modern("sb1_add", tool_call("sb1_add", request_id="seven"))


async def answer_to(rig: Rig, script: Script) -> tuple[int, dict[str, str], bytes]:
    async with open_script(rig.directory, script) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(CALL)
        return await wire.answer()
