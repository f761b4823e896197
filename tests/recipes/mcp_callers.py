"""What callers with the SDK's own client read, and what they answer when they are asked."""

from __future__ import annotations

from typing import Any

import mcp_types as types
from mcp.client.session import ClientRequestContext

__all__ = ["Person", "text"]


def text(result: Any) -> str:
    """Return the one block of text that a result is."""
    (block,) = result.content
    assert isinstance(block, types.TextContent)
    return block.text


class Person:
    """Whoever sits before a client: answers each question with the next of `words`."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)
        self.asked: list[str] = []

    async def elicited(self, context: ClientRequestContext, params: types.ElicitRequestParams) -> types.ElicitResult:
        self.asked.append(params.message)
        return types.ElicitResult(action="accept", content={"value": self.words.pop(0)})
