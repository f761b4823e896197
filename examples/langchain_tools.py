# pyright: basic, reportMissingImports=false
"""LangChain: a hive's tools as LangChain tools, by langchain-mcp-adapters. No model is asked.

pip install langchain-mcp-adapters; python examples/langchain_tools.py
"""

from __future__ import annotations

import asyncio
import os

from langchain_mcp_adapters.client import MultiServerMCPClient
from langchain_mcp_adapters.tools import load_mcp_tools

CONFIG = {
    "ash": {
        "transport": "streamable_http",
        "url": os.environ.get("ASH_URL", "http://127.0.0.1:8420/mcp"),
    }
}


async def main() -> None:
    client = MultiServerMCPClient(CONFIG)
    async with client.session("ash") as session:
        tools = {tool.name: tool for tool in await load_mcp_tools(session)}
        spawn = {"name": "spawn", "args": {"recipe": "general"}, "id": "1", "type": "tool_call"}
        spawned = await tools["spawn"].ainvoke(spawn)
        name = spawned.artifact["structured_content"]["session"]

        # The sandbox's tools are there now: an agent built from this list can use them.
        tools = {tool.name: tool for tool in await load_mcp_tools(session)}
        print(f"{name} brought {sum(tool.startswith(f'{name}_') for tool in tools)} tools")
        terminal = tools[f"{name}_terminal-controller_execute_command"]
        said = await terminal.ainvoke({"command": "echo hello from $(uname -s)"})
        print(said[0]["text"])

        await tools["destroy"].ainvoke({"session": name})
        print(f"{name} is gone")


if __name__ == "__main__":
    asyncio.run(main())
