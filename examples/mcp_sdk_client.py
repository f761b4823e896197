"""The MCP SDK's own client, in either era of the protocol, over HTTP or over the stdio bridge.

python examples/mcp_sdk_client.py                   # HTTP, the newest protocol that both speak
python examples/mcp_sdk_client.py --legacy --stdio  # the handshake era, through `ash up --stdio`
"""

from __future__ import annotations

import os
import sys
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

URL = os.environ.get("ASH_URL", "http://127.0.0.1:8420/mcp")


def server(stdio: bool) -> Any:
    if not stdio:
        return URL
    # Without ASH_URL the bridge joins the hive of this user, or starts one in the background.
    environ = {name: value for name, value in os.environ.items() if name.startswith(("ASH_", "XDG_"))}
    return stdio_client(
        StdioServerParameters(command=sys.executable, args=["-m", "ash_mcp.cli", "up", "--stdio"], env=environ)
    )


async def show_progress(progress: float, total: float | None, message: str | None) -> None:
    print(f"  {progress:.0%} {message}")


async def main(stdio: bool, legacy: bool) -> None:
    async with Client(server(stdio), mode="legacy" if legacy else "auto") as client:
        print(f"connected, protocol {client.protocol_version}")
        spawned = await client.call_tool("spawn", {"recipe": "general"}, progress_callback=show_progress)
        assert spawned.structured_content is not None, spawned.content
        session = spawned.structured_content["session"]

        mine = [tool.name for tool in (await client.list_tools()).tools if tool.name.startswith(f"{session}_")]
        print(f"{session} brought {len(mine)} tools")

        done = await client.call_tool(
            f"{session}_terminal-controller_execute_command", {"command": "echo hello from $(uname -s)"}
        )
        assert done.structured_content is not None, done.content
        print(done.structured_content["stdout"], end="")

        await client.call_tool("destroy", {"session": session})
        print(f"{session} is gone")


if __name__ == "__main__":
    anyio.run(main, "--stdio" in sys.argv, "--legacy" in sys.argv)
