"""The face of a real hive in this process: what it lists, what it refuses and how, expansion, scopes, resources."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import tempfile
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from mcp.client import Client
from mcp_types import Implementation

from ash_hub.app import Hive, open_hive
from ash_hub.face.handlers import HiveOperations
from ash_hub.face.hive_tools import HIVE_TOOLS, INSTRUCTIONS
from ash_hub.face.steady_progress import SteadyProgress
from ash_hub.settings import HubSettings
from ash_mcp._protocol import build_request
from ash_mcp.errors import ConfigError
from ash_mcp.wire import FAILURE_META_KEY

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def settings(folder: Path, **given: Any) -> HubSettings:
    return HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run", **given)


@pytest.fixture(scope="module")
async def hive(anyio_backend: str) -> AsyncGenerator[Hive]:
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))
    async with open_hive(settings(folder, max_listed_tools=6)) as hive:
        yield hive
    shutil.rmtree(folder)


async def call(hive: Hive, name: str, arguments: dict[str, Any] | None = None, query: str = "") -> Any:
    async with Client(hive.url + query) as client:
        return await client.call_tool(name, arguments or {})


async def names(hive: Hive, query: str = "") -> list[str]:
    async with Client(hive.url + query) as client:
        return [tool.name for tool in (await client.list_tools()).tools]


async def spawn(hive: Hive, query: str = "", **arguments: Any) -> dict[str, Any]:
    result = await call(hive, "spawn", {"recipe": "echo", **arguments}, query)
    assert not result.is_error, result.content
    return result.structured_content


class Waiting:
    """The tools of a hive, which do not answer before their caller has seen `signs` signs of life."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen, self.enough, answer = 0, anyio.Event(), HiveOperations.answer

        async def waiting(*given: Any) -> Any:
            await self.enough.wait()
            return await answer(*given)

        patch.setattr(HiveOperations, "answer", waiting)
        patch.setattr("ash_hub.face.server.SteadyProgress", partial(SteadyProgress, quiet_seconds=0.02))

    def sees(self) -> None:
        self.seen += 1
        if self.seen == 3:
            self.enough.set()


LIST: dict[str, Any] = {"name": "list", "arguments": {}}
BOTH = {"accept": "application/json, text/event-stream"}


async def stateless_call(client: httpx.AsyncClient, url: str) -> Any:
    request = build_request("tools/call", LIST, request_id=1)
    return client.stream("POST", url, headers=dict(request.headers), content=request.body)


async def handshake_call(client: httpx.AsyncClient, url: str) -> Any:
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
    message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello}
    opened = await client.post(url, headers=BOTH, json=message)
    headers = {**BOTH, "mcp-session-id": opened.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}
    await client.post(url, headers=headers, json={"jsonrpc": "2.0", "method": "notifications/initialized"})
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": LIST}
    return client.stream("POST", url, headers=headers, json=message)


