# pyright: basic, reportMissingImports=false
"""A framework reaches one sandbox, at each door that it is given: `python framework_doors.py NAME`.

Standard input holds the doors, a list of objects with `url` and `headers`. What is printed for each is a line of JSON:
the names of the tools, and what `echo` answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

Headers = Mapping[str, str]
Seen = tuple[list[str], str]


async def langchain(url: str, headers: Headers) -> Seen:
    from langchain_mcp_adapters.client import MultiServerMCPClient
    from langchain_mcp_adapters.tools import load_mcp_tools

    client = MultiServerMCPClient({"box": {"transport": "streamable_http", "url": url, "headers": dict(headers)}})
    async with client.session("box") as session:
        tools = {tool.name: tool for tool in await load_mcp_tools(session)}
        return sorted(tools), str(await tools["echo"].ainvoke({"text": "hello"}))


async def openai_agents(url: str, headers: Headers) -> Seen:
    from agents.mcp import MCPServerStreamableHttp

    params = {"url": url, "headers": dict(headers), "timeout": 30}
    async with MCPServerStreamableHttp(params=params, client_session_timeout_seconds=60) as server:
        tools = sorted(tool.name for tool in await server.list_tools())
        return tools, str((await server.call_tool("echo", {"text": "hello"})).structured_content)


async def pydantic_ai(url: str, headers: Headers) -> Seen:
    import tempfile
    from pathlib import Path

    from pydantic_ai.mcp import load_mcp_toolsets

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mcp.json"
        file.write_text(json.dumps({"mcpServers": {"box": {"url": url, "headers": dict(headers)}}}))
        (toolset,) = load_mcp_toolsets(file)
    async with toolset.wrapped as box:
        tools = sorted(tool.name for tool in await box.list_tools())
        return tools, str(await box.direct_call_tool("echo", {"text": "hello"}))


WAYS: dict[str, Callable[[str, Headers], Coroutine[Any, Any, Seen]]] = {
    "langchain_tools": langchain,
    "openai_agents_tools": openai_agents,
    "pydantic_ai_tools": pydantic_ai,
}


async def main() -> None:
    for door in json.load(sys.stdin):
        sys.stdout.write(json.dumps(await WAYS[sys.argv[1]](door["url"], door["headers"])) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
