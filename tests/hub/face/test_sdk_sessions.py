"""What the gate knows of sessions is what the SDK has of them, however they end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mcp.server.lowlevel.server import Server
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS

from ash_hub.face.legacy_sessions import SdkSessions
from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_mcp.wire import MODERN_VERSION
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.sessions.session_gate import INITIALIZE_KEY, SessionGate
from ash_router.sessions.session_ids import SessionIds
from ash_router.sessions.session_map import HANDSHAKE_VERSIONS, LegacySessions

pytestmark = pytest.mark.anyio

TYPES = {"x-who": "ann", "accept": "application/json, text/event-stream"}
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
HELLO: dict[str, Any] = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "t", "version": "1"},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


KEY = Ed25519PrivateKey.generate()
ANN = Admitted(Principal("ann"), DEFAULT_SCOPE, "/mcp")


class Scene:
    def __init__(self, **bounds: Any) -> None:
        self.sdk = SdkSessions(Server("test"), lambda session_id: self.sessions.remove(session_id))
        self.sessions = LegacySessions(self.sdk.hold)
        ids = SessionIds(KEY, "bbbbbbbb")
        self.gate = SessionGate(self.sessions, self.sdk.manager.handle_request, self.sdk.end, ids=ids, **bounds)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self._admitted), base_url="http://hub")

    async def _admitted(self, scope: Any, receive: Any, send: Any) -> None:
        who = dict(scope["headers"])[b"x-who"].decode()
        verdict = Admitted(Principal(who), DEFAULT_SCOPE, "/mcp")
        await self.gate({**scope, ADMITTED_KEY: verdict, INITIALIZE_KEY: HELLO}, receive, send)

    async def open(self, who: str = "ann", params: Any = HELLO) -> httpx.Response:
        message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
        accept = "application/json, text/event-stream"
        return await self.client.post("/mcp", headers={"x-who": who, "accept": accept}, json=message)

    async def listen(
        self, session_id: str, accept: bytes = b"text/event-stream", *more: tuple[bytes, bytes]
    ) -> tuple[int, bool]:
        """Return the status of a GET stream, and whether it says that the list of tools changed before it is quiet."""
        sent, left = list[Any](), anyio.Event()

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"x-who", b"ann"), (b"accept", accept), (b"mcp-session-id", session_id.encode()), *more]
        scope = {"type": "http", "method": "GET", "path": "/mcp", "query_string": b"", "headers": headers}
        async with anyio.create_task_group() as group:
            group.start_soon(self._admitted, scope, receive, send)
            await anyio.wait_all_tasks_blocked()
            left.set()
        said = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], b"notifications/tools/list_changed" in said

    def in_step(self) -> int:
        """Return how many sessions there are, by the SDK and by the gate."""
        living = list(self.sdk._transports())  # pyright: ignore[reportPrivateUsage]
        assert len(living) == len(self.sessions) and all(self.sessions.get(known) for known in living)
        return len(living)


@asynccontextmanager
async def open_scene(**bounds: int) -> AsyncGenerator[Scene]:
    scene = Scene(**bounds)
    with anyio.fail_after(20):
        async with scene.sdk.manager.run(), scene.client:
            yield scene


async def test_a_session_is_known_until_its_client_ends_it() -> None:
    async with open_scene() as scene:
        opened = [(await scene.open()).headers["mcp-session-id"] for _ in range(3)]
        assert scene.in_step() == 3
        for who, left in (("bob", 3), ("ann", 2)):
            await scene.client.delete("/mcp", headers={"x-who": who, "mcp-session-id": opened[0]})
            assert scene.in_step() == left


async def test_a_session_that_was_idle_for_too_long_is_forgotten() -> None:
    async with open_scene() as scene:
        scene.sdk.manager.session_idle_timeout = 0.01
        await scene.open()
        while scene.in_step():
            await anyio.sleep(0.005)
        assert scene.sessions.count("ann") == 0


@pytest.mark.parametrize("params", [{}, None, {"protocolVersion": 7}])
async def test_a_session_that_could_not_begin_is_not_kept(params: Any) -> None:
    async with open_scene() as scene:
        assert "error" in (await scene.open(params=params)).text
        assert scene.in_step() == 0


async def test_who_has_too_many_gives_way_in_the_sdk_too() -> None:
    async with open_scene(max_sessions=3) as scene:
        for who in ("ann", "ann", "ann", "bob"):
            assert (await scene.open(who)).status_code == 200
        assert scene.in_step() == 3
        assert [scene.sessions.count(who) for who in ("ann", "bob")] == [2, 1]


async def test_a_session_of_a_replica_that_is_gone_is_opened_once_by_the_id_that_it_had() -> None:
    lost = SessionIds(KEY, "aaaaaaaa").write("0" * 32, "ann", HELLO)
    async with open_scene() as scene:
        taken: list[bool] = []

        async def reopen() -> None:
            taken.append(await scene.gate.reopen(ANN, lost))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(reopen)
        assert taken == [True] * 3 and len(scene.sessions) == 1
        session = scene.sessions.of(ANN, lost)
        assert session is not None and session.version == "2025-11-25"
        pinged = await scene.client.post("/mcp", headers={**TYPES, "mcp-session-id": lost}, json=PING)
        assert pinged.status_code == 200 and pinged.headers["mcp-session-id"] == lost
        await scene.client.delete("/mcp", headers={"x-who": "ann", "mcp-session-id": lost})
        assert len(scene.sessions) == 0


async def test_the_first_stream_of_a_session_that_was_taken_up_begins_with_a_changed_list() -> None:
    lost = SessionIds(KEY, "aaaaaaaa").write("0" * 32, "ann", HELLO)
    async with open_scene() as scene:
        assert await scene.gate.reopen(ANN, lost)
        assert await scene.listen(lost, accept=b"application/json") == (406, False)
        assert await scene.listen(lost) == (200, True)
        assert await scene.listen(lost) == (200, False)
        own = (await scene.open()).headers["mcp-session-id"]
        assert await scene.listen(own) == (200, False)


async def test_a_stream_that_nobody_can_continue_begins_anew() -> None:
    async with open_scene() as scene:
        session = (await scene.open()).headers["mcp-session-id"]
        assert await scene.listen(session, b"text/event-stream", (b"last-event-id", b"7.1")) == (200, False)


async def test_no_session_is_opened_for_an_id_that_is_none_of_ours_or_beyond_the_bound() -> None:
    lost = SessionIds(KEY, "aaaaaaaa").write("0" * 32, "ann", HELLO)
    async with open_scene(max_sessions_per_principal=1) as scene:
        for session_id in (lost[:-1], lost + "A", "aaaaaaaa." + "0" * 32, ""):
            assert not await scene.gate.reopen(ANN, session_id)
        assert not await scene.gate.reopen(Admitted(Principal("bob"), DEFAULT_SCOPE, "/mcp"), lost)
        await scene.open()
        assert not await scene.gate.reopen(ANN, lost)
        assert len(scene.sessions) == 1


def test_both_agree_on_what_is_which_era() -> None:
    assert set(HANDSHAKE_VERSIONS) == set(HANDSHAKE_PROTOCOL_VERSIONS)
    assert set(MODERN_PROTOCOL_VERSIONS) == {MODERN_VERSION}