@pytest.mark.parametrize("call", [stateless_call, handshake_call])
async def test_who_asked_for_no_progress_sees_comments_while_a_tool_of_the_hive_works(
    hive: Hive, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    waiting, events = Waiting(monkeypatch), list[str]()
    async with httpx.AsyncClient(timeout=20) as client:
        async with await call(client, hive.url) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith(": the call goes on"):
                    waiting.sees()
                elif line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
    (result,) = [json.loads(event) for event in events]
    assert result["id"] == 1 and result["result"]["content"]


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_who_asked_for_progress_hears_of_it_while_a_tool_of_the_hive_works(
    hive: Hive, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    waiting = Waiting(monkeypatch)

    async def note(progress: float, total: float | None, message: str | None) -> None:
        waiting.sees()

    async with Client(hive.url, mode=mode) as client:
        result = await client.call_tool("list", {}, progress_callback=note)
    assert not result.is_error


async def test_every_tool_of_the_hive_is_described_for_host_and_model(hive: Hive) -> None:
    async with Client(hive.url) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert (client.instructions or "") == INSTRUCTIONS
    assert len(INSTRUCTIONS.split()) < 150
    for name in HIVE_TOOLS:
        tool = tools[name]
        assert tool.title and tool.description and tool.annotations is not None
        assert tool.input_schema["type"] == "object"
        assert (tool.output_schema is None) == (name == "call")
    assert "general" in (tools["spawn"].description or "") and "echo" in (tools["spawn"].description or "")


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("spawn", {"recipe": "nope"}, "recipe_not_found", "there are: echo, general"),
    ("spawn", {"recipe": 7}, "bad_request", "recipe"),
    ("spawn", {"recipe": {"name": "x"}}, "bad_request", "recipe"),
    ("spawn", {"session": "Not Good"}, "bad_request", "lower-case letter"),
    ("spawn", {"session": "spawn"}, "bad_request", "cannot be a session name"),
    ("spawn", {"image": "python:3.12"}, "bad_request", "image"),
    ("spawn", {"env": {"1A": "x"}}, "bad_request", "env"),
    ("spawn", {"env": "A=1"}, "bad_request", "env"),
    ("spawn", {"secrets": {"A": 1}}, "bad_request", "secrets"),
    ("spawn", {"ports": [0]}, "bad_request", "ports"),
    ("spawn", {"ttl_seconds": -1}, "bad_request", "ttl_seconds"),
    ("spawn", {"ttl_seconds": 1e12}, "bad_request", "ttl_seconds is at most"),
    ("spawn", {"idle_seconds": "soon"}, "bad_request", "idle_seconds"),
    ("spawn", {"resources": {"limits": {"memory": "lots"}}}, "bad_request", "memory"),
    ("spawn", {"resources": {"limits": {"gpu": "1"}}}, "bad_request", "gpu"),
    ("spawn", {"runtime_class": "kata-fc"}, "unsupported", "runtime"),
    ("spawn", {"node_selector": {"gpu": "true"}}, "unsupported", "node"),
    ("spawn", {"network": "everything"}, "bad_request", "network"),
    ("spawn", {"network": ["127.0.0.1:80"]}, "permission_denied", "operator"),
    ("spawn", {"network": ["[fd00::1]:80"]}, "permission_denied", "operator"),
    ("spawn", {"network": ["db.test=10.0.0.7:5432"]}, "permission_denied", "operator"),
    ("spawn", {"labels": {"": "x"}}, "bad_request", "labels"),
    ("spawn", {"receipe": "echo"}, "bad_request", "receipe"),
    ("spawn", {"idempotency_key": ""}, "bad_request", "idempotency_key"),
    ("destroy", {}, "bad_request", "session"),
    ("destroy", {"session": []}, "bad_request", "session"),
    ("destroy", {"session": {"a": 1}}, "bad_request", "session"),
    ("list", {"labels": "a=b"}, "bad_request", "labels"),
    ("list", {"include_ended": "perhaps"}, "bad_request", "include_ended"),
    ("extend", {"session": "nope", "ttl_seconds": 5}, "sandbox_not_found", "you have"),
    ("extend", {"session": "nope"}, "bad_request", "ttl_seconds"),
    ("network", {"session": "nope", "policy": "none"}, "sandbox_not_found", "you have"),
    ("network", {"session": "nope", "policy": "all"}, "bad_request", "policy"),
    ("network", {"session": "nope"}, "bad_request", "policy"),
    ("call", {"session": "nope", "tool": "echo"}, "sandbox_not_found", "you have"),
    ("call", {"session": "nope"}, "bad_request", "tool"),
    ("call", {"tool": "echo"}, "bad_request", "session"),
    ("call", {"session": "a", "sandbox": "b", "tool": "echo"}, "bad_request", "give one of them"),
    ("destroy", {"session": ["a"], "sandbox": ["b"]}, "bad_request", "give one of them"),
    ("list", {"sandbox": "a"}, "bad_request", "session"),
    ("call", {"session": "nope", "tool": "echo", "arguments": "text"}, "bad_request", "arguments"),
    ("read_resource", {"session": "nope", "uri": "sandbox://nope/x"}, "sandbox_not_found", "you have"),
    ("read_resource", {"session": "nope", "uri": "sandbox://"}, "bad_request", "sandbox://"),
    ("nope_echo", {"text": "x"}, "sandbox_not_found", "you have"),
    ("nonsense", {}, "tool_not_found", "the hive has: spawn"),
    ("ash_tools", {"session": "nope"}, "sandbox_not_found", "you have"),
    ("ash_logs", {"session": "nope", "tail_bytes": 0}, "bad_request", "tail_bytes"),
]


@pytest.mark.parametrize(("tool", "arguments", "kind", "says"), BAD)
async def test_a_bad_input_is_told_what_to_do_and_leaves_nothing(
    hive: Hive, tool: str, arguments: dict[str, Any], kind: str, says: str
) -> None:
    before = len(await hive.backend.list())
    result = await call(hive, tool, arguments)
    assert result.is_error
    failure = result.meta[FAILURE_META_KEY]
    assert (failure["kind"], failure["trainable"]) == (kind, False)  # no sandbox was asked
    assert says in failure["message"] == result.content[0].text
    assert len(await hive.backend.list()) == before


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_host_with_a_fixed_list_reads_what_it_can_call_and_the_log_names_it(
    hive: Hive, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ash.hub")
    session = (await spawn(hive))["session"]
    host = Implementation(name=f"codex-mcp-client-{mode}", version="9.9")
    async with Client(hive.url, mode=mode, client_info=host) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        protocol = client.protocol_version
    assert f"Tools of {session}: " in (tools["call"].description or "")
    named: list[Any] = [record for record in caplog.records if getattr(record, "client", None) == host.name]
    assert [(record.version, record.protocol) for record in named] == [("9.9", protocol)]
    await call(hive, "destroy", {"session": session})


async def test_a_session_may_be_named_as_a_sandbox_in_every_tool(hive: Hive) -> None:
    info = await spawn(hive, sandbox="named")
    named = {"sandbox": info["session"]}
    assert info["session"] == "named"
    said = await call(hive, "call", {**named, "tool": "echo", "arguments": {"text": "hi"}})
    assert said.structured_content["text"] == "hi"
    assert not (await call(hive, "extend", {**named, "session": "named", "ttl_seconds": 60})).is_error
    assert (await call(hive, "destroy", named)).structured_content["destroyed"]


def test_what_takes_a_session_says_that_it_takes_a_sandbox_and_requires_neither() -> None:
    for tool in HIVE_TOOLS.values():
        schema = tool.to_json()["inputSchema"]
        assert (
            ("sandbox" in schema["properties"])
            == ("session" in schema["properties"])
            == (tool.name not in {"copy", "list", "run"})
        )
        assert {"session", "sandbox"}.isdisjoint(schema.get("required", ()))


async def test_null_counts_as_absent(hive: Hive) -> None:
    info = await spawn(hive, session=None, env=None, labels=None, ttl_seconds=None)
    await call(hive, "destroy", {"session": info["session"]})


async def test_tools_appear_and_vanish_with_their_sandbox_and_can_be_turned_off(hive: Hive) -> None:
    info = await spawn(hive, "?scope=expansion")
    session = info["session"]
    mine = {f"{session}_{tool}" for tool in ("echo", "whoami", "slow")}
    assert mine <= {tool["name"] for tool in info["tools"]}
    assert mine <= set(await names(hive, "?scope=expansion"))
    assert not mine & set(await names(hive, "?scope=expansion&expand=none"))
    assert not mine & set(await names(hive))
    hidden = await call(hive, f"{session}_echo", {"text": "hi"}, "?scope=expansion&expand=none")
    assert hidden.structured_content["text"] == "hi"
    await call(hive, "destroy", {"session": session}, "?scope=expansion")
    assert not mine & set(await names(hive, "?scope=expansion"))


async def test_the_recipes_own_hints_reach_the_host(hive: Hive) -> None:
    session = (await spawn(hive, "?scope=hints", recipe="general"))["session"]
    async with Client(hive.url + "?scope=hints") as client:
        shown = {tool.name.partition("_")[2]: tool for tool in (await client.list_tools()).tools}
    read, run = shown["terminal-controller_read_file"], shown["terminal-controller_execute_command"]
    assert read.annotations and read.annotations.read_only_hint is True and read.title
    assert run.annotations and run.annotations.destructive_hint is True and run.output_schema
    await call(hive, "destroy", {"session": session}, "?scope=hints")


async def test_over_the_count_whole_sandboxes_are_hidden_but_not_the_newest(hive: Hive) -> None:
    sessions = [(await spawn(hive, "?scope=many"))["session"] for _ in range(3)]
    shown = {name.partition("_")[0] for name in await names(hive, "?scope=many") if name.startswith("sb")}
    assert shown == set(sessions[1:])
    await call(hive, f"{sessions[0]}_echo", {"text": "x"}, "?scope=many")
    shown = {name.partition("_")[0] for name in await names(hive, "?scope=many") if name.startswith("sb")}
    assert sessions[0] in shown and len(shown) == 2
    assert (await call(hive, "destroy", {"session": "*"}, "?scope=many")).structured_content["not_found"] == []


async def test_destroy_says_what_it_ended_what_had_ended_and_what_it_does_not_know(hive: Hive) -> None:
    session = (await spawn(hive))["session"]
    first = (await call(hive, "destroy", {"session": [session, session, "nope"]})).structured_content
    assert [info["reason"] for info in first["destroyed"]] == ["destroyed"]
    assert first["not_found"] == ["nope"]
    again = (await call(hive, "destroy", {"session": session})).structured_content
    assert [info["session"] for info in again["already_ended"]] == [session] and again["destroyed"] == []
    ended = (await call(hive, "list", {"include_ended": True})).structured_content["sandboxes"]
    assert "destroyed" in {info["reason"] for info in ended if info["session"] == session}


async def test_a_call_to_a_sandbox_that_has_ended_says_why_and_what_to_do(hive: Hive) -> None:
    info = await spawn(hive)
    await call(hive, "destroy", {"session": info["session"]})
    for name, arguments in (
        (f"{info['session']}_echo", {"text": "x"}),
        ("call", {"session": info["sandbox_id"], "tool": "echo", "arguments": {"text": "x"}}),
    ):
        failure = (await call(hive, name, arguments)).meta[FAILURE_META_KEY]
        assert failure["kind"] == "sandbox_gone" and failure["data"]["reason"] == "destroyed"
        assert "Call spawn for a new one" in failure["message"]


async def test_files_are_resources(hive: Hive) -> None:
    session = (await spawn(hive))["session"]
    command = "mkdir d; echo hello > 'd/a file.txt'; printf '\\xff' > raw; dd if=/dev/zero of=big bs=1M count=1 2>&1"
    await call(hive, "call", {"session": session, "tool": "ash_exec", "arguments": {"command": command}})
    async with Client(hive.url) as client:
        templates = (await client.list_resource_templates()).resource_templates
        assert [template.uri_template for template in templates] == ["sandbox://{session}/{+path}"]
        (text,) = (await client.read_resource(f"sandbox://{session}/d/a%20file.txt")).contents
        assert getattr(text, "text", None) == "hello\n"
        (raw,) = (await client.read_resource(f"sandbox://{session}/raw")).contents
        assert getattr(raw, "blob", None) == "/w=="
    own = await call(hive, "read_resource", {"session": session, "uri": f"sandbox://{session}//etc/passwd"})
    assert "ash" in own.structured_content["contents"][0]["text"]
    for path, says in (("nope", "nope"), ("d", "directory"), ("big", "larger than")):
        refused = await call(hive, "read_resource", {"session": session, "uri": f"sandbox://{session}/{path}"})
        assert refused.is_error and says in refused.content[0].text
    await call(hive, "destroy", {"session": session})


async def test_the_doors_beside_mcp_answer(hive: Hive) -> None:
    base = hive.url.removesuffix("/mcp")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{base}/healthz")).text == "ok"
        assert (await client.get(f"{base}/readyz")).text == "ready"
        assert (await client.get(f"{base}/readyz/calls")).text == "ready"
        metrics = await client.get(f"{base}/metrics")
        assert "ash_calls_total" in metrics.text and metrics.headers["content-type"].startswith("text/plain")
        missing = await client.get(f"{base}/nope")
        assert missing.status_code == 404 and missing.json()["error"]["kind"] == "not_found"
        assert "/mcp" in (await client.get(base)).text


@pytest.mark.parametrize(
    "path", ["/_ash/health", "/s/../_ash/health", "/mcp/../_ash/claim", "/mcp/in/a/../../_ash/files"]
)
async def test_no_door_leads_to_a_runners_private_surface(hive: Hive, path: str) -> None:
    session = (await spawn(hive))["session"]
    reader, writer = await _connect(hive)
    writer.write(f"GET {path}?path=/etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    with anyio.fail_after(5):
        answer = (await reader.read()).decode()
    writer.close()
    assert answer.split()[1] in ("400", "404", "405", "406")
    await call(hive, "destroy", {"session": session})


async def _connect(hive: Hive) -> Any:
    url = httpx.URL(hive.url)
    return await asyncio.open_connection(url.host, url.port)


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"origin": "http://evil.test"}, 403), ({"origin": "null"}, 403), ({"host": "evil.test"}, 421)],
)
async def test_pages_and_names_of_others_are_refused_with_a_typed_body(
    hive: Hive, headers: dict[str, str], status: int
) -> None:
    async with httpx.AsyncClient() as client:
        for url in (hive.url, hive.url.removesuffix("/mcp") + "/healthz"):
            refused = await client.post(url, json={}, headers=headers)
            assert refused.status_code == status
            assert refused.json()["error"]["kind"] == "permission_denied"
            assert refused.headers["ash-origin"] == "hub"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.test"])
async def test_another_address_is_refused_at_the_start(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        async with open_hive(settings(tmp_path, host=host)):
            raise AssertionError("it served")


async def test_a_port_in_use_is_refused_with_words(hive: Hive, tmp_path: Path) -> None:
    port = httpx.URL(hive.url).port
    assert port is not None
    taken = HubSettings(port=port, state_dir=tmp_path / "s", run_dir=tmp_path / "r")
    with pytest.raises(ConfigError, match="--port"):
        async with open_hive(taken):
            raise AssertionError("it served")


async def test_an_unknown_backend_lists_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are: .*local"):
        async with open_hive(settings(tmp_path, backend={"kind": "nope"})):
            raise AssertionError("it served")


async def test_the_run_directory_says_where_the_hive_is(hive: Hive) -> None:
    announced = json.loads((hive.settings.run_dir / "hive.json").read_text())
    assert announced["url"] == hive.url
