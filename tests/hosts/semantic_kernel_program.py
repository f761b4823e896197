# pyright: basic, reportMissingImports=false
"""A program of Semantic Kernel that has a hive's tools, in the way of docs/hosts.md; arguments as the other's."""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.connectors.mcp import MCPStreamableHttpPlugin
from semantic_kernel.contents import ChatHistory


class HivePlugin(MCPStreamableHttpPlugin):
    async def message_handler(self, message: object) -> None:
        """Nothing: what has changed is loaded after the call."""


async def main(model_url: str, hive_url: str) -> None:
    kernel = Kernel()
    chat = OpenAIChatCompletion("scripted", async_client=AsyncOpenAI(api_key="none", base_url=model_url))
    kernel.add_service(chat)
    settings = OpenAIChatPromptExecutionSettings(
        function_choice_behavior=FunctionChoiceBehavior.Auto(maximum_auto_invoke_attempts=10)
    )
    history = ChatHistory()
    async with HivePlugin(name="ash", url=hive_url) as hive:
        for asked in ("Get a sandbox.", "Use it."):
            await hive.load_tools()
            kernel.add_plugin(hive)
            history.add_user_message(asked)
            answer = await chat.get_chat_message_content(history, settings, kernel=kernel)
            print(answer)  # noqa: T201
            history.add_message(answer)


asyncio.run(main(*sys.argv[1:]))
