"""MCP through `ash wrap`: whatever a client and a server say to each other is what they say without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.wrap.wrap_parts import words_of

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]

PLACE = Path(__file__).parents[2] / "conformance"
SERVER = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(PLACE)!r}); from suite_server import server; "
    "server.run('stdio', show_banner=False)",
)
"""The server of MCP's conformance suites: it has and asks whatever a server may."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def transcript(command: Sequence[str], mode: str) -> list[Any]:
    """Have a client use all of the server, and return what either side said."""
    said: list[Any] = []

    async def log(message: Any) -> None:
        said.append(("log", message.level, str(message.data)))

    async def sample(messages: Any, params: Any, context: Any) -> str:
        said.append(("sampling", messages[0].content.text))
        return "sampled"

    async def elicit(message: str, response_type: Any, params: Any, context: Any) -> Any:
        said.append(("elicitation", message))
        return {"username": "u", "email": "e@x.test"}

    async def progress(done: float, total: float | None, message: str | None) -> None:
        said.append(("progress", done, total))

    transport = StdioTransport(command[0], list(command[1:]), keep_alive=False)
    async with Client(
        transport,
        mode=mode,  # type: ignore[arg-type]
        log_handler=log,
        sampling_handler=sample,
        elicitation_handler=elicit,
        progress_handler=progress,
        timeout=60,
    ) as client:
        said.append(client.initialize_result.model_dump() if client.initialize_result is not None else None)
        said.append([tool.model_dump() for tool in await client.list_tools()])
        said.append([it.model_dump() for it in await client.list_resources()])
        said.append([it.model_dump() for it in await client.list_resource_templates()])
        said.append([it.model_dump() for it in await client.list_prompts()])
        for name in ("test_simple_text", "test_image_content", "test_multiple_content_types", "test_error_handling"):
            result = await client.call_tool_mcp(name, {})
            said.append(result.model_dump(exclude={"meta"}))
        for name, arguments in (
            ("test_tool_with_progress", {}),
            ("test_tool_with_logging", {}),
            ("test_sampling", {"prompt": "p"}),
            ("test_elicitation", {"message": "m"}),
        ):
            said.append((name, str((await client.call_tool_mcp(name, arguments)).content)))
        said.append([it.model_dump() for it in await client.read_resource("test://static-text")])
        said.append((await client.get_prompt("test_simple_prompt")).model_dump())
    return said


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_client_sees_and_is_asked_the_same(mode: str) -> None:
    direct = await transcript(SERVER, mode)
    through = await transcript(words_of(["--folder", str(PLACE)], *SERVER), mode)
    assert through == direct
    assert {"log", "progress"} <= {it[0] for it in through if isinstance(it, tuple)}
