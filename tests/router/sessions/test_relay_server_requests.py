"""What sandboxes ask of a client finds it, and answers find them, through the hive's own endpoint, in both eras."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import mcp_types as types
import pytest
from fastmcp import Client, Context, FastMCP
from fastmcp.client.elicitation import ElicitResult

from tests.router.relay_parts import Rig, legacy
from tests.router.sandbox_parts import Box, chunk, open_box, open_script, read_request, response
from tests.router.sessions.test_relay_sessions import HELLO, Scripted, add, message, session

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:The .* capability is deprecated")]


def asking_server() -> FastMCP:
    server = FastMCP("asker")

    @server.tool
    async def greet(ctx: Context) -> str:
        said: Any = await ctx.elicit("who are you?", response_type=str)
        return f"hello {said.data}" if said.action == "accept" else said.action

    @server.tool
    async def guarded(ctx: Context) -> str | types.InputRequiredResult:
        said = (ctx.input_responses or {}).get("who")
        if said is None:
            form = types.ElicitRequestFormParams(
                message="who are you?",
                requested_schema={"type": "object", "properties": {"value": {"type": "string"}}},
            )
            asked: Any = {"who": types.ElicitRequest(params=form)}
            return types.InputRequiredResult(input_requests=asked, request_state="first")
        content: Any = getattr(said, "content", None)
        return f"{ctx.request_state}: hello {content['value']}"

    @server.tool
    async def think(ctx: Context) -> str:
        said = await ctx.session.create_message(  # pyright: ignore[reportDeprecated]
            [types.SamplingMessage(role="user", content=types.TextContent(type="text", text="2+2?"))],
            max_tokens=9,
            related_request_id=ctx.request_id,
        )
        return str(getattr(said.content, "text", said.content))

    @server.tool
    async def roots(ctx: Context) -> list[str]:
        said = await ctx.session.list_roots()  # pyright: ignore[reportDeprecated]
        return [str(root.uri) for root in said.roots]

    return server


@pytest.fixture
async def asker(rig: Rig) -> AsyncGenerator[Box]:
    async with open_box(rig.directory, "asker", asking_server()) as box:
        await rig.bind("sb1", box.socket)
        await rig.bind("sb2", box.socket)
        yield box


@pytest.mark.parametrize("name", ["sb1", "sb2"])
async def test_a_tool_that_elicits_hears_the_user(rig: Rig, asker: Box, name: str):
    async with Client(rig.url, mode="legacy", elicitation_handler=backwards) as client:
        assert (await client.call_tool(f"{name}_greet")).data == "hello ?uoy era ohw"


async def backwards(text: str, kind: Any, params: Any, context: Any) -> Any:
    return ElicitResult(action="accept", content={"value": text[::-1]})


@pytest.mark.parametrize("name", ["sb1", "sb2"])
async def test_in_the_stateless_era_what_is_asked_is_a_result_and_the_answer_another_call(
    rig: Rig, asker: Box, name: str
):
    async with Client(rig.url, mode="2026-07-28", elicitation_handler=backwards) as client:
        result = await client.call_tool(f"{name}_guarded")
    assert result.data == "first: hello ?uoy era ohw"
    assert [head["mcp-name"] for head in asker.posted() if head["mcp-method"] == "tools/call"] == ["guarded"] * 2


async def test_a_tool_that_samples_hears_the_model(rig: Rig, asker: Box):
    async def think(messages: Any, params: Any, context: Any) -> str:
        return "four"

    async with Client(rig.url, mode="legacy", sampling_handler=think) as client:
        assert (await client.call_tool("sb1_think")).data == "four"


async def test_what_a_sandbox_asks_outside_of_a_calls_stream_is_heard_in_it(rig: Rig, asker: Box):
    async with Client(rig.url, mode="legacy", roots=["file:///one", "file:///two"]) as client:
        for _ in range(2):
            assert (await client.call_tool("sb1_roots")).data == ["file:///one", "file:///two"]
    assert len(asker.posted("GET")) == 1
    assert len(asker.posted("DELETE")) == 1


async def test_a_client_that_takes_no_questions_is_asked_none(rig: Rig, asker: Box):
    async with Client(rig.url, mode="legacy") as client:
        result = await client.call_tool("sb1_greet", raise_on_error=False)
    assert result.is_error
    assert asker.posted("GET") == []


async def test_two_sandboxes_that_ask_at_once_hear_their_own_answers(rig: Rig, asker: Box):
    both = anyio.Event()
    asked: list[str] = []

    async def answer(text: str, kind: Any, params: Any, context: Any) -> Any:
        asked.append(text)
        number = len(asked)
        if number == 2:
            both.set()
        await both.wait()
        return ElicitResult(action="accept", content={"value": str(number)})

    heard: set[str] = set()

    async def greet(client: Client[Any], name: str) -> None:
        heard.add((await client.call_tool(f"{name}_greet")).data)

    async with Client(rig.url, mode="legacy", elicitation_handler=answer) as client:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(greet, client, "sb1")
                group.start_soon(greet, client, "sb2")
    assert heard == {"hello 1", "hello 2"}


async def test_a_direct_door_needs_no_help_to_ask(rig: Rig, asker: Box):
    url = rig.url.replace("/mcp", "/s/sb1/mcp")
    async with Client(url, mode="legacy", elicitation_handler=backwards, roots=["file:///one"]) as client:
        assert (await client.call_tool("greet")).data == "hello ?uoy era ohw"
        assert (await client.call_tool("roots")).data == ["file:///one"]
    assert len(rig.sessions) == 0


class Asking(Scripted):
    """A sandbox whose tool asks `ping` in its stream, or on the standalone one, and notes the answer."""

    def __init__(self, *, aside: bool = False) -> None:
        super().__init__()
        self.aside = aside
        self.streams: list[asyncio.StreamWriter] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        ask = b'event: message\r\ndata: {"jsonrpc":"2.0","id":0,"method":"ping"}\r\n\r\n'
        while True:
            headers, body = await read_request(reader)
            fields = json.loads(body) if body else {"method": headers[":method"]}
            async with self.tells:
                self.told.append((fields.get("method", "answer"), headers.get("mcp-session-id"), fields))
                self.tells.notify_all()
            if fields.get("method") == "GET" and self.aside:
                self.streams.append(writer)
                writer.write(head)
            elif fields.get("method") == "tools/call":
                self.streams[:0] = [writer]
                writer.write(head)
                if self.aside:
                    self.streams[-1].write(chunk(ask))
                else:
                    writer.write(chunk(ask[:20]))
                    await writer.drain()
                    writer.write(chunk(ask[20:]))
            elif "result" in fields or "error" in fields:
                writer.write(response(b"", status="202 Accepted"))
                done = json.dumps({"jsonrpc": "2.0", "id": 5, "result": {"content": []}}).encode()
                if self.streams[0] is not self.streams[-1] or not self.aside:
                    self.streams[0].write(chunk(b"data: " + done + b"\r\n\r\n") + b"0\r\n\r\n")
            else:
                writer.write(self.answer(fields, headers.get("mcp-session-id")))
            await writer.drain()


@pytest.mark.parametrize("aside", [False, True])
async def test_only_the_id_of_a_request_is_changed_and_its_answer_is_taken_at_once(rig: Rig, aside: bool):
    script = Asking(aside=aside)
    async with open_script(rig.directory, script) as socket, session(rig) as (wire, session_id), rig.connect() as back:
        await rig.bind("sb1", socket)
        await wire.send(legacy(add(), session_id))
        assert (await wire.head())[0] == 200
        event = await wire.chunk()
        given = json.loads(event.partition(b"data: ")[2])["id"]
        assert event == b'event: message\r\ndata: {"jsonrpc":"2.0","id":"%b","method":"ping"}\r\n\r\n' % given.encode()
        said = json.dumps({"jsonrpc": "2.0", "id": given, "result": {}}).encode()
        await back.send(legacy(said, session_id))
        assert (await back.answer())[0] == 202
        await script.heard("answer")
        assert json.loads((await wire.chunk()).partition(b"data: ")[2])["id"] == 5
        assert await wire.chunk() == b""
    assert [fields["id"] for name, _, fields in script.told if name == "answer"] == [0]


async def test_a_question_that_nobody_is_there_to_hear_is_refused(rig: Rig):
    script = Asking(aside=True)
    async with open_script(rig.directory, script) as socket, session(rig) as (wire, session_id):
        await rig.bind("sb1", socket)
        await wire.send(legacy(add(), session_id))
        await wire.head()
        given = json.loads((await wire.chunk()).partition(b"data: ")[2])["id"]
        async with rig.connect() as back:
            await back.send(legacy(json.dumps({"jsonrpc": "2.0", "id": given, "result": {}}).encode(), session_id))
            await back.answer()
        while await wire.chunk():
            pass
        script.streams[-1].write(chunk(b'data: {"jsonrpc":"2.0","id":"q","method":"roots/list"}\n\n'))
        with anyio.fail_after(5):
            async with script.tells:
                await script.tells.wait_for(lambda: script.methods().count("answer") == 2)
        assert [fields["error"]["code"] for _, _, fields in script.told if fields.get("id") == "q"] == [-32001]


async def test_another_clients_answer_reaches_nobody(rig: Rig):
    script = Asking()
    async with (
        open_script(rig.directory, script) as socket,
        session(rig) as (wire, session_id),
        session(rig) as (other, other_id),
    ):
        await rig.bind("sb1", socket)
        await wire.send(legacy(add(), session_id))
        await wire.head()
        given = json.loads((await wire.chunk()).partition(b"data: ")[2])["id"]
        await other.send(legacy(json.dumps({"jsonrpc": "2.0", "id": given, "result": {}}).encode(), other_id))
        assert (await other.answer())[0] in (202, 400)
        assert "answer" not in script.methods()
        kept = rig.sessions.get(session_id)
        assert kept is not None
        assert list(kept.asks) == [given]


async def test_a_change_of_roots_is_told_to_the_sandboxes_called(rig: Rig):
    script = Scripted()
    async with open_script(rig.directory, script) as socket, session(rig, HELLO) as (wire, session_id):
        await rig.bind("sb1", socket)
        await wire.send(legacy(add(), session_id))
        await wire.answer()
        await wire.send(legacy(message("notifications/roots/list_changed"), session_id))
        assert (await wire.answer())[0] == 202
        await script.heard("notifications/roots/list_changed")
