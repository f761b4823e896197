"""FastMCP's client, from the `mcpServers` config that every host understands.

python examples/fastmcp_client.py
"""

from __future__ import annotations

import os
from typing import Any

import anyio
from fastmcp import Client

CONFIG: dict[str, Any] = {
    "mcpServers": {
        "ash": {"transport": "http", "url": os.environ.get("ASH_URL", "http://127.0.0.1:8420/mcp")},
    }
}


async def main() -> None:
    async with Client(CONFIG) as client:
        spawned = (await client.call_tool("spawn", {"recipe": "general"})).structured_content
        assert spawned is not None
        session = spawned["session"]
        tools = [tool.name for tool in await client.list_tools() if tool.name.startswith(f"{session}_")]
        print(f"{session} brought {len(tools)} tools")

        # `call` reaches every tool, also in a host that never lists again.
        arguments = {"command": "echo hello from $(uname -s)"}
        done = await client.call_tool(
            "call", {"session": session, "tool": "terminal-controller_execute_command", "arguments": arguments}
        )
        assert done.structured_content is not None
        print(done.structured_content["stdout"], end="")

        await client.call_tool("destroy", {"session": session})
        print(f"{session} is gone")


if __name__ == "__main__":
    anyio.run(main)
