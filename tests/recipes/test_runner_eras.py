"""Every kind of server through a real runner, for callers of both eras, with the SDK's own client."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.shared.exceptions import MCPError
from mcp_types import LoggingMessageNotificationParams, TextContent

from tests.recipes.mcp_callers import text
from tests.recipes.runner_parts import ECHO, HERE, LEGACY, Runner, running

pytestmark = pytest.mark.anyio

ERAS = ("legacy", "auto")
"""By handshake, and as the server says: which is stateless, or the runner is wrong."""
DUAL = str(HERE / "dual_server.py")


def _http_server() -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"http": {"command": [sys.executable, DUAL, str(port)], "port": port}}


@pytest.fixture(scope="module")
def python() -> Generator[Runner]:
    with running(ECHO, port=True) as runner:
        yield runner


@pytest.fixture(scope="module")
def old() -> Generator[Runner]:
    with running(LEGACY, port=True) as runner:
        yield runner


@pytest.fixture(scope="module", params=["stdio", "http"])
def dual(request: pytest.FixtureRequest) -> Generator[Runner]:
    stdio = {"stdio": {"command": [sys.executable, DUAL, "stdio"]}}
    with running(stdio if request.param == "stdio" else _http_server(), port=True) as runner:
        yield runner
        runner.stop()  # a runner that is killed takes its servers with it only where it is the init of a sandbox


class Heard:
    """What a client is told beside its results."""

    def __init__(self) -> None:
        self.progress: list[tuple[float, float | None]] = []
        self.logs: list[Any] = []

    async def progressed(self, progress: float, total: float | None, message: str | None) -> None:
        self.progress.append((progress, total))

    async def logged(self, params: LoggingMessageNotificationParams) -> None:
        self.logs.append(params.data)


@pytest.mark.parametrize("era", ERAS)
async def test_a_python_server_answers_with_progress_and_logs(python: Runner, era: str) -> None:
    heard = Heard()
    async with python.client(era, logging_callback=heard.logged, log_level="info") as client:
        result = await client.call_tool("slow", {"steps": 3, "seconds": 0}, progress_callback=heard.progressed)
    assert result.structured_content == {"steps": 3}
    assert heard.progress == [(1, 3), (2, 3), (3, 3)]
    assert [entry["msg"] for entry in heard.logs] == ["taking 3 steps in 0 s"]


async def test_a_modern_caller_gets_no_logs_unasked(python: Runner) -> None:
    heard = Heard()
    async with python.client("auto", logging_callback=heard.logged) as client:
        await client.call_tool("slow", {"steps": 1, "seconds": 0})
    assert heard.logs == []


@pytest.mark.parametrize("era", ERAS)
async def test_the_runners_tools_are_called_and_not_listed(python: Runner, era: str) -> None:
    async with python.client(era) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["echo", "whoami", "slow"]
        assert client.protocol_version == {"legacy": "2025-11-25", "auto": "2026-07-28"}[era]
        done = await client.call_tool("ash_exec", {"command": "echo hi"})
        assert done.structured_content is not None and done.structured_content["stdout"] == "hi\n"
        failed = await client.call_tool("ash_file_read", {"path": "missing"})
        assert failed.is_error and failed.structured_content is not None
        assert failed.structured_content["error"]["kind"] == "file_not_found"


@pytest.mark.parametrize("era", ERAS)
async def test_a_cancelled_call_stops_its_work(python: Runner, era: str) -> None:
    started, ended = python.workspace / f"started-{era}", python.workspace / f"ended-{era}"
    command = f"trap 'echo x > {ended}; exit' TERM; echo $$ > {started}; sleep 60 & wait"
    async with python.client(era) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.call_tool("ash_exec", {"command": command}))
            await _until(lambda: started.exists() and bool(started.read_text()))
            group.cancel_scope.cancel()
        pid = int(started.read_text())
        await _until(lambda: not Path(f"/proc/{pid}").exists())
        assert (await client.call_tool("echo", {"text": "on"})).structured_content == {"text": "on"}


@pytest.mark.parametrize("era", ERAS)
async def test_many_calls_at_once_keep_apart(python: Runner, era: str) -> None:
    answers: dict[int, Any] = {}

    async def one(client: Any, number: int) -> None:
        answers[number] = (await client.call_tool("ash_exec", {"command": f"echo {number}"})).structured_content

    async with python.client(era) as client, anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, client, number)
    assert {number: answer["stdout"].strip() for number, answer in answers.items()} == {n: str(n) for n in range(20)}


@pytest.mark.parametrize("era", ERAS)
async def test_an_old_stdio_server_serves_callers_of_both_eras(old: Runner, era: str) -> None:
    heard = Heard()
    async with old.client(era, logging_callback=heard.logged, log_level="debug") as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == [
            *("echo", "whoami", "steps", "wait", "die"),
            *("ask", "think", "roots"),
        ]
        assert client.protocol_version == {"legacy": "2025-11-25", "auto": "2026-07-28"}[era]
        assert client.instructions == "An old server."
        assert text(await client.call_tool("echo", {"text": "hé"})) == "hé"
        assert text(await client.call_tool("steps", {}, progress_callback=heard.progressed)) == "done"
        with pytest.raises(MCPError, match="no tool nothing"):
            await client.call_tool("nothing", {})
        done = await client.call_tool("ash_exec", {"command": "echo hi"})
        assert done.structured_content is not None and done.structured_content["stdout"] == "hi\n"
    assert heard.progress == [(1, 2), (2, 2)] and heard.logs == ["at it"]


@pytest.mark.parametrize("era", ERAS)
async def test_a_cancelled_call_is_cancelled_in_an_old_server(old: Runner, era: str) -> None:
    mark = old.workspace / f"mark-{era}"
    async with old.client(era) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "wait", {"text": str(mark)})
            await _until((old.workspace / f"{mark.name}.begun").exists)
            group.cancel_scope.cancel()
        await _until(lambda: mark.exists() and mark.read_text() != "")
        assert mark.read_text() == "cancelled"


@pytest.mark.parametrize("era", ERAS)
async def test_a_server_that_ends_is_started_again(old: Runner, era: str) -> None:
    async with old.client(era) as client:
        with pytest.raises(MCPError, match="ended during the call"):
            await client.call_tool("die", {})
        assert text(await client.call_tool("echo", {"text": "again"})) == "again"


@pytest.mark.parametrize("era", ERAS)
async def test_resources_and_prompts_of_a_bridged_server_are_reached(dual: Runner, era: str) -> None:
    async with dual.client(era) as client:
        assert client.instructions == "A server with everything."
        assert (await client.call_tool("echo", {"text": "hi"})).structured_content == {"text": "hi"}
        assert [str(resource.uri) for resource in (await client.list_resources()).resources] == ["note://first"]
        templates = (await client.list_resource_templates()).resource_templates
        assert [template.uri_template for template in templates] == ["note://{name}"]
        (content,) = (await client.read_resource("note://second")).contents
        assert json.loads(content.model_dump_json())["text"] == "note second"
        assert [prompt.name for prompt in (await client.list_prompts()).prompts] == ["greet"]
        message = (await client.get_prompt("greet", {"name": "Ann"})).messages[0]
        assert isinstance(message.content, TextContent) and message.content.text == "Greet Ann."


@pytest.mark.parametrize("era", ERAS)
async def test_progress_and_logs_of_a_bridged_server_come_through(dual: Runner, era: str) -> None:
    heard = Heard()
    async with dual.client(era, logging_callback=heard.logged, log_level="info") as client:
        result = await client.call_tool("slow", {"steps": 2, "seconds": 0.1}, progress_callback=heard.progressed)
    assert result.structured_content == {"steps": 2} and heard.progress == [(1, 2), (2, 2)]
    assert [entry["msg"] for entry in heard.logs] == ["taking 2 steps in 0.1 s"]


async def _until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not true():
            await anyio.sleep(0.01)
