"""Calls of the runner's own tools, unwrapped."""

from __future__ import annotations

import base64
from typing import Any

from ash_recipes.runner.tools import RunnerTools

__all__ = ["call", "refused", "written"]


async def call(tools: RunnerTools, name: str, **arguments: Any) -> dict[str, Any]:
    """Return the structured content of a call that succeeds."""
    result = await tools.call(f"ash_{name}", arguments)
    assert not result["isError"], result
    return result["structuredContent"]


async def refused(tools: RunnerTools, name: str, **arguments: Any) -> tuple[str, str]:
    """Return the kind and the sentence of a call that fails."""
    result = await tools.call(f"ash_{name}", arguments)
    assert result["isError"], result
    error = result["structuredContent"]["error"]
    assert result["content"][0]["text"] == error["message"]
    return error["kind"], error["message"]


def written(page: dict[str, Any]) -> bytes:
    """Return what stands in the chunks of a job's page."""
    return b"".join(base64.b64decode(chunk["data_base64"]) for chunk in page["chunks"])
