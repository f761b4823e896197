# pyright: basic, reportMissingImports=false
"""Pydantic AI: a hive as a toolset, from the same `mcpServers` file that hosts read. No model is asked.

pip install 'pydantic-ai-slim[mcp]'; python examples/pydantic_ai_tools.py
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path

from pydantic_ai.mcp import load_mcp_toolsets

CONFIG = {"mcpServers": {"ash": {"url": os.environ.get("ASH_URL", "http://127.0.0.1:8420/mcp")}}}


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mcp.json"
        file.write_text(json.dumps(CONFIG))
        (toolset,) = load_mcp_toolsets(file)
    ash = toolset.wrapped  # `toolset` is what an Agent takes: the same tools, prefixed with the server's name
    async with ash:
        spawned = await ash.direct_call_tool("spawn", {"recipe": "general"})
        name = spawned["session"]

        tools = [tool.name for tool in await ash.list_tools()]
        print(f"{name} brought {sum(tool.startswith(f'{name}_') for tool in tools)} tools")
        command = {"command": "echo hello from $(uname -s)"}
        done = await ash.direct_call_tool(f"{name}_terminal-controller_execute_command", command)
        print(done["stdout"], end="")

        await ash.direct_call_tool("destroy", {"session": name})
        print(f"{name} is gone")


if __name__ == "__main__":
    asyncio.run(main())
