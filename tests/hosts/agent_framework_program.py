# pyright: basic, reportMissingImports=false
"""A program of Agent Framework that has a hive's tools; its arguments are the model's URL and the hive's."""

from __future__ import annotations

import asyncio
import sys

from agent_framework import Agent, MCPStreamableHTTPTool
from agent_framework_openai import OpenAIChatCompletionClient


async def main(model_url: str, hive_url: str) -> None:
    client = OpenAIChatCompletionClient(model="scripted", api_key="none", base_url=model_url)
    async with MCPStreamableHTTPTool(name="ash", url=hive_url) as hive:
        print((await Agent(client=client, tools=hive).run("Use the hive.")).text)  # noqa: T201


asyncio.run(main(*sys.argv[1:]))
