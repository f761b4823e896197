# pyright: basic, reportMissingImports=false
"""OpenAI Agents SDK: a hive as an MCP server of an agent. No model is asked; the calls are the agent's own.

pip install openai-agents; python examples/openai_agents_tools.py
"""

from __future__ import annotations

import asyncio
import os

from agents import Agent
from agents.mcp import MCPServerStreamableHttp

URL = os.environ.get("ASH_URL", "http://127.0.0.1:8420/mcp")


async def main() -> None:
    # A spawn takes longer than the SDK's usual 5 seconds, and the list changes with each, so it is not cached.
    async with MCPServerStreamableHttp(
        name="ash",
        params={"url": URL, "timeout": 60},
        client_session_timeout_seconds=120,
        cache_tools_list=False,
    ) as server:
        agent = Agent(name="tinkerer", instructions="Work in a sandbox.", mcp_servers=[server])
        spawned = await server.call_tool("spawn", {"recipe": "general"})
        name = spawned.structured_content["session"]

        tools = [tool.name for tool in await server.list_tools()]
        print(f"{name} brought {sum(tool.startswith(f'{name}_') for tool in tools)} tools to {agent.name}")
        command = {"command": "echo hello from $(uname -s)"}
        done = await server.call_tool(f"{name}_terminal-controller_execute_command", command)
        print(done.structured_content["stdout"], end="")

        await server.call_tool("destroy", {"session": name})
        print(f"{name} is gone")


if __name__ == "__main__":
    asyncio.run(main())
