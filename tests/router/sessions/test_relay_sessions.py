"""The handshake era: hub sessions stand for sessions on sandboxes, which are opened, tuned, renewed and ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_router.bounds.limits import RelayLimits
from ash_router.sessions.session_map import MAX_PARAMS_BYTES, LegacySessions
from tests.router.relay_parts import Rig, Wire, failure, legacy, open_rig
from tests.router.sandbox_parts import Box, open_script, read_request, response

pytestmark = pytest.mark.anyio

HELLO: dict[str, Any] = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"elicitation": {}, "experimental": {"x": {}}, "tasks": {}},
    "clientInfo": {"name": "tester", "version": "7"},
}


def message(method: str, params: dict[str, Any] | None = None, request_id: Any = None) -> bytes:
    fields: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params or {}}
    return json.dumps(fields if request_id is None else {**fields, "id": request_id}).encode()


def add(request_id: Any = 5) -> bytes:
    return message("tools/call", {"name": "sb1_add", "arguments": {"a": 1, "b": 2}}, request_id)


@asynccontextmanager
async def session(rig: Rig, params: dict[str, Any] | None = None) -> AsyncGenerator[tuple[Wire, str]]:
    """Open a session on the hub over a raw connection."""
    async with rig.connect() as wire:
        await wire.send(legacy(message("initialize", params or HELLO, 0)))
        status, headers, _ = await wire.answer()
        assert status == 200
        yield wire, headers["mcp-session-id"]


class Scripted:
    """A sandbox of the handshake era that notes what it is told and answers as it is bidden."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str | None, dict[str, Any]]] = []
        self.version = "2025-03-26"
        self.session_ids: list[str] = ["first", "second", "third"]
        self.lost: set[str] = set()
        self.tells = asyncio.Condition()
        self.refuses = False
        self.names_session = True
        self.held: dict[Any, asyncio.Event] = {}
        """When calls are answered, by their ids."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            headers, body = await read_request(reader)
            fields = json.loads(body) if body else {"method": headers[":method"]}
            known = headers.get("mcp-session-id")
            async with self.tells:
                self.told.append((fields["method"], known, {"headers": headers, **fields}))
                self.tells.notify_all()
            if fields.get("id") in self.held:
                await self.held[fields["id"]].wait()
            writer.write(self.answer(fields, known))
            await writer.drain()

    def answer(self, fields: dict[str, Any], known: str | None) -> bytes:
        if fields["method"] == "initialize" and not self.refuses:
            result: dict[str, Any] = {"protocolVersion": self.version, "capabilities": {}, "serverInfo": {}}
            event = b"event: message\r\ndata: " + json.dumps({"id": fields["id"], "result": result}).encode()
            more = f"mcp-session-id: {self.session_ids.pop(0)}\r\n" if self.names_session else ""
            return response(event + b"\r\n\r\n", kind="text/event-stream", more=more)
        if fields["method"] == "GET":
            return response(b"", status="405 Method Not Allowed")
        if (known or "") in self.lost or self.refuses:
            return response(b"{}", status="404 Not Found")
        if "id" not in fields:
            return response(b"", status="202 Accepted")
        return response(json.dumps({"jsonrpc": "2.0", "id": fields["id"], "result": {"by": known}}).encode())

    async def heard(self, method: str) -> dict[str, Any]:
        """Wait until a message of this method has come, and return the latest."""
        with anyio.fail_after(10):
            async with self.tells:
                await self.tells.wait_for(lambda: method in self.methods())
        return [fields for name, _, fields in self.told if name == method][-1]

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.told]


@pytest.fixture
async def script(rig: Rig) -> AsyncGenerator[Scripted]:
    scripted = Scripted()
    async with open_script(rig.directory, scripted) as socket:
        await rig.bind("sb1", socket)
        yield scripted


async def test_the_first_call_opens_a_session_and_the_next_uses_it(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id):
        for _ in range(2):
            await wire.send(legacy(add(), session_id))
            _, headers, body = await wire.answer()
            assert json.loads(body)["result"] == {"by": "first"}
            assert headers["mcp-session-id"] == session_id
            assert headers["ash-origin"] == "sandbox"
    assert script.methods() == ["initialize", "notifications/initialized", "GET", "tools/call", "tools/call"]
    assert rig.held == rig.let_go == [session_id, session_id]


async def test_the_sandbox_is_told_of_the_client_but_not_of_what_it_cannot_ask_it(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        await wire.answer()
    hello = await script.heard("initialize")
    assert hello["params"]["protocolVersion"] == "2025-06-18"
    assert hello["params"]["clientInfo"] == {"name": "tester", "version": "7"}
    assert hello["params"]["capabilities"] == {"elicitation": {}, "experimental": {"x": {}}}
    call = await script.heard("tools/call")
    assert call["headers"]["mcp-protocol-version"] == "2025-03-26"
    assert call["params"]["name"] == "add"


async def test_calls_that_come_together_open_one_session(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id), rig.connect() as other:
        await wire.send(legacy(add(1), session_id))
        await other.send(legacy(add(2), session_id))
        assert json.loads((await wire.answer())[2])["id"] == 1
        assert json.loads((await other.answer())[2])["id"] == 2
    assert script.methods().count("initialize") == 1


async def test_a_session_that_the_sandbox_lost_is_opened_anew_once(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        await wire.answer()
        script.lost.add("first")
        await wire.send(legacy(add(), session_id))
        assert json.loads((await wire.answer())[2])["result"] == {"by": "second"}
        script.lost |= {"second", "third"}
        await wire.send(legacy(add(), session_id))
        assert (await wire.answer())[0] == 404
    assert script.methods().count("initialize") == 3


async def test_a_sandbox_that_opens_no_session_is_a_typed_failure(rig: Rig, script: Scripted):
    script.refuses = True
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        _, headers, body = await wire.answer()
    assert headers["ash-origin"] == "hub"
    assert headers["mcp-session-id"] == session_id
    assert failure(body)["kind"] == "remote_protocol_error"
    assert "resultType" not in json.loads(body)["result"]


@pytest.mark.parametrize("how", ["dies", "is silent"])
async def test_a_sandbox_that_breaks_off_its_greeting_was_sent_nothing(tmp_path: Path, how: str):
    async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        if how == "is silent":
            await reader.read()

    limits = RelayLimits(handshake_timeout_seconds=0.1)
    async with open_rig(tmp_path, limits=limits) as rig, open_script(tmp_path, breaks_off) as socket:
        await rig.bind("sb1", socket)
        async with session(rig) as (wire, session_id):
            await wire.send(legacy(add(), session_id))
            _, headers, body = await wire.answer()
    found = failure(body)
    assert headers["ash-origin"] == "hub"
    assert (found["kind"], found["retryable"]) == ("connect_failed", True)
    assert "nothing was sent" in found["message"]
    assert len(rig.ledger) == 0


async def test_a_404_of_a_sandbox_that_has_no_sessions_is_its_answer(rig: Rig, script: Scripted):
    script.names_session = False
    script.lost.add("")
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        status, headers, _ = await wire.answer()
    assert (status, headers["ash-origin"]) == (404, "sandbox")
    assert script.methods().count("initialize") == 1


async def test_a_call_that_learns_late_that_its_session_is_lost_takes_the_new_one(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id), rig.connect() as other:
        await wire.send(legacy(add(), session_id))
        await wire.answer()
        script.lost.add("first")
        script.held[2] = asyncio.Event()
        await other.send(legacy(add(2), session_id))
        with anyio.fail_after(10):
            async with script.tells:
                await script.tells.wait_for(lambda: script.methods().count("tools/call") == 2)
        await wire.send(legacy(add(1), session_id))
        assert json.loads((await wire.answer())[2])["result"] == {"by": "second"}
        script.held.pop(2).set()
        assert json.loads((await other.answer())[2])["result"] == {"by": "second"}
    assert script.methods().count("initialize") == 2


async def test_a_log_level_reaches_sandboxes_called_before_and_after(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        await wire.answer()
        await wire.send(legacy(message("logging/setLevel", {"level": "debug"}, 8), session_id))
        assert json.loads((await wire.answer())[2].partition(b"data: ")[2])["id"] == 8
        assert (await script.heard("logging/setLevel"))["params"] == {"level": "debug"}
        later = Scripted()
        async with open_script(rig.directory, later, "later") as socket:
            await rig.bind("sb2", socket)
            await wire.send(legacy(add().replace(b"sb1", b"sb2"), session_id))
            await wire.answer()
            assert later.methods()[2:] == ["logging/setLevel", "GET", "tools/call"]


async def test_ending_a_session_ends_it_on_its_sandboxes(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        await wire.answer()
        await wire.send(legacy(b"", session_id, method="DELETE"))
        assert (await wire.answer())[0] == 200
        assert (await script.heard("DELETE"))["headers"]["mcp-session-id"] == "first"
        assert rig.sessions.admitted(session_id) is None
        await wire.send(legacy(add(), session_id))
        status, headers, _ = await wire.answer()
        assert (status, headers["ash-origin"]) == (404, "hub")


async def test_a_cancellation_goes_where_the_call_went(rig: Rig, box: Box):
    async with session(rig) as (wire, session_id), rig.connect() as other:
        await wire.send(legacy(message("tools/call", {"name": "sb1_wait"}, "w"), session_id))
        with anyio.fail_after(10):
            await box.waiting.wait()
        await other.send(legacy(message("notifications/cancelled", {"requestId": "w"}), session_id))
        status, headers, body = await other.answer()
        assert (status, headers["ash-origin"], body) == (202, "hub", b"")
        with anyio.fail_after(10):
            await box.cancelled.wait()
        assert (await wire.answer())[0] == 200
        kept = rig.sessions.get(session_id)
        assert kept is not None and kept.calls == {}
        # What is not a relayed call's is the hub's own business, and nothing of the message before stands before it.
        await other.send(legacy(message("notifications/cancelled", {"requestId": "w"}), session_id))
        status, headers, _ = await other.answer()
        assert (status, headers["content-type"]) == (202, "application/json")


async def test_what_follows_a_notice_on_its_connection_is_read_by_itself(rig: Rig, box: Box):
    async with session(rig) as (wire, session_id), rig.connect() as other:
        for request_id in ("one", "two"):
            await wire.send(legacy(message("tools/call", {"name": "sb1_wait"}, request_id), session_id))
            with anyio.fail_after(10):
                await box.waiting.wait()
            await other.send(legacy(message("notifications/cancelled", {"requestId": request_id}), session_id))
            assert (await other.answer())[0] == 202
            assert (await wire.answer())[0] == 200
            box.waiting.clear()
        await other.send(legacy(add(), session_id))
        status, headers, body = await other.answer()
        assert (status, headers["ash-origin"]) == (200, "sandbox")
        assert b"3" in body


async def test_a_session_that_the_hub_dropped_is_answered_by_the_hub(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id):
        rig.gone_sessions.add(session_id)
        await wire.send(legacy(add(), session_id))
        _, headers, _ = await wire.answer()
    assert headers["ash-origin"] == "hub"
    assert script.told == []
    assert rig.sessions.admitted(session_id) is None


@pytest.mark.parametrize("what", ["call", "list", "delete"])
async def test_a_session_of_another_principal_is_not_there(rig: Rig, script: Scripted, what: str):
    bodies = {"call": add(), "list": message("tools/list", {}, 3), "delete": b""}
    method = "DELETE" if what == "delete" else "POST"
    async with session(rig) as (_, session_id), rig.connect() as wire:
        await wire.send(legacy(bodies[what], session_id, more="x-principal: ann\r\n", method=method))
        stolen = await wire.answer()
        await wire.send(legacy(bodies[what], "0" * 32, more="x-principal: ann\r\n", method=method))
        absent = await wire.answer()
    assert (stolen[0], stolen[2]) == (absent[0], absent[2])
    assert stolen[1].keys() == absent[1].keys()
    assert stolen[0] == 404
    assert script.told == []
    assert rig.sessions.admitted(session_id) is not None


async def test_a_session_keeps_what_its_first_request_was_admitted_to(rig: Rig):
    async with session(rig) as (_, session_id):
        admitted = rig.sessions.admitted(session_id)
        kept = rig.sessions.get(session_id)
    assert admitted is not None and kept is not None
    assert admitted.principal.subject == "me"
    assert kept.version == "2025-06-18"


async def test_forgetting_a_sandbox_says_nothing_to_it(rig: Rig, script: Scripted):
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add(), session_id))
        await wire.answer()
        kept = rig.sessions.get(session_id)
        assert kept is not None
        (sandbox_id,) = kept.upstreams
        rig.relay.forget(sandbox_id)
        assert kept.upstreams == {}
    assert "DELETE" not in script.methods()


async def test_without_a_session_the_hub_answers(rig: Rig, script: Scripted):
    async with rig.connect() as wire:
        await wire.send(legacy(add()))
        _, headers, _ = await wire.answer()
    assert headers["ash-origin"] == "hub"
    assert script.told == []


async def test_the_map_is_bounded_and_long_greetings_are_not_kept(rig: Rig):
    async with session(rig) as (_, session_id):
        admitted = rig.sessions.admitted(session_id)
    assert admitted is not None
    ended: list[Any] = []
    sessions = LegacySessions(lambda name: None if name == "s0" else nullcontext(), max_sessions=3)
    sessions.attach(ended.extend)
    for number in range(5):
        sessions.add(f"s{number}", admitted, {"clientInfo": {"name": "x" * MAX_PARAMS_BYTES}})
    assert len(sessions) == 3
    assert sessions.get("s0") is None
    last = sessions.get("s4")
    assert last is not None
    assert last.initialize_params() == {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "ash", "version": "0"},
    }
