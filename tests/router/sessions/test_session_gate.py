"""What opens a session of the handshake era is read once, by the relay, and counted to who opened it."""

from __future__ import annotations

import codecs
import json
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_mcp.types import DEFAULT_SCOPE, Principal, PrincipalLimits, SandboxId
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.sessions.session_gate import INITIALIZE_KEY, SessionGate
from ash_router.sessions.session_map import HANDSHAKE_VERSIONS, LegacySessions
from tests.router.relay_parts import JSON_TYPE, Rig, open_rig

pytestmark = pytest.mark.anyio

HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}
OPENED = b'{"result": {"protocolVersion": "2025-06-18"}}'
BODY = json.dumps(HELLO).encode()


class Sdk:
    """Opens a session for whatever reaches it without one, as a reader that reads otherwise than the relay would."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, bytes]] = []
        self.given = 0
        self.status = 200
        self.body = OPENED

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        known = dict(scope["headers"]).get(b"mcp-session-id")
        self.reached.append((scope["method"], known or b""))
        await receive()
        if known is None:
            self.given += 1
            known = b"s%d" % self.given
        headers = [(b"mcp-session-id", known), (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@pytest.fixture
def sdk() -> Sdk:
    return Sdk()


@pytest.fixture
async def gated(tmp_path: Path, sdk: Sdk) -> AsyncGenerator[Rig]:
    async with open_rig(tmp_path, app=sdk) as rig:
        yield rig


async def ask(
    rig: Rig, body: bytes = BODY, more: str = "", *, kind: str = JSON_TYPE, method: str = "POST"
) -> tuple[int, dict[str, str], dict[str, Any]]:
    head = f"{method} /mcp HTTP/1.1\r\nhost: hub\r\n{kind}content-length: {len(body)}\r\n{more}\r\n"
    async with rig.connect() as wire:
        await wire.send(head.encode() + body)
        status, headers, said = await wire.answer()
    return status, headers, json.loads(said) if said else {}


def assert_json_rpc_error(answer: tuple[int, dict[str, str], dict[str, Any]], status: int) -> None:
    got, headers, said = answer
    assert (got, said["jsonrpc"], said["id"], headers["ash-origin"]) == (status, "2.0", None, "hub")
    assert isinstance(said["error"]["code"], int) and said["error"]["message"]


TWICE = [
    "mcp-name: a\r\nmcp-name: a\r\n",
    "mcp-method: initialize\r\nmcp-method: initialize\r\n",
    "mcp-protocol-version: 2025-11-25\r\nmcp-protocol-version: 2026-07-28\r\n",
    "mcp-session-id: a\r\nmcp-session-id: b\r\n",
    "x-session-id: sb1\r\nx-session-id: sb2\r\n",
    "host: hub\r\n",
    "origin: http://hub\r\norigin: http://hub\r\n",
    "authorization: Bearer a\r\nauthorization: Bearer b\r\n",
    "content-type: application/json\r\n",
    "ash-scope: a\r\nash-scope: a\r\n",
    "mcp-param-x: a\r\nmcp-param-x: a\r\n",
]


@pytest.mark.parametrize("more", TWICE)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_a_header_that_says_where_to_may_come_once_only(gated: Rig, sdk: Sdk, method: str, more: str) -> None:
    assert_json_rpc_error(await ask(gated, more=more, method=method), 400)
    assert not sdk.reached


UNREADABLE = {
    "NaN": BODY.replace(b'"1"', b"NaN"),
    "too large a number": BODY.replace(b'"1"', b"1e999"),
    "byte order mark": codecs.BOM_UTF8 + BODY,
    "utf-16": BODY.decode().encode("utf-16"),
    "latin-1": BODY.replace(b'"t"', b'"\xe9"'),
    "half a surrogate": BODY.replace(b'"t"', b'"\\ud800"'),
    "method twice": BODY.replace(b'"method"', b'"method": "ping", "method"'),
    "method twice, spelt otherwise": BODY.replace(b'"method"', b'"\\u006dethod": "ping", "method"'),
    "twice, and a colon that is written otherwise": b'{"method": "initialize", "a": 1, "a": "\\u003a"}',
    "a key twice, deep": BODY.replace(b'"name"', b'"name": "u", "name"'),
    "a batch": b"[" + BODY + b"]",
    "two messages": BODY + BODY,
    "a string": b'"initialize"',
    "nothing": b"",
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("version", ["", "2026-07-28"])
async def test_what_the_relay_cannot_read_reaches_no_second_reader(
    gated: Rig, sdk: Sdk, body: bytes, version: str
) -> None:
    more = f"mcp-protocol-version: {version}\r\nmcp-method: tools/list\r\n" if version else ""
    assert_json_rpc_error(await ask(gated, body, more), 400)
    assert not sdk.reached


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "content-type: text/plain\r\n",
        "content-type: application/json; charset=utf-16\r\n",
        "content-type: application/json, text/plain\r\n",
        "content-type: application/jsonx\r\n",
        "content-type: application/json\r\ncontent-encoding: gzip\r\n",
    ],
)
async def test_a_message_must_be_plain_json_by_its_head(gated: Rig, sdk: Sdk, kind: str) -> None:
    assert_json_rpc_error(await ask(gated, kind=kind), 400)
    assert not sdk.reached


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON ; charset=UTF-8", 'application/json;charset="utf-8"']
)
async def test_json_is_taken_however_its_type_is_spelt(gated: Rig, kind: str) -> None:
    assert (await ask(gated, kind=f"content-type: {kind}\r\n"))[0] == 200


@pytest.mark.parametrize("session", ["s1", "s9", "", "0" * 32])
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "PUT"])
async def test_a_session_whose_owner_is_unknown_does_not_exist(
    gated: Rig, sdk: Sdk, method: str, session: str
) -> None:
    answer = await ask(gated, more=f"mcp-session-id: {session}\r\n", method=method)
    assert answer[0] == 404 and answer[2]["error"]["message"] == "Session not found"
    assert not sdk.reached


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_anothers_session_does_not_exist_either(gated: Rig, sdk: Sdk, method: str) -> None:
    _, headers, _ = await ask(gated)
    mine = f"mcp-session-id: {headers['mcp-session-id']}\r\n"
    theirs = await ask(gated, more=f"{mine}x-principal: bob\r\n", method=method)
    nobodys = await ask(gated, more="mcp-session-id: s9\r\nx-principal: bob\r\n", method=method)
    assert theirs == nobodys and theirs[0] == 404
    assert (await ask(gated, more=mine, method=method))[0] == 200
    assert sdk.reached == [("POST", b""), (method, b"s1")]


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "PUT"])
async def test_without_a_session_only_initialize_gets_through(gated: Rig, sdk: Sdk, method: str) -> None:
    ping = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"}).encode()
    assert_json_rpc_error(await ask(gated, ping, method=method), 405 if method == "PUT" else 400)
    assert not sdk.reached


@pytest.mark.parametrize("version", [None, *HANDSHAKE_VERSIONS, "2099-01-01"])
async def test_whatever_was_opened_is_its_openers(gated: Rig, version: str | None) -> None:
    more = f"mcp-protocol-version: {version}\r\n" if version else ""
    _, headers, _ = await ask(gated, more=more)
    session = gated.sessions.get(headers["mcp-session-id"])
    assert session is not None and session.admitted.principal.subject == "me"
    assert session.version == "2025-06-18" and gated.sessions.count("me") == 1


async def test_what_was_refused_is_nobodys(gated: Rig, sdk: Sdk) -> None:
    sdk.status = 406
    assert (await ask(gated))[0] == 406
    assert len(gated.sessions) == 0 and not gated.ended_sessions


async def test_a_session_whose_initialize_failed_is_ended(gated: Rig, sdk: Sdk) -> None:
    sdk.body = b'{"error": {"code": -32602, "message": "bad \\"protocolVersion\\": \\"2025-06-18\\""}}'
    assert (await ask(gated))[0] == 200
    assert len(gated.sessions) == 0 and gated.ended_sessions == ["s1"]


class Manager:
    """A gate of its own before something that opens sessions, and the requests to it that are not answered yet."""

    def __init__(self, **bounds: Any) -> None:
        self.living: list[str] = []
        self.held: anyio.Event | None = None
        self.sessions = LegacySessions(lambda _: nullcontext())
        self.gate = SessionGate(self.sessions, self.serve, self.end, **bounds)

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        known = dict(scope["headers"]).get(b"mcp-session-id", b"").decode()
        if not known:
            if self.held is not None:
                await self.held.wait()
            known = f"s{len(self.living) + 1}"
            self.living.append(known)
        headers = [(b"mcp-session-id", known.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": OPENED})

    async def end(self, session_id: str) -> None:
        self.living[self.living.index(session_id)] = ""

    async def ask(self, who: str | Principal, session: str | None = None) -> int:
        said: list[Any] = []
        principal = Principal(who) if isinstance(who, str) else who

        async def send(message: Any) -> None:
            said.append(message)

        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "headers": [] if session is None else [(b"mcp-session-id", session.encode())],
            ADMITTED_KEY: Admitted(principal, DEFAULT_SCOPE, "/mcp"),
        }
        await self.gate(scope if session else {**scope, INITIALIZE_KEY: {}}, nothing, send)
        return said[0]["status"]


async def nothing() -> Any:
    return {"type": "http.request"}


async def test_sessions_of_one_principal_are_bounded_and_an_ended_one_makes_room() -> None:
    manager = Manager(max_sessions_per_principal=3)
    assert [await manager.ask("ann") for _ in range(4)] == [200, 200, 200, 429]
    assert await manager.ask("bob") == 200
    manager.sessions.remove("s2")
    assert [await manager.ask("ann") for _ in range(2)] == [200, 429]


def guest(share: str, sandbox: str) -> Principal:
    return Principal(f"share:{share}", sandbox=SandboxId(sandbox), share=share, limits=PrincipalLimits(sessions=3))


async def test_all_guests_of_one_sandbox_have_as_many_as_one_owner() -> None:
    manager = Manager(max_sessions_per_principal=4)
    first, second, third = guest("a", "sbx-1"), guest("b", "sbx-1"), guest("c", "sbx-2")
    assert [await manager.ask(first) for _ in range(4)] == [200, 200, 200, 429]
    assert [await manager.ask(second) for _ in range(2)] == [200, 429]
    assert await manager.ask(third) == 200 and await manager.ask("ann") == 200
    manager.sessions.remove("s1")
    assert [await manager.ask(second) for _ in range(2)] == [200, 429]
    manager.held = anyio.Event()
    for session in ("s2", "s3"):
        manager.sessions.remove(session)
    statuses: list[int] = []

    async def opening(who: Principal) -> None:
        statuses.append(await manager.ask(who))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for who in (first, first, second, second):
                group.start_soon(opening, who)
            await anyio.wait_all_tasks_blocked()
            assert statuses == [429, 429]
            manager.held.set()
    assert manager.sessions.count_guests("guests of sbx-1") == 4


async def test_what_is_only_being_opened_counts_too() -> None:
    manager = Manager(max_sessions_per_principal=3)
    manager.held = anyio.Event()
    statuses: list[int] = []

    async def opening() -> None:
        statuses.append(await manager.ask("ann"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(opening)
            await anyio.wait_all_tasks_blocked()
            assert statuses == [429, 429]
            manager.held.set()
    assert sorted(statuses) == [200, 200, 200, 429, 429] and manager.sessions.count("ann") == 3


async def test_where_all_have_no_room_who_has_most_gives_way_to_who_has_fewer() -> None:
    manager = Manager(max_sessions=6)
    assert [await manager.ask("ann") for _ in range(6)] == [200] * 6
    assert await manager.ask("ann") == 429
    await manager.ask("ann", "s1")
    assert [await manager.ask("bob") for _ in range(3)] == [200, 200, 200]
    assert [manager.sessions.count(who) for who in ("ann", "bob")] == [3, 3]
    assert [bool(session) for session in manager.living[:6]] == [True, False, False, False, True, True]
    assert [await manager.ask(who) for who in ("ann", "bob", "eve", "eve")] == [429, 429, 200, 200]
    assert [manager.sessions.count(who) for who in ("ann", "bob", "eve")] == [2, 2, 2]
