"""A recipe's server that asks its caller: as the handshake era does, and by results that want another call."""

from __future__ import annotations

from typing import Any

import mcp_types as types
from fastmcp import Context, FastMCP

server: FastMCP[None] = FastMCP("asker")

FORM: dict[str, Any] = {"type": "object", "properties": {"value": {"type": "string"}}}


@server.tool
async def greet(ctx: Context) -> str:
    """Ask who is there, in a session."""
    said: Any = await ctx.elicit("who are you?", response_type=str)
    return f"hello {said.data}"


@server.tool
async def think(ctx: Context) -> str:
    """Ask the caller's model, in a session."""
    said = await ctx.session.create_message(  # pyright: ignore[reportDeprecated]
        [types.SamplingMessage(role="user", content=types.TextContent(type="text", text="2+2?"))],
        max_tokens=9,
        related_request_id=ctx.request_id,
    )
    return str(getattr(said.content, "text", said.content))


@server.tool
async def twice(ctx: Context) -> str | types.InputRequiredResult:
    """Ask two questions without a session, the second in the light of the first answer."""
    said = (ctx.input_responses or {}).get("answer")
    if said is None:
        return _asking("first?", "nothing")
    content: Any = getattr(said, "content", None)
    if ctx.request_state == "nothing":
        return _asking("second?", content["value"])
    return f"{ctx.request_state}, then {content['value']}"


def _asking(question: str, state: str) -> types.InputRequiredResult:
    form = types.ElicitRequestFormParams(message=question, requested_schema=FORM)
    asked: Any = {"answer": types.ElicitRequest(params=form)}
    return types.InputRequiredResult(input_requests=asked, request_state=state)
